"""Predictors of candidates in a model file: what a file has, adding them, and how good they proved to be.

The definitions are in docs/format.md; ``turbosparse.predict`` fits predictors.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import ModelFileError
from turbosparse.runtime.ffns import FFN, ffn_groups, ffns_of
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
_HOT = "ffn_pred_hot"
_TENSOR = re.compile(r"blk\.\d+\.ffn_pred_([ab](_exps|_shexp)?\.weight|hot(_exps|_shexp)?)")


@dataclass(frozen=True, kw_only=True)
class LayerPredictor:
    """The predictor of one FFN, to be written."""

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
    """One per layer; with experts one per expert: layer by layer, its experts, then the shared one."""
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


def predictor_tensors(
    predictors: Predictors, ffns: Sequence[FFN], *, type_name: str = "Q8_0"
) -> list[TensorSource]:
    """Make the tensors of predictors.

    Parameters
    ----------
    predictors : Predictors
        Of all FFNs.
    ffns : sequence of FFN
        What they are for. Experts of a layer share tensors, so their predictors have one rank.
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
    own = dict(zip(ffns, predictors.layers, strict=True))
    for group in ffn_groups(ffns):
        first = group[0]
        for part, matrices in (
            ("pred_a", [own[ffn].a for ffn in group]),
            ("pred_b", [own[ffn].b for ffn in group]),
        ):
            stored = [np.asarray(matrix) for matrix in matrices if matrix is not None]
            if stored:
                values = stored[0] if first.expert is None else np.stack(stored)
                tensors.append(TensorSource.of_array(first.tensor(part), values, type_name))
                _ = tensors[-1].nbytes  # refuses a rank that does not fit before anything is written
        # Hot neurons of experts are numbered through, those of a shared expert by themselves.
        hot = np.concatenate([ffn.first_neuron - first.first_neuron + _hot(own[ffn]) for ffn in group])
        if len(hot):
            name = f"blk.{first.layer}.{_HOT}{first.suffix}"
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
        Of all FFNs.
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
    ffns = ffns_of(source)
    _check(source, predictors, ffns)
    tensors = predictor_tensors(predictors, ffns, type_name=type_name)
    drop = {name for name in source.tensors if _TENSOR.fullmatch(name)}
    if not source.neuron_major_down:
        down_type = default_down_type(source)
        for first, *_ in ffn_groups(ffns):
            tensors.append(transposed_down(source, first.layer, down_type, suffix=first.suffix))
            drop.add(first.tensor("down"))
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
    per_layer = max(file.num_experts, 1) + (file.shared_intermediate_size > 0)
    expected = layers * per_layer
    if not isinstance(thresholds, list) or len(thresholds) != expected:
        got = len(thresholds) if isinstance(thresholds, list) else thresholds
        raise ModelFileError(f"[{file.path}: key {key!r}] expected {expected} numbers, got {got}")
    sign = file.string(f"{KEY_PREDICTOR}kind") == "sign"
    described = []
    for layer, threshold in enumerate(thresholds[::per_layer]):
        block = f"blk.{layer}.ffn_pred_"
        parts = [] if sign else [file.tensor(f"{block}{part}{suffix}.weight") for part in "ab"]
        for part in parts:
            if len(part.shape) < 2:
                raise ModelFileError(f"[{file.path}] expected a matrix {part.name!r}, got shape {part.shape}")
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


def _hot(predictor: LayerPredictor) -> NDArray[np.int32]:
    return np.asarray(predictor.hot if predictor.hot is not None else [], np.int32)


def _check(source: ModelFile, predictors: Predictors, ffns: Sequence[FFN]) -> None:
    """Refuse predictors that the engine would refuse, before anything is written."""
    width = source.hidden_size
    if len(predictors.layers) != len(ffns):
        each = "experts" if source.num_experts else "layers"
        got = len(predictors.layers)
        raise ModelFileError(f"[predictors] expected one for each of {len(ffns)} {each}, got {got}")
    sign = predictors.kind == "sign"
    ranks: dict[tuple[int, str], int] = {}
    for ffn, predictor in zip(ffns, predictors.layers, strict=True):
        place, neurons = f"predictor of {ffn.name}", ffn.neurons
        if not np.isfinite(predictor.threshold):
            raise ModelFileError(f"[{place}] expected a finite threshold, got {predictor.threshold}")
        shapes = tuple(None if matrix is None else matrix.shape for matrix in (predictor.a, predictor.b))
        rank = shapes[0][0] if shapes[0] else 0
        expected = (None, None) if sign else ((rank, width), (neurons, rank))
        if shapes != expected:
            wanted = "no matrices" if sign else f"matrices of shape (R, {width}) and ({neurons}, R)"
            raise ModelFileError(f"[{place}] expected {wanted}, got {shapes[0]} and {shapes[1]}")
        if (other := ranks.setdefault((ffn.layer, ffn.suffix), rank)) != rank:
            raise ModelFileError(f"[{place}] expected rank {other} as of its layer's experts, got {rank}")
        hot = _hot(predictor).astype(np.int64)
        if hot.size and not (hot[0] >= 0 and hot[-1] < neurons and np.all(np.diff(hot) > 0)):
            raise ModelFileError(f"[{place}] expected ascending hot neurons below {neurons}, got others")
