"""Numbers that follow from how often neurons are active."""

import doctest
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbosparse.sparsity import hotness as hotness_module
from turbosparse.sparsity.hotness import batch_union, carrying_share, hotness


def slow_carrying_share(counts: list[int], share: float) -> float:
    carried, neurons = 0, 0
    for count in sorted(counts, reverse=True):
        if carried >= share * sum(counts):
            break
        carried, neurons = carried + count, neurons + 1
    return neurons / len(counts)


def test_by_hand() -> None:
    active = np.array([[1, 0, 1], [1, 0, 0]], np.bool_)
    assert hotness(active).tolist() == [1, 0, 0.5]
    assert carrying_share(np.array([2, 0, 1]), 0.6) == pytest.approx(1 / 3)
    assert carrying_share(np.array([2, 0, 1]), 0.8) == pytest.approx(2 / 3)
    assert np.isnan(carrying_share(np.zeros(3)))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50).filter(any))
def test_carrying_share_equals_the_slow_twin(counts: list[int]) -> None:
    assert carrying_share(np.array(counts)) == pytest.approx(slow_carrying_share(counts, 0.8))


@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 9))
def test_batch_union_is_the_mean_over_all_batches(seed: int, tokens: int, neurons: int) -> None:
    active = np.random.default_rng(seed).random((tokens, neurons)) < 0.4
    sizes = list(range(1, tokens + 1))
    expected = [
        np.mean([active[list(batch)].any(axis=0).mean() for batch in combinations(range(tokens), size)])
        for size in sizes
    ]
    np.testing.assert_allclose(batch_union(active.sum(axis=0), tokens, sizes), expected, atol=1e-12)


def test_examples() -> None:
    assert doctest.testmod(hotness_module).failed == 0
