"""What a predictor fit found, and the files that it leaves."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from turbosparse.predict.allocation import ALL_NEURONS
from turbosparse.predict.config import PredictorConfig
from turbosparse.predict.end_to_end import Evaluation
from turbosparse.predict.layers import FFNLayer
from turbosparse.predict.predictors import LowRankPredictor
from turbosparse.predict.score import PredictorScore

__all__ = [
    "PREDICTOR_FILE",
    "REPORT_FILE",
    "CurvePoint",
    "LayerReport",
    "PredictorReport",
    "save_predictors",
    "save_report",
]

PREDICTOR_FILE = "predictors.safetensors"
REPORT_FILE = "report.json"
MODEL_SAMPLE = "model.sample"
_SAMPLE_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """What all predictors together cost and change, at one choice of thresholds."""

    bytes_ratio: float
    """Bytes read per token, predictors and candidates together, over those of all rows of the FFNs."""
    lost: float
    """Weighted loss of the layers: what the choice was made by."""
    evaluation: Evaluation


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """The choice for one FFN or expert, and what else there was."""

    kind: str
    """``low_rank_RANK``, or ``exact`` for none."""
    threshold: float
    tokens: int
    """Captured tokens that reached it."""
    weight: float
    """How much what is lost here counts: KL divergence that it causes alone, over what is lost; mean 1."""
    exact_bytes_ratio: float
    """Bytes of the exact mode, over those of all rows."""
    score: PredictorScore
    rivals: Mapping[str, PredictorScore]
    """By kind, at thresholds where the layers together lose as much as with the choice."""


@dataclass(frozen=True, kw_only=True)
class PredictorReport:
    """What the predictors of a model cost and save."""

    perplexity: float
    """On the reporting half of the held-out text, without predictors."""
    ppl_rise: float
    """Share by which it is higher with them, there."""
    chosen: CurvePoint
    """There."""
    exact_bytes_ratio: float
    """Bytes of the exact mode, gate first, over those of all rows."""
    cheaper: str
    """``predicted`` or ``exact``: the mode that reads the fewest bytes within the budget."""
    curve: tuple[CurvePoint, ...]
    """On the choosing half of the held-out text, from many bytes to few; the first is the exact mode."""
    rivals: Mapping[str, CurvePoint]
    """By kind, losing as much as the choice, on the reporting half."""
    config: PredictorConfig
    layers: Mapping[str, LayerReport]
    """By the FFN's name, with the expert's number behind it."""


def save_report(report: PredictorReport, directory: Path) -> None:
    """Write ``report.json``.

    Parameters
    ----------
    report : PredictorReport
        All of it.
    directory : Path
        An existing directory.
    """
    text = json.dumps(dataclasses.asdict(report), indent=1)
    (directory / REPORT_FILE).write_text(text + "\n", encoding="utf-8")


def save_predictors(
    chosen: Mapping[str, tuple[LowRankPredictor | None, float]],
    layers: Mapping[str, FFNLayer],
    directory: Path,
    config: PredictorConfig,
) -> None:
    """Write ``predictors.safetensors``; docs/how-to/predictors.md describes it.

    Parameters
    ----------
    chosen : mapping of str to (LowRankPredictor or None, float)
        Predictor and threshold by the FFN's name; None stands for the exact mode, for which a predictor of
        zeros that is never asked is written, since every layer of a model file has one.
    layers : mapping of str to FFNLayer
        By the FFN's name; rows of the first one say later which model it was.
    directory : Path
        An existing directory.
    config : PredictorConfig
        What the predictors read.
    """
    first = next(layer for name, layer in layers.items() if ".shared_expert." not in name)
    rows = first.gate if first.up is None else first.up
    tensors = {MODEL_SAMPLE: rows[:_SAMPLE_ROWS].contiguous()}
    for name, (predictor, threshold) in chosen.items():
        hidden_size, intermediate_size = layers[name].down.shape
        rank = min(config.ranks)
        a = torch.zeros(rank, hidden_size) if predictor is None else predictor.a.weight
        b = torch.zeros(intermediate_size, rank) if predictor is None else predictor.b.weight
        tensors[f"{name}.pred_a.weight"] = a.contiguous()
        tensors[f"{name}.pred_b.weight"] = b.contiguous()
        tensors[f"{name}.pred_threshold"] = torch.tensor([ALL_NEURONS if predictor is None else threshold])
    header = {
        "format": "turbosparse-predictors",
        "version": "1",
        "kind": "low_rank",
        "input": config.inputs[0],
    }
    save_file(tensors, directory / PREDICTOR_FILE, metadata=header)
