"""Tells models and texts apart by what is in them, not by where they lie."""

import glob
import hashlib
from collections.abc import Iterable
from pathlib import Path

from turbosparse.data.config import DataConfig
from turbosparse.models.registry import base_fingerprint

__all__ = ["model_fingerprint", "texts_fingerprint"]

_PIECE = 1 << 16
_PIECES = 64  # of a file, evenly spread: 4 MiB are read, however large it is


def model_fingerprint(model: str) -> str:
    """Tell models apart.

    Parameters
    ----------
    model : str
        Model file, or Hugging Face directory or id.

    Returns
    -------
    str
        Hexadecimal digits: of pieces of a file and its size; of a directory's configuration and the first
        row of each tensor.
    """
    path = Path(model)
    if path.is_file():
        return _digest([path])
    config = path / "config.json"
    return _digest([config] if config.is_file() else [], base_fingerprint(model))


def texts_fingerprint(data: DataConfig) -> str:
    """Tell training texts apart.

    Parameters
    ----------
    data : DataConfig
        The text; sources on the hub are not looked at.

    Returns
    -------
    str
        Hexadecimal digits, of pieces of the files and their sizes.
    """
    names = [
        name
        for source in (*data.sources, *data.held_out)
        for name in sorted(glob.glob(source.path, recursive=True))  # noqa: PTH207 -- may be absolute
    ]
    return _digest(path for path in map(Path, names) if path.is_file())


def _digest(paths: Iterable[Path], more: str = "") -> str:
    digest = hashlib.sha256(more.encode())
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            pieces = min(_PIECES, -(-size // _PIECE))
            for piece in range(pieces):
                file.seek((size - _PIECE) * piece // (pieces - 1) if piece else 0)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]
