"""Predictors of candidates in a model file: what a file has, adding them, and how good they proved to be.

The definitions are in docs/format.md; ``turbosparse.predict`` fits predictors.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import ModelFileError
from turbosparse.runtime.model_file import KEY_ACTIVATION_PARAM, KEY_PREDICTOR, ModelFile
from turbosparse.runtime.model_file_copy import copy_with, transposed_down, with_activation
from turbosparse.runtime.model_file_writer import TensorSource
from turbosparse.runtime.sparse_file import default_down_type

if TYPE_CHECKING:
    from turbosparse._native import ModelInfo

__all__ = [
    "CandidateQuality",
    "LayerPredictor",
    "PredictorInput",
    "PredictorKind",
    "Predictors",
    "StoredPredictor",
    "add_predictors",
    "candidate_quality",
    "predictor_metadata",
    "predictor_tensors",
    "read_predictors",
]

PredictorKind = Literal["low_rank", "sign"]
PredictorInput = Literal["ffn_norm", "residual"]
_PARTS = ("ffn_pred_a.weight", "ffn_pred_b.weight", "ffn_pred_hot")


@dataclass(frozen=True, kw_only=True)
class LayerPredictor:
    """The predictor of one layer, to be written."""

    threshold: float
    """Neurons with a score of at least this are candidates."""
    a: NDArray[np.floating[Any]] | None = None
    """First layer, [R, D]; None for sign predictors."""
    b: NDArray[np.floating[Any]] | None = None
    """Second layer, [F, R]; None for sign predictors."""
    hot: NDArray[np.integer[Any]] | None = None
    """Neurons that are candidates whatever their score, ascending; None for none."""


@dataclass(frozen=True, kw_only=True)
class Predictors:
    """The predictors of a model, to be written."""

    kind: PredictorKind
    """How scores are computed."""
    reads: PredictorInput
    """The state they are computed from: the FFN's input after its norm, or the residual before it."""
    layers: Sequence[LayerPredictor]
    """One per layer."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """For people: how they were fitted, what they reached; names without ``turbosparse.predictor.``."""


@dataclass(frozen=True, kw_only=True)
class StoredPredictor:
    """The predictor of one layer as a file has it."""

    threshold: float
    rank: int | None
    """R; None for sign predictors."""
    types: tuple[str, ...]
    """Types of the tensors; empty for sign predictors."""
    nbytes: int
    """What is read to name the candidates of a token: both tensors, or a bit per weight."""
    hot: int
    """Number of neurons that are always candidates."""


@dataclass(frozen=True, kw_only=True)
class CandidateQuality:
    """How good candidates were, over layers and tokens."""

    candidate_ratio: float
    """Candidates per neuron, 0 to 1."""
    recall: float
    """Share of the neurons worth computing, by the mode's thresholds, that were candidates."""
    precision: float
    """Share of the candidates that were worth computing."""


def predictor_tensors(predictors: Predictors, *, type_name: str = "Q8_0") -> list[TensorSource]:
    """Make the tensors of predictors.

    Parameters
    ----------
    predictors : Predictors
        Of all layers.
    type_name : str, optional
        Weight type of both matrices: F32, F16, BF16, Q8_0 or Q4_0.

    Returns
    -------
    list of TensorSource
        ``blk.N.ffn_pred_*``, layer by layer.

    Raises
    ------
    ModelFileError
        When a rank or D does not fit the type.
    """
    tensors = []
    for layer, predictor in enumerate(predictors.layers):
        for name, matrix in zip(_PARTS[:2], (predictor.a, predictor.b), strict=True):
            if matrix is not None:
                tensors.append(TensorSource.of_array(f"blk.{layer}.{name}", matrix, type_name))
                _ = tensors[-1].nbytes  # refuses a rank that does not fit before anything is written
        if predictor.hot is not None and len(predictor.hot):
            name, hot = f"blk.{layer}.{_PARTS[2]}", np.asarray(predictor.hot, np.int32)
            tensors.append(TensorSource(name=name, type_name="I32", shape=hot.shape, read=hot.copy))
    return tensors


def predictor_metadata(predictors: Predictors) -> dict[str, Any]:
    """Make the keys of predictors.

    Parameters
    ----------
    predictors : Predictors
        Of all layers.

    Returns
    -------
    dict
        Keys and values for `write_model_file`.
    """
    keys: dict[str, Any] = {
        **predictors.record,
        "kind": predictors.kind,
        "input": predictors.reads,
        "threshold": [float(layer.threshold) for layer in predictors.layers],
    }
    return {f"{KEY_PREDICTOR}{name}": value for name, value in keys.items()}


def add_predictors(
    source: ModelFile,
    path: str | os.PathLike[str],
    predictors: Predictors,
    *,
    type_name: str = "Q8_0",
    overwrite: bool = False,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Write a copy of a model file with predictors, in place of those that it has.

    Parameters
    ----------
    source : ModelFile
        Where everything else comes from; a plain file gets its down projections transposed.
    path : str or os.PathLike
        The new file.
    predictors : Predictors
        Of all layers.
    type_name : str, optional
        Weight type of the predictors' matrices: F32, F16, BF16, Q8_0 or Q4_0.
    overwrite : bool, optional
        Whether a file at ``path`` may be replaced.
    progress : callable, optional
        Called with the bytes of each tensor written.

    Raises
    ------
    ModelFileError
        When predictors do not fit the model, or as for `write_model_file`.
    """
    activation = source.activation
    if activation is None:
        raise ModelFileError(f"[{source.path}] expected a known activation, got none stated")
    _check(source, predictors)
    layers = range(source.num_hidden_layers)
    tensors = predictor_tensors(predictors, type_name=type_name)
    drop = {f"blk.{layer}.{part}" for layer in layers for part in _PARTS}
    if not source.neuron_major_down:
        tensors += [transposed_down(source, layer, default_down_type(source)) for layer in layers]
        drop |= {f"blk.{layer}.ffn_down.weight" for layer in layers}
    kept = {
        key: value for key, value in source.stored_metadata().items() if not key.startswith(KEY_PREDICTOR)
    }
    parameter = source.metadata.get(KEY_ACTIVATION_PARAM)
    metadata = with_activation(kept, activation, parameter=parameter, gated=source.gated)
    metadata |= predictor_metadata(predictors)
    copy_with(
        source, path, metadata=metadata, tensors=tensors, drop=drop, overwrite=overwrite, progress=progress
    )


def read_predictors(file: ModelFile) -> list[StoredPredictor]:
    """Describe the predictors of a file, without those of shared experts.

    Parameters
    ----------
    file : ModelFile
        The file.

    Returns
    -------
    list of StoredPredictor
        One per layer, of all its experts together; empty where the file has none.

    Raises
    ------
    ModelFileError
        When there are too few or too many thresholds, or a tensor is missing.
    """
    if f"{KEY_PREDICTOR}kind" not in file.metadata:
        return []
    key, layers = f"{KEY_PREDICTOR}threshold", file.num_hidden_layers
    thresholds = file.metadata.get(key)
    suffix = "_exps" if file.num_experts else ""
    per_layer = max(file.num_experts, 1) + ("blk.0.ffn_up_shexp.weight" in file.tensors)
    expected = layers * per_layer
    if not isinstance(thresholds, list) or len(thresholds) != expected:
        got = len(thresholds) if isinstance(thresholds, list) else thresholds
        raise ModelFileError(f"[{file.path}: key {key!r}] expected {expected} numbers, got {got}")
    sign = file.string(f"{KEY_PREDICTOR}kind") == "sign"
    described = []
    for layer, threshold in enumerate(thresholds[::per_layer]):
        block = f"blk.{layer}.ffn_pred_"
        parts = [] if sign else [file.tensor(f"{block}{part}{suffix}.weight") for part in "ab"]
        rows = max(file.num_experts, 1) * (2 if file.activation == "drelu" else 1)
        bits = rows * file.intermediate_size * -(-file.hidden_size // 64) * 8
        hot = file.tensors.get(f"{block}hot{suffix}")
        described.append(
            StoredPredictor(
                threshold=threshold,
                rank=None if sign else parts[0].shape[-2],
                types=tuple(dict.fromkeys(part.type_name for part in parts)),
                nbytes=bits if sign else sum(part.nbytes for part in parts),
                hot=hot.shape[0] if hot is not None else 0,
            )
        )
    return described


def candidate_quality(counters: Mapping[str, Any], info: "ModelInfo") -> CandidateQuality | None:
    """Compute how good the candidates of a session were.

    Parameters
    ----------
    counters : mapping
        `Session.counters`, over tokens that came in batches of more than one: only these are computed in
        full, so that one can tell what was missed.
    info : turbosparse._native.ModelInfo
        The model's shape.

    Returns
    -------
    CandidateQuality or None
        None where no token came in a batch in predicted mode, or no neuron was worth computing.
    """
    tokens = counters["tokens"] * info.num_hidden_layers * info.token_neurons
    candidates, wanted = sum(counters["candidates"]), sum(counters["wanted"])
    if not wanted:
        return None
    return CandidateQuality(
        candidate_ratio=candidates / tokens,
        recall=sum(counters["found"]) / wanted,
        precision=sum(counters["active"]) / candidates if candidates else 0.0,
    )


def _check(source: ModelFile, predictors: Predictors) -> None:
    """Refuse predictors that the engine would refuse, before anything is written."""
    source.require_no_experts("predictors")
    layers, neurons, width = source.num_hidden_layers, source.intermediate_size, source.hidden_size
    if len(predictors.layers) != layers:
        got = len(predictors.layers)
        raise ModelFileError(f"[predictors] expected one for each of {layers} layers, got {got}")
    sign = predictors.kind == "sign"
    for layer, predictor in enumerate(predictors.layers):
        place = f"predictor of layer {layer}"
        if not np.isfinite(predictor.threshold):
            raise ModelFileError(f"[{place}] expected a finite threshold, got {predictor.threshold}")
        shapes = tuple(None if matrix is None else matrix.shape for matrix in (predictor.a, predictor.b))
        rank = shapes[0][0] if shapes[0] else 0
        expected = (None, None) if sign else ((rank, width), (neurons, rank))
        if shapes != expected:
            wanted = "no matrices" if sign else f"matrices of shape (R, {width}) and ({neurons}, R)"
            raise ModelFileError(f"[{place}] expected {wanted}, got {shapes[0]} and {shapes[1]}")
        hot = np.asarray(predictor.hot if predictor.hot is not None else [], np.int64)
        if hot.size and not (hot[0] >= 0 and hot[-1] < neurons and np.all(np.diff(hot) > 0)):
            raise ModelFileError(f"[{place}] expected ascending hot neurons below {neurons}, got others")
