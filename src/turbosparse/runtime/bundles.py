"""Bundles: the rows of gate, up and down_t of a neuron side by side, so that one read from disk brings it.

docs/format.md is the definition. Neurons may change places, since an FFN's output is a sum over them; then
the hottest come first, which is what the engine keeps in memory.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from turbosparse import _native
from turbosparse.errors import ModelFileError
from turbosparse.runtime.model_file import KEY_BUNDLE
from turbosparse.runtime.model_file_writer import ALIGNMENT, TensorSource

__all__ = ["BUNDLES", "bundled"]

BUNDLES = "ffn_bundles"
DISK_BLOCK = 4096  # bytes; clusters of neurons begin and end at multiples of it
_PART_ALIGNMENT = 16
_PARTS = {"gate": "ffn_gate.weight", "up": "ffn_up.weight", "down_t": "ffn_down_t.weight"}
_NATIVE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
# Tensors whose rows belong to neurons and that stay outside of the bundles.
_PER_NEURON = ("ffn_gate.weight", "ffn_threshold", "ffn_gate_threshold", "ffn_pred_b.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.(ffn_.*)")


def bundled(
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorSource],
    *,
    gate_apart: bool = False,
    hotness: Sequence[NDArray[np.floating[Any]]] | None = None,
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
    hotness : sequence of float array, shape (F,), optional
        Per layer, the share of tokens that need each neuron; neurons are sorted by it.

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
    layers: dict[int, dict[str, TensorSource]] = defaultdict(dict)
    for tensor in tensors:
        if match := _BLOCK.fullmatch(tensor.name):
            layers[int(match[1])][match[2]] = tensor
    parts = _checked_parts(layers, metadata, gate_apart=gate_apart)
    types = {name: layers[0][_PARTS[name]].type_name for name in parts}
    D = layers[0]["ffn_up.weight"].shape[-1]
    row_bytes, cluster = _file_layout(types, D)
    keys = dict(metadata) | {
        ALIGNMENT: DISK_BLOCK,
        f"{KEY_BUNDLE}parts": list(types),
        f"{KEY_BUNDLE}types": list(types.values()),
        f"{KEY_BUNDLE}bytes": row_bytes,
        f"{KEY_BUNDLE}cluster": cluster,
    }
    inside = {_PARTS[name] for name in parts}
    made: list[TensorSource] = []
    for tensor in tensors:
        match = _BLOCK.fullmatch(tensor.name)
        if match is None:
            made.append(tensor)
            continue
        number, part = int(match[1]), match[2]
        order = None if hotness is None else np.argsort(-np.asarray(hotness[number]), kind="stable")
        if part == _PARTS["down_t"]:
            rows = [layers[number][_PARTS[name]] for name in parts]
            made.append(_bundles(f"blk.{number}.{BUNDLES}", rows, row_bytes, order))
            if hotness is not None and order is not None:
                sorted_values = np.asarray(hotness[number], np.float32)[order]
                made.append(TensorSource.of_array(f"blk.{number}.ffn_hotness", sorted_values))
        elif part not in inside:
            made.append(_reordered(tensor, part, order))
    return keys, made


def _checked_parts(
    layers: Mapping[int, Mapping[str, TensorSource]], metadata: Mapping[str, Any], *, gate_apart: bool
) -> list[str]:
    place = "bundled layout"
    if f"{KEY_BUNDLE}parts" in metadata:
        raise ModelFileError(f"[{place}] expected a file without bundles, got one that has them")
    kind = metadata.get("turbosparse.predictor.kind")
    if getattr(kind, "value", kind) == "sign":
        raise ModelFileError(f"[{place}] expected low_rank predictors, got those of signs")
    gated = "ffn_gate.weight" in layers.get(0, {})
    parts = [name for name in _PARTS if name != "gate" or (gated and not gate_apart)]
    for number, layer in sorted(layers.items()):
        for name in parts:
            tensor = layer.get(_PARTS[name])
            at = f"{place}: blk.{number}.{_PARTS[name]}"
            if tensor is None:
                expected = "a file that can skip neurons (turbosparse calibrate or export --predictor)"
                raise ModelFileError(f"[{at}] expected {expected}, got no such tensor")
            own = layers[0][_PARTS[name]].type_name
            if tensor.type_name not in _NATIVE_TYPES or tensor.type_name != own:
                expected = f"the same one of {', '.join(_NATIVE_TYPES)} in all layers"
                raise ModelFileError(f"[{at}] expected {expected}, got {tensor.type_name} (see --type)")
            if tensor.shape[0] % 32 != 0:
                raise ModelFileError(f"[{at}] expected a multiple of 32 neurons, got {tensor.shape[0]}")
    return parts


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
    F = parts[0].shape[0]

    def read() -> NDArray[np.uint8]:
        out = np.zeros((F, row_bytes), np.uint8)
        at = 0
        for part in parts:
            data = np.ascontiguousarray(part.read()).view(np.uint8).reshape(-1)
            rows = _native.pack_rows(GGMLQuantizationType[part.type_name].value, data, part.shape[1])
            out[:, at : at + rows.shape[1]] = rows if order is None else rows[order]
            at += -(-rows.shape[1] // _PART_ALIGNMENT) * _PART_ALIGNMENT
        return out

    return TensorSource(name=name, type_name="I8", shape=(F, row_bytes), read=read)


def _reordered(tensor: TensorSource, part: str, order: NDArray[np.intp] | None) -> TensorSource:
    """The tensor with its neurons in their new places."""
    if order is None or part not in (*_PER_NEURON, "ffn_pred_hot"):
        return tensor
    new_order = order

    def read() -> NDArray[Any]:
        data = np.ascontiguousarray(tensor.read()).view(np.uint8)
        if part != "ffn_pred_hot":
            return data.reshape(tensor.shape[0], -1)[new_order]
        places = np.empty(len(new_order), np.int32)
        places[new_order] = np.arange(len(new_order), dtype=np.int32)
        return np.sort(places[data.reshape(-1).view(np.int32)])

    return TensorSource(name=tensor.name, type_name=tensor.type_name, shape=tensor.shape, read=read)
