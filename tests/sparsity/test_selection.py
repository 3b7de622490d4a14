"""Ways to choose neurons."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbosparse.sparsity import selection as selection_module
from turbosparse.sparsity.cett import cett, dropped_error
from turbosparse.sparsity.selection import NonZero, NormThresholds, PositiveGate, TopK, top_k_kept


def slow_top_k(row: list[float], k: int) -> list[bool]:
    least = sorted(map(abs, row), reverse=True)[k - 1]
    return [abs(value) >= least for value in row]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.floats(0.01, 1))
def test_top_k_equals_the_slow_twin_also_with_ties(row: list[int], share: float) -> None:
    k = max(1, round(share * len(row)))
    expected = slow_top_k([float(value) for value in row], k)
    assert top_k_kept(np.array([row], np.float32), share).tolist() == [expected]


@given(st.integers(0, 2**31))
def test_more_neurons_are_a_superset(seed: int) -> None:
    activations = np.random.default_rng(seed).standard_normal((5, 20)).astype(np.float32)
    few, many = top_k_kept(activations, 0.2), top_k_kept(activations, 0.6)
    assert (few <= many).all()
    assert few.sum() == 5 * 4


def test_each_by_hand() -> None:
    gate = np.array([[1, -1, 0, 2]], np.float32)
    activations = np.array([[3, -4, 0, 1]], np.float32)
    assert TopK(share=0.25).kept(0, gate, activations).tolist() == [[False, True, False, False]]
    assert PositiveGate().kept(0, gate, activations).tolist() == [[True, False, False, True]]
    assert NonZero().kept(0, gate, activations).tolist() == [[True, True, False, True]]
    assert TopK(share=0.25).label == "top 25 %"


def test_thresholds_on_norms_are_cett() -> None:
    rng = np.random.default_rng(0)
    activations = rng.standard_normal((6, 9)).astype(np.float32)
    down_t = rng.standard_normal((9, 4)).astype(np.float32)
    norms = np.linalg.norm(down_t, axis=1).astype(np.float32)
    selection = NormThresholds(label="x", eps={3: 0.7}, down_norms={3: norms})
    kept = selection.kept(3, activations, activations)
    assert dropped_error(activations, down_t, kept) == pytest.approx(cett(activations, down_t, 0.7))
    assert selection.kept(4, activations, activations).all()


def test_examples() -> None:
    assert doctest.testmod(selection_module).failed == 0
