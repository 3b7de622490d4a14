"""Which layers' errors matter: measured one at a time, and turned into shares of a target."""

from pathlib import Path

import numpy as np
import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse._native import Model
from turbosparse.runtime.captures import Captures
from turbosparse.runtime.ffns import down_t
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.model_file_copy import copy_with
from turbosparse.runtime.model_file_writer import TensorSource
from turbosparse.runtime.sensitivity import layer_divergences, relative_targets
from turbosparse.sparsity.thresholds import find_layer_thresholds

IDS = np.random.default_rng(8).integers(0, 260, 48).astype(np.int32)


def divergences_of(path: Path, target: float) -> np.ndarray:
    file, model = ModelFile(path), Model(str(path), threads=1)
    captures = Captures(model, [IDS], memory_bytes=1 << 30)
    tried = [
        find_layer_thresholds(gate, up, down_t(file, ffn), target)
        for ((ffn, _, gate, up),) in captures.layers()
    ]
    return layer_divergences(model, IDS, captures, tried)


def test_a_layer_that_hardly_counts_has_little_divergence(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    make_tiny_model(path, TinyModel(down_t=True, num_hidden_layers=3))
    even = divergences_of(path, 0.3)
    assert (even > 0).all()
    file = ModelFile(path)
    name = "blk.1.ffn_down_t.weight"
    weak = TensorSource.of_array(name, file.dequantised(name) * np.float32(0.1))
    copy_with(file, path, tensors=[weak], overwrite=True)
    assert divergences_of(path, 0.3)[1] < 0.05 * even[1]


def test_divergence_grows_with_the_error(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "m.gguf", TinyModel(down_t=True))
    small, large = (divergences_of(tmp_path / "m.gguf", target) for target in (0.1, 0.4))
    assert (large > 4 * small).all()


def test_shares_are_even_where_layers_are_and_bounded_where_not() -> None:
    errors = np.full(4, 0.2)
    assert relative_targets(np.full(4, 0.01), errors) == pytest.approx(np.ones(4))
    # Measured at another error, the same sensitivity gives the same share.
    assert relative_targets(np.array([0.01, 0.04]), np.array([0.1, 0.2])) == pytest.approx(np.ones(2))
    shares = relative_targets(np.array([1e3, 1e-3, 1e-3, 0.0]), errors)
    assert np.exp(np.log(shares).mean()) == pytest.approx(1)
    assert shares.max() / shares.min() <= 16
    assert shares[0] < shares[1] <= shares[3]


def test_no_divergence_at_all_means_even_shares() -> None:
    assert relative_targets(np.zeros(3), np.full(3, 0.1)) == pytest.approx(np.ones(3))
