"""Weights of a Hugging Face directory: safetensors files, mapped, read tensor by tensor, without torch.

The format (github.com/huggingface/safetensors): eight bytes with the length of a JSON header, the header with
type, shape and place of every tensor, then the data. A model of several files has an index that names the
file of each tensor.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import ModelFileError

__all__ = ["WeightFiles", "read_json"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # bytes, as the reference implementation has it
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    dict
        Its content.

    Raises
    ------
    ModelFileError
        When the file is missing, is no JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(f"[{path}] expected a file, got: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"[{path}] expected JSON, got: {error}") from None
    if not isinstance(content, dict):
        raise ModelFileError(f"[{path}] expected a JSON object, got {type(content).__name__}")
    return content


@dataclass(frozen=True)
class _Place:
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int  # of the data, in bytes from the start of the file
    end: int


class WeightFiles:
    """The tensors of a Hugging Face directory, or of one safetensors file.

    Parameters
    ----------
    path : Path
        Directory with ``model.safetensors`` or its index, or a file.

    Raises
    ------
    ModelFileError
        When there are no such files, or one is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places = _of_directory(path) if path.is_dir() else _of_file(path)

    @property
    def metadata(self) -> dict[str, str]:
        """What the header of a single file says of it; empty for a directory."""
        stated = {} if self.path.is_dir() else _header(self.path)[0].get("__metadata__")
        return stated if isinstance(stated, dict) else {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: place.shape for name, place in self._places.items()}

    def read(self, name: str) -> NDArray[np.float32]:
        """Read a tensor.

        Parameters
        ----------
        name : str
            One of `shapes`.

        Returns
        -------
        float32, shape as stored
            For F32 a view of the file.
        """
        place = self._places[name]
        data = np.memmap(place.file, np.uint8, "r", offset=place.begin, shape=(place.end - place.begin,))
        if place.dtype == "BF16":
            values = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = data.view(f"<f{_BYTES[place.dtype]}").astype(np.float32, copy=False)
        return np.asarray(values).reshape(place.shape)


def _of_directory(directory: Path) -> dict[str, _Place]:
    if (directory / _SINGLE).is_file():
        return _of_file(directory / _SINGLE)
    if not (directory / _INDEX).is_file():
        raise ModelFileError(
            f"[{directory}] expected {_SINGLE} or {_INDEX}, got neither (transformers writes them by "
            "save_pretrained)"
        )
    names = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelFileError(f"[{directory / _INDEX}] expected a weight_map, got {type(names).__name__}")
    files: dict[str, dict[str, _Place]] = {}
    places = {}
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelFileError(f"[{directory / _INDEX}] expected names of files beside it, got {file!r}")
        if file not in files:
            files[file] = _of_file(directory / file)
        if name not in files[file]:
            raise ModelFileError(f"[{directory / file}] expected the tensor {name!r}, got no such tensor")
        places[name] = files[file][name]
    return places


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data begins, and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ModelFileError(
                    f"[{path}] expected a safetensors header within {size} bytes, got {length}"
                )
            header = json.loads(file.read(length).decode("utf-8"))
    except OSError as error:
        raise ModelFileError(f"[{path}] expected a file, got: {error.strerror}") from None
    except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise ModelFileError(f"[{path}] expected a safetensors header in JSON, got: {error}") from None
    if not isinstance(header, dict):
        raise ModelFileError(f"[{path}] expected a safetensors header, got {type(header).__name__}")
    return header, 8 + length, size


def _of_file(path: Path) -> dict[str, _Place]:
    header, start, size = _header(path)
    return {
        name: _place(path, name, entry, start, size)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _place(path: Path, name: str, entry: Any, start: int, size: int) -> _Place:
    where = f"[{path}: {name}]"
    if not isinstance(entry, dict) or entry.get("dtype") not in _BYTES:
        got = entry.get("dtype") if isinstance(entry, dict) else entry
        raise ModelFileError(f"{where} expected a tensor of type {', '.join(_BYTES)}, got {got!r}")
    shape, offsets = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise ModelFileError(f"{where} expected a shape and two offsets, got {str(entry)[:80]}")
    begin, end = start + offsets[0], start + offsets[1]
    nbytes = math.prod(shape) * _BYTES[entry["dtype"]]
    if not start <= begin <= end <= size or end - begin != nbytes or nbytes == 0:
        raise ModelFileError(
            f"{where} expected {nbytes} bytes inside of the file, got {offsets[0]} to {offsets[1]} of "
            f"{size - start}"
        )
    return _Place(path, entry["dtype"], tuple(shape), begin, end)


def _sizes(value: Any) -> list[int] | None:
    return value if isinstance(value, list) and all(type(n) is int and n >= 0 for n in value) else None
