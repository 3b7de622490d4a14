"""Files with bundles, made from tiny models, and what tests of models larger than memory ask of them."""

import re
from pathlib import Path

import numpy as np
import pytest

from turbosparse import _native
from turbosparse.errors import ConfigError
from turbosparse.runtime.bundles import bundled
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.model_file_writer import TensorSource, write_model_file

__all__ = ["CONTEXT", "IDS", "least_budget", "logits", "make_bundled"]

IDS = np.array([5, 17, 99, 3, 3, 250, 41, 8, 120, 66], np.int32)
CONTEXT = 16


def make_bundled(source: Path, path: Path, **options: object) -> Path:
    file = ModelFile(source)
    tensors = [TensorSource.of_file(file, name) for name in file.tensors]
    keys, made = bundled(file.stored_metadata(), tensors, **options)  # type: ignore[arg-type]
    write_model_file(path, keys, made)
    return path


def least_budget(path: Path) -> int:
    with pytest.raises(ConfigError, match="expected at least") as error:
        _native.Model(str(path), memory_budget=1, context=CONTEXT)
    found = re.search(r"at least (\d+) MiB", str(error.value))
    assert found is not None
    return int(found[1]) << 20


def logits(model: _native.Model, mode: "_native.Mode", *, stepwise: bool) -> np.ndarray:
    session = model.session(CONTEXT)
    pieces = np.split(IDS, len(IDS)) if stepwise else [IDS]
    return np.concatenate([session.forward(piece, mode=mode, logits="all") for piece in pieces])
