"""Two-stage thresholds: the target holds for both stages together, and the split pays."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from turbosparse.errors import CalibrationError, ConfigError
from turbosparse.sparsity import thresholds as thresholds_module
from turbosparse.sparsity.cett import cett, dropped_error, find_cett_threshold
from turbosparse.sparsity.thresholds import (
    ONE_STAGE,
    TWO_STAGES,
    LayerThresholds,
    find_layer_thresholds,
    kept_neurons,
)

Array = NDArray[np.float32]


def make_layer(
    seed: int, tokens: int = 48, neurons: int = 256, hidden: int = 32
) -> tuple[Array, Array, Array]:
    """SiLU of a gate that is mostly negative, an up of comparable size, rows of different norm."""
    rng = np.random.default_rng(seed)
    gate = rng.standard_normal((tokens, neurons)) * 2 - 1
    up = rng.standard_normal((tokens, neurons)) * rng.uniform(0.5, 1.5, neurons)
    down_t = rng.standard_normal((neurons, hidden)) * rng.uniform(0.5, 1.5, (neurons, 1))
    silu = gate / (1 + np.exp(-gate))
    return silu.astype(np.float32), up.astype(np.float32), down_t.astype(np.float32)


def bytes_read(found: LayerThresholds, up: float = 1.0, down: float = 1.0) -> float:
    return found.gate_passed * up + found.active * down


@pytest.mark.parametrize("splits", [ONE_STAGE, TWO_STAGES])
@pytest.mark.parametrize("target", [0.05, 0.2, 0.5])
def test_both_stages_together_meet_the_target(splits: tuple[float, ...], target: float) -> None:
    gate, up, down_t = make_layer(1)
    found = find_layer_thresholds(gate, up, down_t, target, splits=splits)
    passed, kept = kept_neurons(gate, up, found.gate_threshold, found.threshold)
    assert target * 0.98 <= found.cett <= target
    assert dropped_error(gate * up, down_t, kept) == pytest.approx(found.cett)
    assert (found.gate_passed, found.active) == (passed.mean(), kept.mean())
    assert found.active <= found.gate_passed


def test_one_stage_is_the_search_for_one_threshold() -> None:
    gate, up, down_t = make_layer(2)
    found = find_layer_thresholds(gate, up, down_t, 0.2, splits=ONE_STAGE)
    single = find_cett_threshold(gate * up, down_t, 0.2)
    assert found.split == 0
    assert found.gate_passed == 1
    assert not found.gate_threshold.any()
    assert found.active == pytest.approx(single.activation_ratio, abs=0.005)
    assert cett(gate * up, down_t, single.eps) == pytest.approx(found.cett, rel=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_two_stages_never_read_more_than_one(seed: int) -> None:
    layer = make_layer(seed, tokens=96)
    one, two = (find_layer_thresholds(*layer, 0.2, splits=splits) for splits in (ONE_STAGE, TWO_STAGES))
    assert bytes_read(two) < bytes_read(one)


def test_dear_rows_of_up_move_the_split_towards_the_gate() -> None:
    layer = make_layer(3)
    dear = find_layer_thresholds(*layer, 0.2, row_bytes=(10.0, 1.0))
    cheap = find_layer_thresholds(*layer, 0.2, row_bytes=(0.0, 1.0))
    assert dear.split > cheap.split
    assert dear.gate_passed < cheap.gate_passed


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.floats(0.02, 0.6))
def test_order_of_neurons_does_not_matter(seed: int, target: float) -> None:
    gate, up, down_t = make_layer(seed, tokens=16, neurons=64, hidden=8)
    order = np.random.default_rng(seed).permutation(64)
    found = find_layer_thresholds(gate, up, down_t, target)
    moved = find_layer_thresholds(gate[:, order], up[:, order], down_t[order], target)
    assert found.cett <= target
    assert moved.cett <= target
    assert moved.active == pytest.approx(found.active, abs=0.05)


def test_exact_zeros_are_dropped_in_stage_one() -> None:
    gate, up, down_t = make_layer(5)
    relu = np.maximum(gate, 0)
    found = find_layer_thresholds(relu, up, down_t, 0.001)
    assert found.zeros == pytest.approx((relu == 0).mean(), abs=1e-3)
    assert found.gate_passed <= (relu > 0).mean()
    assert found.cett <= 0.001


def test_neurons_that_the_text_never_woke_get_finite_thresholds() -> None:
    gate, up, down_t = make_layer(6)
    up[:, 3] = 0
    down_t[5] = 0
    found = find_layer_thresholds(gate, up, down_t, 0.2)
    for thresholds in (found.gate_threshold, found.threshold):
        assert np.isfinite(thresholds).all()
        assert thresholds.dtype == np.float32
    assert found.cett <= 0.2


def test_boundary_is_kept() -> None:
    gate, up, gate_threshold, threshold = (
        np.array(row, dtype=np.float32)
        for row in ([[0.5, -0.5, 0.25]], [[2, 2, 8]], [0.5, 0.5, 0.5], [1, 1.5, 0])
    )
    passed, kept = kept_neurons(gate, up, gate_threshold, threshold)
    assert passed.tolist() == [[True, True, False]]
    assert kept.tolist() == [[True, False, False]]


def test_bad_arguments() -> None:
    gate, up, down_t = make_layer(0)
    with pytest.raises(ConfigError, match=r"splits of at least 0, got \[-1\.0\]"):
        find_layer_thresholds(gate, up, down_t, 0.2, splits=(-1.0,))
    with pytest.raises(ConfigError, match="gate and up of one shape"):
        find_layer_thresholds(gate, up[1:], down_t, 0.2)
    with pytest.raises(CalibrationError, match="not all zero"):
        find_layer_thresholds(np.zeros_like(gate), up, down_t, 0.2)


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(thresholds_module).failed == 0
