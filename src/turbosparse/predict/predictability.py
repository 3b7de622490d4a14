"""How well a model's active neurons can be told beforehand: recall curves of predictors of equal bytes."""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from turbosparse.errors import ConfigError
from turbosparse.measure.hugging_face import HuggingFaceModel
from turbosparse.models.gated_ffn import GatedFFN, gated_ffns
from turbosparse.predict.capture import CapturedFFNs, CapturedInputs, capture_inputs
from turbosparse.predict.config import PredictorConfig
from turbosparse.predict.fit import fit_low_rank, rows_of
from turbosparse.predict.layers import BYTES_PER_WEIGHT, FFNLayer, layers_of
from turbosparse.predict.predictors import Predictor, SignBitPredictor
from turbosparse.sparsity.cett import activation_ratio, neuron_output_norms
from turbosparse.sparsity.jackknife import Estimate
from turbosparse.sparsity.quality import cut_windows
from turbosparse.sparsity.recall import recall_curve

__all__ = ["check_predictable", "predictability", "recall_curves"]

logger = logging.getLogger(__name__)

_SPARSITIES = tuple(round(0.05 * step, 2) for step in range(21))
_HELD_OUT = 512  # tokens the curves are drawn on, the last ones, but at most a fourth of what there is
_FEWEST_TOKENS = 8  # of an FFN that is fitted: fewer leave less than two held out, and no standard error
_RUNS = 8  # of held-out tokens, for standard errors
_STEPS = 300
_TYPE = "F16"  # of a low-rank predictor's weights; a sign is a bit
_INPUT = "ffn_norm"


class _TorchFFNs:
    """The dense FFNs of a Hugging Face model on a text."""

    def __init__(self, source: HuggingFaceModel, windows: Sequence[NDArray[np.int32]]) -> None:
        check_predictable(source)
        dense = _dense_ffns(source)
        self._model, self._windows = source.model, windows
        self.layers = {name: layer for name, layer in layers_of(source.model, _TYPE).items() if name in dense}

    def capture(self, directory: Path, inputs: Sequence[str]) -> Mapping[str, CapturedInputs]:
        batches = ({"input_ids": torch.from_numpy(ids[None].astype(np.int64))} for ids in self._windows)
        return capture_inputs(self._model, batches, directory, inputs)


def _dense_ffns(source: HuggingFaceModel) -> set[str]:
    return {name for name, ffn in gated_ffns(source.model).items() if isinstance(ffn, GatedFFN)}


def check_predictable(source: HuggingFaceModel) -> None:
    """Refuse a model without dense FFNs.

    Parameters
    ----------
    source : HuggingFaceModel
        The model.

    Raises
    ------
    ConfigError
        When all its FFNs are experts.
    """
    if not _dense_ffns(source):
        name = source.description["name"]
        raise ConfigError(
            f"[predictability: {name}] expected dense FFNs, got experts alone; as a model file (GGUF) it can "
            "be asked"
        )


def predictability(
    source: HuggingFaceModel,
    text: str,
    record: dict[str, Any],
    *,
    layers: int,
    advance: Callable[[float], None] = lambda share: None,
) -> list[dict[str, Any]]:
    """Draw the recall curves of a Hugging Face model; see `recall_curves`.

    Parameters
    ----------
    source : HuggingFaceModel
        The model.
    text : str
        What it was measured on.
    record : dict
        Its measurement: which neurons are active, how much text; FFNs left out are told in its notes.
    layers : int
        Layers to fit, evenly spread over the model, at least 1.
    advance : callable, optional
        Told shares of the work, 1 in all.

    Returns
    -------
    list of dict
        As `recall_curves` returns it.

    Raises
    ------
    ConfigError
        When the model has no dense FFN.
    """
    units = [unit for unit, description in enumerate(source.units) if description.expert is None]
    windows = cut_windows(
        source.text_ids(text)[: record["text"]["tokens"]], record["text"]["context"], source.bos_id
    )
    return recall_curves(_TorchFFNs(source, windows), units, record, layers=layers, advance=advance)


def recall_curves(
    ffns: CapturedFFNs,
    units: Sequence[int],
    record: dict[str, Any],
    *,
    layers: int,
    advance: Callable[[float], None] = lambda share: None,
) -> list[dict[str, Any]]:
    """Draw recall curves of a low-rank and of a sign-bit predictor of equal bytes, for some layers.

    Parameters
    ----------
    ffns : CapturedFFNs
        The FFNs, in order of depth, and the text that was measured.
    units : sequence of int
        For each, which unit of the measurement it is.
    record : dict
        The measurement: which neurons are active. Its notes are told which FFNs are left out, since fewer
        than 8 tokens reached them.
    layers : int
        Layers to fit, evenly spread over the model, at least 1.
    advance : callable, optional
        Told shares of the work, 1 in all.

    Returns
    -------
    list of dict
        Per layer and predictor: ``name``, ``predictor``, ``bytes`` it reads per token, ``active_share``,
        ``sparsity`` predicted, ``recall`` there and ``recall_se``, its standard error.

    Notes
    -----
    Signs of the gate's rows (and of up's, where that is rectified too) cost one bit per weight [1]_; the
    rank is chosen so that Linear(D, R), ReLU, Linear(R, F) with 16-bit weights has as many bytes. It is
    fitted on the text but for its last 512 tokens, on which both are judged.

    References
    ----------
    .. [1] Shin et al., "SparseInfer", arXiv:2411.12692.
    """
    names = list(ffns.layers)
    last = len(names) - 1
    chosen = sorted({round(last * (2 * at + 1) / (2 * layers)) for at in range(layers)})
    curves: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        captured = ffns.capture(Path(folder), (_INPUT,))
        for at in chosen:
            bound = _active_bound(record, units[at])
            name, inputs = record["units"][units[at]]["name"], captured[names[at]].open(_INPUT)
            if len(inputs) < _FEWEST_TOKENS:
                note = f"{name}: {len(inputs)} tokens reached it, too few to fit predictors"
                logger.warning("%s", note)
                record["notes"].append(note)
            else:
                drawn = _layer_curves(ffns.layers[names[at]], inputs, bound)
                curves += [{"name": name, **curve} for curve in drawn]
            advance(1 / len(chosen))
    return curves


def _active_bound(record: dict[str, Any], unit: int) -> float:
    """The norm from which on a neuron is active; the smallest where any that is not zero is."""
    active = record["config"]["active"]
    found = [entry["eps"] for entry in record["units"][unit]["thresholds"] if entry["target"] == active]
    return found[0] if found else float(np.finfo(np.float32).tiny)


def _layer_curves(layer: FFNLayer, inputs: NDArray[np.float16], bound: float) -> list[dict[str, Any]]:
    hidden_size, neurons = layer.down.shape
    signs = SignBitPredictor(layer)
    rank = max(1, round(signs.read_bytes("") / (BYTES_PER_WEIGHT[_TYPE] * (neurons + hidden_size))))
    config = PredictorConfig(ranks=(rank,), predictor_type=_TYPE, steps=_STEPS)
    held_out = min(_HELD_OUT, len(inputs) // 4)
    fitted = fit_low_rank(layer, {_INPUT: inputs[: len(inputs) - held_out]}, bound, config)
    x = rows_of(inputs, slice(len(inputs) - held_out, None))
    activations = layer.neurons(x).activations.numpy()
    active = neuron_output_norms(activations, layer.down.T.numpy()) >= np.float32(bound)
    predictors: list[tuple[str, Predictor]] = [("sign bits", signs)]
    predictors += [(f"low rank {rank}", predictor) for predictor in fitted.values()]
    curves = []
    for label, predictor in predictors:
        with torch.no_grad():
            recall = _recall(predictor(x).numpy(), active)
        curves.append(
            {
                "predictor": label,
                "bytes": predictor.read_bytes(_TYPE),
                "active_share": activation_ratio(active),
                "sparsity": list(_SPARSITIES),
                "recall": recall.value.tolist(),
                "recall_se": recall.standard_error.tolist(),
            }
        )
    return curves


def _recall(scores: NDArray[np.float32], active: NDArray[np.bool_]) -> Estimate:
    """The curve, and the same without each of some runs of neighbouring tokens."""
    runs = np.array_split(np.arange(len(scores)), min(_RUNS, len(scores)))
    return Estimate(
        value=recall_curve(scores, active, _SPARSITIES),
        replicates=np.stack(
            [
                recall_curve(np.delete(scores, run, axis=0), np.delete(active, run, axis=0), _SPARSITIES)
                for run in runs
            ]
        ),
    )
