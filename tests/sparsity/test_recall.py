"""Recall curves."""

import doctest

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from turbosparse.sparsity import recall as recall_module
from turbosparse.sparsity.recall import recall_curve

GRID = (0.0, 0.3, 0.5, 0.9, 1.0)


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 20))
def test_properties(seed: int, tokens: int, neurons: int) -> None:
    rng = np.random.default_rng(seed)
    active = rng.random((tokens, neurons)) < 0.3
    active[0, 0] = True
    scores = rng.integers(0, 4, (tokens, neurons)).astype(np.float32)
    recall = recall_curve(scores, active, GRID)
    assert recall[0] == 1
    assert recall[-1] == 0
    assert (np.diff(recall) <= 1e-12).all()
    perfect = recall_curve(active.astype(np.float32), active, GRID)
    assert (perfect >= recall - 1e-12).all()
    wanted = 1 - np.array(GRID)
    np.testing.assert_allclose(perfect, np.minimum(wanted / active.mean(), 1))
    constant = recall_curve(np.zeros_like(scores), active, GRID)
    np.testing.assert_allclose(constant, wanted, atol=1e-12)


def test_examples() -> None:
    assert doctest.testmod(recall_module).failed == 0
