"""Making a model file out of another: what calibration and export change, everything else bit by bit."""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import ModelFileError
from turbosparse.runtime.model_file import (
    ACTIVATIONS,
    ARCHITECTURE_PREFIX,
    ARCHITECTURES,
    EXPERT_NORM,
    FORMAT_VERSION,
    KEY_ACTIVATION,
    KEY_ACTIVATION_PARAM,
    KEY_ARCHITECTURE,
    KEY_GATED,
    KEY_VERSION,
    ModelFile,
    plain_value,
)
from turbosparse.runtime.model_file_writer import TensorSource, quantised, write_model_file

__all__ = ["copy_with", "transposed_down", "with_activation"]


def transposed_down(source: ModelFile, layer: int, type_name: str, *, suffix: str = "") -> TensorSource:
    """Turn a layer's ``ffn_down`` into ``ffn_down_t``, one row per neuron.

    Parameters
    ----------
    source : ModelFile
        A file with ``ffn_down``.
    layer : int
        Index of the block.
    type_name : str
        Type to store: F32, F16, BF16, Q8_0 or Q4_0.
    suffix : str, optional
        ``_exps`` for the experts of the layer, ``_shexp`` for its shared one.

    Returns
    -------
    TensorSource
        ``blk.N.ffn_down_t.weight`` of shape (F, D), of experts (E, F, D). Dequantised, transposed and
        quantised when it is written: needs 12 bytes per weight of one FFN at that moment.

    Raises
    ------
    ModelFileError
        When the layer has no such tensor, or D does not fit the type.
    """
    name = f"blk.{layer}.ffn_down{suffix}.weight"
    *experts, columns, neurons = source.tensor(name).shape

    def _read() -> NDArray[Any]:
        if not experts:
            return quantised(source.dequantised(name).T, type_name)
        return np.stack(
            [quantised(source.dequantised(name, expert=e).T, type_name) for e in range(experts[0])]
        )

    made = TensorSource(
        name=f"blk.{layer}.ffn_down_t{suffix}.weight",
        type_name=type_name,
        shape=(*experts, neurons, columns),
        read=_read,
    )
    _ = made.nbytes  # refuses a type that does not fit before anything is written
    return made


def with_activation(
    metadata: Mapping[str, Any], activation: str, *, parameter: float | None = None, gated: bool = True
) -> dict[str, Any]:
    """State which activation a model has, so that no reader computes another one.

    A file whose activation is not the one its architecture implies gets the architecture
    ``turbosparse-<name>`` and its keys under that prefix; readers that know nothing of activations refuse
    it.

    Parameters
    ----------
    metadata : mapping
        Keys of the model, with ``general.architecture``.
    activation : str
        silu, gelu, relu, relu2, fatrelu or drelu.
    parameter : float, optional
        FATReLU's threshold.
    gated : bool, optional
        Whether there is a gate projection.

    Returns
    -------
    dict
        All keys, renamed where needed, and the ``turbosparse.*`` ones.

    Raises
    ------
    ModelFileError
        When the activation is unknown, or FATReLU comes without its threshold.
    """
    if activation not in ACTIVATIONS:
        raise ModelFileError(f"[activation] expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if (activation == "fatrelu") != (parameter is not None):
        raise ModelFileError(
            f"[activation] expected a parameter for fatrelu alone, got {activation}, {parameter}"
        )
    written = str(plain_value(metadata[KEY_ARCHITECTURE]))
    base = written.removeprefix(ARCHITECTURE_PREFIX)
    implied = ARCHITECTURES.get(base) == activation and f"{written}.{EXPERT_NORM}" not in metadata
    architecture = base if implied else ARCHITECTURE_PREFIX + base
    renamed = {
        architecture + key.removeprefix(written) if key.startswith(written + ".") else key: value
        for key, value in metadata.items()
    }
    renamed |= {KEY_ARCHITECTURE: architecture, KEY_VERSION: FORMAT_VERSION, KEY_ACTIVATION: activation}
    renamed[KEY_GATED] = gated
    renamed.pop(KEY_ACTIVATION_PARAM, None)
    if parameter is not None:
        renamed[KEY_ACTIVATION_PARAM] = float(parameter)
    return renamed


def copy_with(
    source: ModelFile,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Iterable[TensorSource] = (),
    drop: Collection[str] = (),
    overwrite: bool = False,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Write a copy of a model file with some tensors and keys changed.

    Parameters
    ----------
    source : ModelFile
        Where everything else comes from, bit by bit.
    path : str or os.PathLike
        The new file; it may be the source's own path when ``overwrite`` is set.
    metadata : mapping, optional
        All keys to write; by default the source's. Start from ``source.stored_metadata()``.
    tensors : iterable of TensorSource, optional
        One with a name that the source has takes its place; others follow the last tensor of their block.
    drop : collection of str, optional
        Names to leave out.
    overwrite : bool, optional
        Whether a file at ``path`` may be replaced.
    progress : callable, optional
        Called with the bytes of each tensor written.

    Raises
    ------
    ModelFileError
        As for `write_model_file`.
    """
    keys = source.stored_metadata() if metadata is None else metadata
    merged = _merged(source, list(tensors), drop)
    write_model_file(path, keys, merged, overwrite=overwrite, progress=progress)


def _merged(source: ModelFile, changed: Sequence[TensorSource], drop: Collection[str]) -> list[TensorSource]:
    kept = {name: TensorSource.of_file(source, name) for name in source.tensors if name not in drop}
    merged = kept | {tensor.name: tensor for tensor in changed}
    blocks: dict[str, int] = {}
    for place, name in enumerate(source.tensors):
        blocks[_block(name)] = place
    places = {name: place for place, name in enumerate(source.tensors)}
    end = len(places)
    # Sorting is stable, so tensors added to one block keep the order in which they were given.
    return sorted(merged.values(), key=lambda t: places.get(t.name, blocks.get(_block(t.name), end)))


def _block(name: str) -> str:
    """``"blk.3."`` for tensors of block 3; the whole name for tensors of no block."""
    parts = name.split(".", 2)
    return ".".join(parts[:2]) + "." if parts[0] == "blk" and len(parts) == 3 else name
