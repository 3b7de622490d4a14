"""Weights in two parts of 4 bits: a first one for every neuron, and its rest for those that matter.

A matrix W becomes Q = Q4_0(W) and R = Q4_0(W - Q). Q + R is as close to W as 8 bits are, Q alone as close as
4 bits. Threshold mode computes all neurons with Q and adds R to the largest, so most neurons that are read at
all are read at half the bytes. Nested precisions in one copy of the weights: Any-Precision LLM,
arXiv:2402.10517; there a model is run at one of them, here each neuron of each token has its own.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from turbosparse.errors import ModelFileError
from turbosparse.runtime.model_file import ModelFile, dequantised
from turbosparse.runtime.model_file_writer import TensorSource, quantised

__all__ = ["PART_TYPE", "rest_name", "two_parts", "weights_in_parts"]

PART_TYPE = "Q4_0"


def rest_name(name: str) -> str:
    """Name the second part of a tensor.

    Parameters
    ----------
    name : str
        Of the first part, ``"blk.0.ffn_up.weight"``.

    Returns
    -------
    str
        ``"blk.0.ffn_up_rest.weight"``.

    Examples
    --------
    >>> rest_name("blk.0.ffn_up.weight")
    'blk.0.ffn_up_rest.weight'
    """
    return name.removesuffix(".weight") + "_rest.weight"


def two_parts(
    name: str, shape: tuple[int, ...], values: Callable[[], NDArray[np.float32]]
) -> list[TensorSource]:
    """Split a matrix into two parts of 4 bits.

    Parameters
    ----------
    name : str
        Name of the first part in the new file.
    shape : tuple of int
        (rows, columns); columns are a multiple of 32.
    values : callable
        Gives the matrix, float32 of that shape; called once per part, when that is written.

    Returns
    -------
    list of TensorSource
        The first part and its rest.

    Raises
    ------
    ModelFileError
        When the columns do not fit.

    Notes
    -----
    The rest of a block is at most half a level of the first part, so its own sixteen levels are sixteen times
    as fine: in all 9 bits per weight, and the error of 8.
    """

    parts = [
        TensorSource(name=name, type_name=PART_TYPE, shape=shape, read=partial(_first, values)),
        TensorSource(name=rest_name(name), type_name=PART_TYPE, shape=shape, read=partial(_rest, values)),
    ]
    _ = parts[0].nbytes  # refuses a shape that does not fit before anything is written
    return parts


def weights_in_parts(source: ModelFile) -> Iterator[TensorSource]:
    """Split gate, up, down and the output projection of a model, as far as they have more than 4 bits.

    Parameters
    ----------
    source : ModelFile
        The model. What it has in two parts already is left alone.

    Yields
    ------
    TensorSource
        ``ffn_gate``, ``ffn_up``, ``ffn_down_t`` of each layer and ``output``, with their rests. The output is
        made from ``token_embd`` where the file has no other; the embedding itself stays.
    """
    for layer in range(source.num_hidden_layers):
        block = f"blk.{layer}.ffn_"
        for projection in ("gate", "up", "down_t"):
            yield from _split(source, f"{block}{projection}.weight", f"{block}{projection}.weight")
        if not source.neuron_major_down:
            name = f"{block}down.weight"
            rows, columns = source.tensor(name).shape
            yield from two_parts(f"{block}down_t.weight", (columns, rows), partial(_transposed, source, name))
    own = "output.weight" in source.tensors
    yield from _split(source, "output.weight" if own else "token_embd.weight", "output.weight")


def _first(values: Callable[[], NDArray[np.float32]]) -> NDArray[np.uint8]:
    return np.asarray(quantised(values(), PART_TYPE), np.uint8)


def _rest(values: Callable[[], NDArray[np.float32]]) -> NDArray[np.uint8]:
    whole = values()
    first = dequantised(quantised(whole, PART_TYPE).reshape(-1), PART_TYPE, whole.shape)
    return np.asarray(quantised(whole - first, PART_TYPE), np.uint8)


def _transposed(source: ModelFile, name: str) -> NDArray[np.float32]:
    return source.dequantised(name).T


def _split(source: ModelFile, name: str, to: str) -> Iterator[TensorSource]:
    if name not in source.tensors or rest_name(to) in source.tensors:
        return
    tensor = source.tensor(name)
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.type_name]]
    if 8 * block_bytes / block <= 4.5:
        return
    if tensor.shape[-1] % 32 != 0:
        raise ModelFileError(f"[{name}] expected rows of a multiple of 32 values, got {tensor.shape[-1]}")
    yield from two_parts(to, tensor.shape, partial(source.dequantised, name))
