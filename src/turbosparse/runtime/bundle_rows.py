"""Bundles read as docs/format.md defines them, in plain NumPy: what the NumPy reference computes with."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.runtime.model_file import KEY_BUNDLE

__all__ = ["unbundled"]

_ALIGNMENT = 16  # bytes; where rows begin in a bundle
_BLOCK = 32  # weights that have one scale


def unbundled(
    metadata: Mapping[str, Any], name: str, bundles: NDArray[np.uint8], columns: int
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Take the matrices of an FFN out of its bundles.

    Parameters
    ----------
    metadata : mapping
        Keys of the file.
    name : str
        Name of the bundles' tensor, ``blk.N.ffn_bundles`` and what experts have behind it.
    bundles : uint8, shape (..., F, bytes)
        The tensor.
    columns : int
        Weights of a row, D.

    Yields
    ------
    tuple
        Name that the matrix has in a file without bundles, and its values, float32 of shape (..., F, D).
    """
    at = 0
    for part, kind in zip(metadata[f"{KEY_BUNDLE}parts"], metadata[f"{KEY_BUNDLE}types"], strict=True):
        values, used = _rows(bundles[..., at:], kind, columns)
        yield name.replace("ffn_bundles", f"ffn_{part}") + ".weight", values
        at += -(-used // _ALIGNMENT) * _ALIGNMENT


def _rows(data: NDArray[np.uint8], kind: str, columns: int) -> tuple[NDArray[np.float32], int]:
    """The row that each bundle begins with, and its bytes."""
    if kind == "BF16":
        bits = _as(data, 2 * columns, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32), 2 * columns
    if kind in ("F32", "F16"):
        size = columns * (4 if kind == "F32" else 2)
        return _as(data, size, np.float32 if kind == "F32" else np.float16).astype(np.float32), size
    if kind == "Q8_0":
        integers, used = _as(data, columns, np.int8), columns
    else:  # in a group of 32 bytes, the low halves are one block and the high halves the next
        used = -(-columns // (2 * _BLOCK)) * _BLOCK
        groups = data[..., :used].reshape(*data.shape[:-1], -1, 1, _BLOCK)
        halves = np.concatenate([groups & 15, groups >> 4], axis=-2).astype(np.int8) - 8
        integers = halves.reshape(*data.shape[:-1], -1)[..., :columns]
    scale_bytes = columns // _BLOCK * 2
    scales = _as(data[..., used:], scale_bytes, np.float16).astype(np.float32)
    return np.asarray(integers * np.repeat(scales, _BLOCK, axis=-1), np.float32), used + scale_bytes


def _as(data: NDArray[np.uint8], size: int, kind: type[np.generic]) -> NDArray[Any]:
    """The first bytes of each bundle as numbers."""
    return np.ascontiguousarray(data[..., :size]).view(kind)
