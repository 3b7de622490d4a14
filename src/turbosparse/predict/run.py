"""Fit the predictors of a saved model and leave them, with a report, in a directory."""

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from turbosparse.data.config import DataConfig
from turbosparse.data.encoding import make_encoder
from turbosparse.data.held_out import HeldOutSplit
from turbosparse.data.mixture import Mixture, PackedSequence, held_out_sequences
from turbosparse.errors import DataError
from turbosparse.measure.held_out_loss import batch_of, mean_loss
from turbosparse.models.gated_ffn import GatedFFN, gated_ffns, replace_ffns
from turbosparse.models.registry import activation_of, load_model
from turbosparse.predict.capture import capture_inputs, open_inputs
from turbosparse.predict.config import PredictorConfig
from turbosparse.predict.end_to_end import predictors_on
from turbosparse.predict.fit import FittedLayer, fit_layer

__all__ = ["PREDICTOR_FILE", "REPORT_FILE", "PredictorReport", "fit_predictors"]

PREDICTOR_FILE = "predictors.safetensors"
REPORT_FILE = "report.json"
_EVALUATION_SEQUENCES = 16
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PredictorReport:
    """What the predictors of a model cost and save."""

    perplexity: float
    """On held-out text, without predictors."""
    predicted_perplexity: float
    """On the same text, with them."""
    kl_divergence: float
    """Of the next-token distributions with predictors from those without, mean, in nats."""
    same_top1: float
    """Share of positions where the most likely token stays the same."""
    bytes_ratio: float
    """Weights read per token, predictors and candidates together, over all of the FFNs; mean over layers."""
    layers: dict[str, dict[str, Any]]
    """Per FFN: the chosen predictor, its threshold, and the scores of all kinds."""


def fit_predictors(
    model_path: Path, output: Path, *, data: DataConfig, tokens: int, config: PredictorConfig
) -> PredictorReport:
    """Capture activations, fit every layer, and judge the whole.

    Parameters
    ----------
    model_path : Path
        A Hugging Face directory.
    output : Path
        Where predictors and report go; activations are stored there while it runs.
    data : DataConfig
        Text to capture on and, held out of it, to judge on.
    tokens : int
        Tokens to capture.
    config : PredictorConfig
        How to fit.

    Returns
    -------
    PredictorReport
        As written to ``report.json``.

    Raises
    ------
    DataError
        If the text has too few tokens.
    """
    model = load_model(model_path, dtype=torch.float32)
    if not gated_ffns(model):
        replace_ffns(model, activation_of(model), activation_of(model))
    encode = make_encoder(AutoTokenizer.from_pretrained(model_path), data.document_end)
    split = HeldOutSplit(data.held_out_percent)
    mixture = Mixture(data, encode, split=split, seed=config.seed)
    rows = [row for row, _ in zip(mixture, range(max(tokens // data.sequence_length, 1)), strict=False)]
    evaluation: list[PackedSequence] = []
    for source in data.sources:
        evaluation += held_out_sequences(
            source, encode, split=split, sequence_length=data.sequence_length, count=_EVALUATION_SEQUENCES
        )
    if not evaluation:
        raise DataError("[fit-predictor] expected held-out text of at least one sequence, got less")
    captured = output / ".captured"
    try:
        layers = _fit(model, rows, captured, config)
    finally:
        shutil.rmtree(captured, ignore_errors=True)
    report = _report(model, layers, evaluation)
    _save(layers, report, output)
    return report


def _fit(
    model: Any, rows: Sequence[PackedSequence], directory: Path, config: PredictorConfig
) -> dict[str, FittedLayer]:
    paths = capture_inputs(model, (batch_of([row]) for row in rows), directory)
    layers = {}
    for name, ffn in gated_ffns(model).items():
        if not isinstance(ffn, GatedFFN):
            continue
        layer = fit_layer(ffn, open_inputs(paths[name], ffn.down_proj.weight.shape[0]), config)
        paths[name].unlink()
        layers[name] = layer
        score = layer.scores[layer.chosen]
        _LOG.info(
            "%s %s: recall %.3f, precision %.3f, CETT %.3f, candidates %.1f %%, bytes %.1f %%",
            name,
            layer.chosen,
            score.recall,
            score.precision,
            score.cett,
            100 * score.candidate_ratio,
            100 * score.bytes_ratio,
        )
    return layers


def _report(
    model: Any, layers: dict[str, FittedLayer], evaluation: Sequence[PackedSequence]
) -> PredictorReport:
    plain = math.exp(mean_loss(model, evaluation))
    with predictors_on(model, layers):
        predicted = math.exp(mean_loss(model, evaluation))
    divergence, same_top1 = _distance(model, layers, evaluation)
    chosen = [layer.scores[layer.chosen].bytes_ratio for layer in layers.values()]
    return PredictorReport(
        perplexity=plain,
        predicted_perplexity=predicted,
        kl_divergence=divergence,
        same_top1=same_top1,
        bytes_ratio=sum(chosen) / len(chosen),
        layers={
            name: {
                "chosen": layer.chosen,
                "threshold": layer.threshold,
                "scores": {kind: dataclasses.asdict(score) for kind, score in layer.scores.items()},
            }
            for name, layer in layers.items()
        },
    )


@torch.no_grad()
def _distance(
    model: Any, layers: dict[str, FittedLayer], evaluation: Sequence[PackedSequence]
) -> tuple[float, float]:
    divergence, same, count = 0.0, 0, 0
    for row in evaluation:
        batch = batch_of([row])
        log_p = model(**batch, use_cache=False).logits.float().log_softmax(-1)
        with predictors_on(model, layers):
            log_q = model(**batch, use_cache=False).logits.float().log_softmax(-1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        count += len(row.input_ids)
    return divergence / count, same / count


def _save(layers: dict[str, FittedLayer], report: PredictorReport, output: Path) -> None:
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.pred_a.weight"] = layer.predictor.a.weight.contiguous()
        tensors[f"{name}.pred_b.weight"] = layer.predictor.b.weight.contiguous()
        tensors[f"{name}.pred_threshold"] = torch.tensor([layer.threshold])
    save_file(tensors, output / PREDICTOR_FILE)
    (output / REPORT_FILE).write_text(json.dumps(dataclasses.asdict(report), indent=1), encoding="utf-8")
