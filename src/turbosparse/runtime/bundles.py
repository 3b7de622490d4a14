"""Bundles: the rows of gate, up and down_t of a neuron side by side, so that one read from disk brings it.

docs/format.md is the definition. Neurons may change places, since an FFN's output is a sum over them; then
the hottest come first, which is what the engine keeps in memory.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from turbosparse import _native
from turbosparse.errors import ModelFileError
from turbosparse.runtime.model_file import KEY_BUNDLE, plain_value
from turbosparse.runtime.model_file_writer import ALIGNMENT, TensorSource

__all__ = ["BUNDLES", "bundled"]

BUNDLES = "ffn_bundles"
DISK_BLOCK = 4096  # bytes; clusters of neurons begin and end at multiples of it
_PART_ALIGNMENT = 16
_PARTS = ("gate", "up", "down_t")
_NATIVE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
# Tensors whose rows belong to neurons and that stay outside of the bundles.
_PER_NEURON = re.compile(
    r"blk\.(\d+)\.(?:ffn_gate|ffn_threshold|ffn_gate_threshold|ffn_pred_b|ffn_pred_hot)(_exps|_shexp|)(?:\.weight)?"
)
# The FFN of a block, its experts, and its shared expert.
_FFN_TENSOR = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down_t)(_exps|_shexp|)\.weight")


def bundled(
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorSource],
    *,
    gate_apart: bool = False,
    hotness: Mapping[tuple[int, str], NDArray[np.floating[Any]]] | None = None,
) -> tuple[dict[str, Any], list[TensorSource]]:
    """Put the rows of each neuron side by side.

    Parameters
    ----------
    metadata : mapping
        Keys of the model file.
    tensors : sequence of TensorSource
        Its tensors; every block has ``ffn_down_t``.
    gate_apart : bool
        Keep ``ffn_gate`` a tensor of its own, which stays in memory: modes without a predictor compute the
        gate of every neuron.
    hotness : mapping of float arrays, shape (F,) or (E, F), optional
        By layer and suffix (``""``, ``"_exps"`` or ``"_shexp"``), the share of tokens that need each neuron;
        the neurons of an FFN or expert are sorted by it.

    Returns
    -------
    dict
        The keys, with those of the bundles.
    list of TensorSource
        The tensors, ``ffn_bundles`` in place of what it holds.

    Raises
    ------
    ModelFileError
        When the model has no ``ffn_down_t`` or has bundles already, rows of a type that needs transcoding or
        that differ between layers, or predictors of signs.
    """
    groups: dict[tuple[int, str], dict[str, TensorSource]] = defaultdict(dict)
    for tensor in tensors:
        if match := _FFN_TENSOR.fullmatch(tensor.name):
            groups[int(match[1]), match[3]][match[2]] = tensor
    _check_model(metadata, tensors)
    types = _checked_types(groups, gate_apart=gate_apart)
    row_bytes, cluster = _file_layout(types, next(iter(groups.values()))["up"].shape[-1])
    keys = dict(metadata) | {
        ALIGNMENT: DISK_BLOCK,
        f"{KEY_BUNDLE}parts": list(types),
        f"{KEY_BUNDLE}types": list(types.values()),
        f"{KEY_BUNDLE}bytes": row_bytes,
        f"{KEY_BUNDLE}cluster": cluster,
    }
    orders = {key: _order(values) for key, values in (hotness or {}).items()}
    made: list[TensorSource] = []
    for tensor in tensors:
        if match := _FFN_TENSOR.fullmatch(tensor.name):
            key, part = (int(match[1]), match[3]), match[2]
            if part == "down_t":
                rows = [groups[key][name] for name in types]
                made.append(_bundles(f"blk.{key[0]}.{BUNDLES}{key[1]}", rows, row_bytes, orders.get(key)))
                if hotness is not None:
                    values = np.asarray(hotness[key], np.float32)
                    in_order = values.reshape(-1)[orders[key]].reshape(values.shape)
                    made.append(TensorSource.of_array(f"blk.{key[0]}.ffn_hotness{key[1]}", in_order))
                continue
            if part in types:
                continue
        match = _PER_NEURON.fullmatch(tensor.name)
        order = orders.get((int(match[1]), match[2])) if match else None
        made.append(tensor if order is None else _reordered(tensor, order))
    return keys, made


def _order(hotness: NDArray[np.floating[Any]]) -> NDArray[np.intp]:
    """The neurons of each FFN by hotness, those of experts numbered through: e F + i."""
    of_ffns = hotness.reshape(-1, hotness.shape[-1])
    order = np.argsort(-of_ffns, axis=1, kind="stable")
    return (order + np.arange(len(of_ffns))[:, None] * of_ffns.shape[1]).reshape(-1)


def _check_model(metadata: Mapping[str, Any], tensors: Sequence[TensorSource]) -> None:
    place = "bundled layout"
    if f"{KEY_BUNDLE}parts" in metadata:
        raise ModelFileError(f"[{place}] expected a file without bundles, got one that has them")
    if plain_value(metadata.get("turbosparse.predictor.kind")) == "sign":
        raise ModelFileError(f"[{place}] expected low_rank predictors, got those of signs")
    for tensor in tensors:
        if ".ffn_" in tensor.name and "_rest" in tensor.name:
            raise ModelFileError(f"[{place}] expected FFNs in one part, got {tensor.name}")


def _checked_types(
    groups: Mapping[tuple[int, str], Mapping[str, TensorSource]], *, gate_apart: bool
) -> dict[str, str]:
    """Type of each part, which is that of all FFNs."""
    place = "bundled layout"
    gated = any("gate" in group for group in groups.values())
    parts = [name for name in _PARTS if name != "gate" or (gated and not gate_apart)]
    types: dict[str, str] = {}
    if not groups:
        raise ModelFileError(f"[{place}] expected feed-forward layers, got none")
    for (number, suffix), group in sorted(groups.items()):
        for name in parts:
            at = f"{place}: blk.{number}.ffn_{name}{suffix}.weight"
            if name not in group:
                expected = "a file that can skip neurons (turbosparse calibrate or export --predictor)"
                raise ModelFileError(f"[{at}] expected {expected}, got no such tensor")
            tensor = group[name]
            own = types.setdefault(name, tensor.type_name)
            if tensor.type_name not in _NATIVE_TYPES or tensor.type_name != own:
                expected = f"the same one of {', '.join(_NATIVE_TYPES)} in all layers"
                raise ModelFileError(f"[{at}] expected {expected}, got {tensor.type_name} (see --type)")
            if tensor.shape[-2] % 32 != 0:
                raise ModelFileError(f"[{at}] expected a multiple of 32 neurons, got {tensor.shape[-2]}")
    return types


def _file_layout(types: Mapping[str, str], columns: int) -> tuple[int, int]:
    """Bytes of a bundle in the file, and neurons per cluster: as many as a disk block holds, at least one."""
    used = 0
    for type_name in types.values():
        row = _native.packed_row_bytes(type_name, columns)
        used += -(-row // _PART_ALIGNMENT) * _PART_ALIGNMENT
    cluster = 1
    while cluster < 32 and 2 * cluster * used <= DISK_BLOCK:
        cluster *= 2
    if cluster > 1:
        return DISK_BLOCK // cluster, cluster
    return -(-used // DISK_BLOCK) * DISK_BLOCK, 1


def _bundles(
    name: str, parts: Sequence[TensorSource], row_bytes: int, order: NDArray[np.intp] | None
) -> TensorSource:
    shape = (*parts[0].shape[:-1], row_bytes)

    def read() -> NDArray[np.uint8]:
        out = np.zeros((math.prod(shape[:-1]), row_bytes), np.uint8)
        at = 0
        for part in parts:
            data = np.ascontiguousarray(part.read()).view(np.uint8).reshape(-1)
            rows = _native.pack_rows(GGMLQuantizationType[part.type_name].value, data, part.shape[-1])
            out[:, at : at + rows.shape[1]] = rows if order is None else rows[order]
            at += -(-rows.shape[1] // _PART_ALIGNMENT) * _PART_ALIGNMENT
        return out

    return TensorSource(name=name, type_name="I8", shape=shape, read=read)


def _reordered(tensor: TensorSource, order: NDArray[np.intp]) -> TensorSource:
    """The tensor with its neurons in their new places."""

    def read() -> NDArray[Any]:
        data = np.ascontiguousarray(tensor.read()).view(np.uint8)
        if "ffn_pred_hot" not in tensor.name:
            return data.reshape(len(order), -1)[order].reshape(data.shape)
        places = np.empty(len(order), np.int32)
        places[order] = np.arange(len(order), dtype=np.int32)
        return np.sort(places[data.reshape(-1).view(np.int32)])

    return TensorSource(name=tensor.name, type_name=tensor.type_name, shape=tensor.shape, read=read)
