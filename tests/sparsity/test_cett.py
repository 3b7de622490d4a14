"""CETT against an obvious slow twin, and the properties that hold for any layer."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from turbosparse.errors import CalibrationError, ConfigError
from turbosparse.sparsity import cett as cett_module
from turbosparse.sparsity.cett import (
    activation_ratio,
    cett,
    dropped_error,
    find_cett_threshold,
    largest_meeting,
    neuron_output_norms,
    zero_share,
)

Array = NDArray[np.float32]


def f32(rows: list[list[float]]) -> Array:
    return np.array(rows, dtype=np.float32)


def make_layer(seed: int, tokens: int = 7, neurons: int = 33, hidden: int = 11) -> tuple[Array, Array]:
    """Heavy-tailed activations, as FFNs have them, and a down projection with rows of different norm."""
    rng = np.random.default_rng(seed)
    activations = rng.standard_normal((tokens, neurons)) ** 3
    down_t = rng.standard_normal((neurons, hidden)) * rng.uniform(0.1, 2, (neurons, 1))
    return activations.astype(np.float32), down_t.astype(np.float32)


layers = st.builds(
    make_layer,
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 17),
)


def slow_cett(activations: Array, down_t: Array, eps: float) -> float:
    """The formula, token by token and neuron by neuron, in double precision."""
    ratios: list[float] = []
    for token in activations:
        lost, whole = np.zeros(down_t.shape[1]), np.zeros(down_t.shape[1])
        for a, row in zip(token, down_t, strict=True):
            output = np.float64(a) * row.astype(np.float64)
            whole += output
            if abs(a) * np.float32(np.linalg.norm(row)) < np.float32(eps):
                lost += output
        norm = np.linalg.norm(whole)
        ratios.append(float(np.linalg.norm(lost) / norm) if norm > 0 else (np.inf if lost.any() else 0.0))
    return float(np.mean(ratios))


@given(layers, st.floats(0, 10))
def test_equals_the_slow_twin(layer: tuple[Array, Array], eps: float) -> None:
    assert cett(*layer, eps) == pytest.approx(slow_cett(*layer, eps), rel=1e-4, abs=1e-6)


def test_a_norm_equal_to_eps_is_kept() -> None:
    activations, down_t = f32([[1, 2, 2, 5]]), np.eye(4, dtype=np.float32)
    below = float(np.sqrt(1 / 34))
    assert cett(activations, down_t, 2.0) == pytest.approx(below)
    assert cett(activations, down_t, float(np.nextafter(np.float32(2), np.float32(3)))) == pytest.approx(
        float(np.sqrt(9 / 34))
    )
    assert slow_cett(activations, down_t, 2.0) == pytest.approx(below)


def test_a_zero_output_counts_as_nothing_lost() -> None:
    activations = f32([[0, 0], [3, 4]])
    assert cett(activations, np.eye(2, dtype=np.float32), 4.0) == pytest.approx(0.3)
    assert slow_cett(activations, np.eye(2, dtype=np.float32), 4.0) == pytest.approx(0.3)


def test_a_zero_output_from_cancelling_neurons_is_an_infinite_error_once_one_is_dropped() -> None:
    activations, down_t = f32([[1, 2]]), f32([[2], [-1]])
    assert cett(activations, down_t, 1.0) == 0.0
    assert dropped_error(activations, down_t, np.array([[True, False]])) == np.inf


def test_one_neuron_is_all_or_nothing() -> None:
    activations, down_t = f32([[2]]), f32([[3, 4]])
    assert cett(activations, down_t, 10.0) == 0.0
    assert cett(activations, down_t, 10.1) == 1.0
    found = find_cett_threshold(activations, down_t, 0.5)
    assert found.eps == pytest.approx(10.0, rel=1e-5)
    assert (found.cett, found.activation_ratio) == (0.0, 1.0)


@given(layers, st.floats(0, 5), st.floats(0, 5))
def test_more_is_dropped_as_eps_grows(layer: tuple[Array, Array], a: float, b: float) -> None:
    norms = neuron_output_norms(*layer)
    assert activation_ratio(norms >= min(a, b)) >= activation_ratio(norms >= max(a, b))


@given(layers, st.floats(0, 5), st.floats(0, 5))
def test_grows_with_eps_where_neurons_cannot_cancel(layer: tuple[Array, Array], a: float, b: float) -> None:
    activations = layer[0]
    orthogonal = np.diag(np.linspace(0.5, 2, activations.shape[1])).astype(np.float32)
    assert cett(activations, orthogonal, min(a, b)) <= cett(activations, orthogonal, max(a, b)) + 1e-6


@given(layers, st.floats(0, 5), st.integers(0, 1000))
def test_order_of_neurons_does_not_matter(layer: tuple[Array, Array], eps: float, seed: int) -> None:
    activations, down_t = layer
    order = np.random.default_rng(seed).permutation(len(down_t))
    assert cett(activations[:, order], down_t[order], eps) == pytest.approx(
        cett(*layer, eps), rel=1e-4, abs=1e-6
    )


def test_eps_zero_drops_nothing_and_infinity_everything() -> None:
    layer = make_layer(1)
    assert cett(*layer, 0.0) == 0.0
    assert cett(*layer, np.inf) == 1.0


@settings(deadline=None)
@given(layers, st.floats(0.01, 0.9))
def test_search_never_exceeds_its_target(layer: tuple[Array, Array], target: float) -> None:
    found = find_cett_threshold(*layer, target)
    assert found.cett <= target
    assert found.cett == pytest.approx(cett(*layer, found.eps), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("target", [0.01, 0.1, 0.2, 0.5, 0.9])
def test_search_meets_its_target_within_the_tolerance(target: float) -> None:
    layer = make_layer(2, tokens=64, neurons=512, hidden=64)
    found = find_cett_threshold(*layer, target, tolerance=0.01)
    assert target * 0.99 <= found.cett <= target
    assert found.activation_ratio == activation_ratio(neuron_output_norms(*layer) >= np.float32(found.eps))


def test_search_needs_few_evaluations() -> None:
    activations, down_t = make_layer(3, tokens=64, neurons=512, hidden=64)
    calls = []

    def error(eps: float) -> float:
        calls.append(eps)
        return cett(activations, down_t, eps)

    eps, achieved = largest_meeting(error, 0.2, start=1.0)
    assert 0.198 <= achieved <= 0.2
    assert eps > 0
    assert len(calls) <= 12


def test_search_sees_through_exact_zeros() -> None:
    activations, down_t = make_layer(4, tokens=32, neurons=256, hidden=32)
    sparse = np.where(activations > 1, activations, np.float32(0))
    found = find_cett_threshold(sparse, down_t, 0.1)
    assert 0.099 <= found.cett <= 0.1
    assert found.activation_ratio < 1 - zero_share(sparse)


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, float("nan")])
def test_target_out_of_range(target: float) -> None:
    with pytest.raises(ConfigError, match=r"\[cett target\] expected a number above 0 and below 1"):
        find_cett_threshold(*make_layer(0), target)


def test_shapes_that_do_not_fit() -> None:
    activations, down_t = make_layer(0)
    with pytest.raises(ConfigError, match=r"\[cett\] expected activations \(T, F\)"):
        cett(activations[:, 1:], down_t, 1.0)
    with pytest.raises(ConfigError, match="expected kept of shape"):
        dropped_error(activations, down_t, np.ones((1, 1), dtype=np.bool_))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_a_share_of_nothing(shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"\[activation ratio\] expected .* above 0, got \(.*0"):
        activation_ratio(np.zeros(shape, np.bool_))
    with pytest.raises(ConfigError, match="activation ratio"):
        zero_share(np.zeros(shape, np.float32))


def test_activations_that_cannot_be_searched() -> None:
    activations, down_t = make_layer(0)
    with pytest.raises(CalibrationError, match="not all zero"):
        find_cett_threshold(np.zeros_like(activations), down_t, 0.2)
    broken = activations.copy()
    broken[3, 4] = np.nan
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        find_cett_threshold(broken, down_t, 0.2)


def test_an_error_that_never_reaches_the_target() -> None:
    with pytest.raises(CalibrationError, match=r"expected an error above 0\.5 at some threshold"):
        largest_meeting(lambda eps: 0.1, 0.5, start=1.0)


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(cett_module).failed == 0
