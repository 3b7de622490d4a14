"""Writing model files: tensor by tensor, beside the target, renamed when complete.

A file appears under its name only when every byte of it is on disk; whatever goes wrong before, Ctrl-C
included, leaves nothing behind. The bytes depend on metadata and tensors alone, so that writing what was read
gives an equal file.
"""

import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
    GGUFWriter,
)
from gguf.quants import quantize
from numpy.typing import NDArray

from turbosparse.errors import ModelFileError
from turbosparse.runtime.model_file import KEY_ARCHITECTURE, ModelFile, StoredValue, plain_value

__all__ = [
    "TensorSource",
    "check_output",
    "model_file_bytes",
    "quantised",
    "write_blank_file",
    "write_model_file",
]

logger = logging.getLogger(__name__)

ALIGNMENT = "general.alignment"
LONGEST_NAME = 64  # bytes of a tensor's name, by the GGUF specification
INTEGER_KINDS = (
    ("uint32", 0, 2**32),
    ("int32", -(2**31), 0),
    ("uint64", 0, 2**64),
    ("int64", -(2**63), 0),
)


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """A tensor to be written: what it is, and how to get its bytes when its turn comes."""

    name: str
    type_name: str  # ggml type, such as "F32" or "Q8_0"
    shape: tuple[int, ...]  # slowest dimension first, counted in values
    read: Callable[[], NDArray[Any]]  # called once; any dtype and shape, `nbytes` bytes in all

    @property
    def nbytes(self) -> int:
        """Size of the tensor in a file, in bytes."""
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.type_name]]
        if self.shape[-1] % block != 0:
            expected = f"rows of a multiple of {block} for {self.type_name}"
            raise ModelFileError(f"[{self.name}] expected {expected}, got {self.shape[-1]}")
        return int(math.prod(self.shape) // block * block_bytes)

    @classmethod
    def of_array(cls, name: str, values: NDArray[np.floating[Any]], type_name: str = "F32") -> "TensorSource":
        """Store an array.

        Parameters
        ----------
        name : str
            Name in the file.
        values : float array
            What to store; quantised when it is written.
        type_name : str, optional
            F32, F16, BF16, Q8_0, Q4_0, or another that the ``gguf`` package can write.

        Returns
        -------
        TensorSource
            Holds on to the array.
        """
        return cls(
            name=name,
            type_name=type_name,
            shape=values.shape,
            read=lambda: quantised(values, type_name),
        )

    @classmethod
    def of_file(cls, source: ModelFile, name: str) -> "TensorSource":
        """Copy a tensor of another file, bit by bit.

        Parameters
        ----------
        source : ModelFile
            Where it is.
        name : str
            Its name there and in the new file.

        Returns
        -------
        TensorSource
            Reads from the mapped file.
        """
        tensor = source.tensor(name)
        return cls(
            name=name,
            type_name=tensor.type_name,
            shape=tensor.shape,
            read=lambda: source.tensor_bytes(name),
        )


def quantised(values: NDArray[np.floating[Any]], type_name: str) -> NDArray[Any]:
    """Turn numbers into a tensor's bytes.

    Parameters
    ----------
    values : float array
        Rows last but one, in any memory order.
    type_name : str
        A ggml type that the ``gguf`` package can write.

    Returns
    -------
    array
        F32 and F16 as such, other types as uint8; `nbytes` bytes in file order.

    Raises
    ------
    ModelFileError
        When the package cannot write the type.
    """
    try:
        written = quantize(np.ascontiguousarray(values, np.float32), GGMLQuantizationType[type_name])
    except (KeyError, NotImplementedError) as error:
        raise ModelFileError(f"[tensor type] expected one that can be written, got {type_name}") from error
    return np.asarray(written)


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse a place where no file can be written, before hours of work are spent on its contents.

    Parameters
    ----------
    path : str or os.PathLike
        Where a file is to be written.
    overwrite : bool, optional
        Whether a file there may be replaced.

    Raises
    ------
    ModelFileError
        When something is there already, or the folder is missing or cannot be written to.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise ModelFileError(
            f"[{target}] expected a place for a file, got something that is not a regular file"
        )
    if target.exists() and not overwrite:
        raise ModelFileError(
            f"[{target}] expected a new file, got one that exists (--force, in Python overwrite, replaces it)"
        )
    if not target.parent.is_dir():
        raise ModelFileError(
            f"[{target}] expected a folder to write into, got no folder {str(target.parent)!r}"
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ModelFileError(f"[{target}] expected a folder that can be written to, got one that cannot")


def write_model_file(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Iterable[TensorSource],
    *,
    overwrite: bool = False,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Write a model file, or nothing.

    Parameters
    ----------
    path : str or os.PathLike
        The new file.
    metadata : mapping
        Keys to `StoredValue`, or to bool, int, float, str or a list of those: these become bool, uint32
        (int32 where negative, 64 bits where needed), float32 and string. Has ``general.architecture``.
    tensors : iterable of TensorSource
        Read and written one after the other: only one is in memory at a time.
    overwrite : bool, optional
        Whether a file at ``path`` may be replaced.
    progress : callable, optional
        Called with the bytes of each tensor written.

    Raises
    ------
    ModelFileError
        When the place is taken or cannot be written to, the disk is full, a name occurs twice, or a value has
        no kind. No partial file stays.
    """
    target = Path(path)
    check_output(target, overwrite=overwrite)
    sources = list(tensors)
    writer = _prepared(metadata, sources)
    needed = sum(tensor.nbytes for tensor in sources)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ModelFileError(f"[{target}] expected room for {needed} bytes, got {free} bytes free")
    part = target.parent / f".turbosparse-{secrets.token_hex(8)}.part"
    try:
        try:
            _write(writer, part, sources, progress)
        finally:
            writer.close()
        _sync(part)
        check_output(target, overwrite=overwrite)  # somebody may have been quicker
        part.replace(target)
        _sync(target.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelFileError(f"[{target}] expected room for {needed} bytes, got {reason!r}") from error
    finally:
        part.unlink(missing_ok=True)


def model_file_bytes(metadata: Mapping[str, Any], tensors: Iterable[TensorSource]) -> int:
    """Say how large a file would be.

    Parameters
    ----------
    metadata : mapping
        As for `write_model_file`.
    tensors : iterable of TensorSource
        What it would hold; nothing is read.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ModelFileError
        When a name occurs twice, or a value has no kind.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _write_blank(Path(folder) / "head", metadata, list(tensors))


def write_blank_file(
    path: str | os.PathLike[str], metadata: Mapping[str, Any], tensors: Iterable[TensorSource]
) -> None:
    """Write a model file whose tensors are a hole of zeros, which takes no room on the disk.

    Parameters
    ----------
    path : str or os.PathLike
        The new file.
    metadata : mapping
        As for `write_model_file`.
    tensors : iterable of TensorSource
        What it would hold; nothing is read.
    """
    os.truncate(path, _write_blank(Path(path), metadata, list(tensors)))


def _write_blank(path: Path, metadata: Mapping[str, Any], sources: Sequence[TensorSource]) -> int:
    """Everything before the tensors' bytes; gives the size of the whole file."""
    writer = _prepared(metadata, sources)
    try:
        _write_head(writer, path)
    finally:
        writer.close()
    alignment = int(plain_value(metadata.get(ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)))
    parts = [path.stat().st_size, *(tensor.nbytes for tensor in sources)]
    return sum(-(-part // alignment) * alignment for part in parts)


def _prepared(metadata: Mapping[str, Any], sources: Sequence[TensorSource]) -> GGUFWriter:
    """Check and collect everything that goes before the tensors' bytes; no file is open yet."""
    if KEY_ARCHITECTURE not in metadata:
        raise ModelFileError(f"[metadata] expected {KEY_ARCHITECTURE!r}, got no such key")
    writer = GGUFWriter(None, str(plain_value(metadata[KEY_ARCHITECTURE])))
    for key, value in metadata.items():
        if key == ALIGNMENT:
            writer.add_custom_alignment(int(plain_value(value)))
        elif key != KEY_ARCHITECTURE:
            _add_key(writer, key, value if isinstance(value, StoredValue) else _stored(key, value))
    names = set()
    for tensor in sources:
        if tensor.name in names:
            raise ModelFileError(f"[{tensor.name}] expected each tensor once, got it twice")
        if not 1 <= len(tensor.name.encode()) <= LONGEST_NAME:
            raise ModelFileError(
                f"[{tensor.name[:80]}] expected a name of 1 to {LONGEST_NAME} bytes, got another"
            )
        names.add(tensor.name)
        kind = GGMLQuantizationType[tensor.type_name]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    return writer


def _write(
    writer: GGUFWriter, part: Path, sources: Sequence[TensorSource], progress: Callable[[float], None] | None
) -> None:
    _write_head(writer, part)
    for tensor in sources:
        data = tensor.read()
        if data.nbytes != tensor.nbytes:
            raise ModelFileError(f"[{tensor.name}] expected {tensor.nbytes} bytes, got {data.nbytes}")
        writer.write_tensor_data(data)
        if progress is not None:
            progress(tensor.nbytes)
    writer.flush()


def _write_head(writer: GGUFWriter, path: Path) -> None:
    """Everything before the tensors' bytes."""
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _add_key(writer: GGUFWriter, key: str, stored: StoredValue) -> None:
    kind = GGUFValueType[stored.kind.removesuffix("[]").upper()]
    if not stored.kind.endswith("[]"):
        writer.add_key_value(key, stored.value, kind)
    elif stored.value:
        writer.add_key_value(key, stored.value, GGUFValueType.ARRAY, sub_type=kind)
    else:
        logger.warning("key %s left out: the gguf package writes no empty arrays", key)


def _stored(key: str, value: Any) -> StoredValue:
    """Choose a kind for a plain value."""
    if isinstance(value, (list, tuple)):
        kinds = {_stored(key, item).kind for item in value}
        if kinds > {"uint32"} and kinds <= {"uint32", "int32"}:
            kinds = {"int32"}
        if len(kinds) > 1 or any(kind.endswith("[]") for kind in kinds):
            raise ModelFileError(f"[key {key!r}] expected values of one kind, got {', '.join(sorted(kinds))}")
        return StoredValue(f"{kinds.pop() if kinds else 'uint32'}[]", list(value))
    if isinstance(value, bool):
        return StoredValue("bool", value)
    if isinstance(value, int):
        return StoredValue(_integer_kind(key, value), value)
    if isinstance(value, float):
        return StoredValue("float32", value)
    if isinstance(value, str):
        return StoredValue("string", value)
    raise ModelFileError(
        f"[key {key!r}] expected bool, int, float, str or a list, got {type(value).__name__}"
    )


def _integer_kind(key: str, value: int) -> str:
    for kind, low, high in INTEGER_KINDS:
        if low <= value < high:
            return kind
    raise ModelFileError(f"[key {key!r}] expected an integer of 64 bits, got {value}")
