"""The gap between the best partner and the average one."""

import doctest
import math
import tracemalloc

import numpy as np
import pytest

from turbosparse.sparsity import coactivation as coactivation_module
from turbosparse.sparsity.coactivation import PairCounts, coactivation_gap


def test_by_hand() -> None:
    """Neurons 0 and 1 always together, on every second token; 2 always; 3 never."""
    on = np.arange(256) % 2 == 0
    active = np.stack([on, on, np.ones(256, np.bool_), np.zeros(256, np.bool_)], axis=1)
    found = coactivation_gap(active)
    # of 0: partner 1, mean of (1, 1, 0); of 1 the same; of 2: partner 0.5, mean of (0.5, 0.5, 0)
    assert found.partner == pytest.approx((1 + 1 + 0.5) / 3)
    assert found.average == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    assert found.gap == pytest.approx(found.partner - found.average)
    assert found.neurons == 3
    gaps = [1 / 3, 1 / 3, 1 / 6]
    assert found.standard_error == pytest.approx(np.std(gaps, ddof=1) / math.sqrt(3))


def test_independent_neurons_have_no_gap() -> None:
    """The largest of 500 noisy shares is 0.45 here; read off the other half of the tokens it is 0.3."""
    active = np.random.default_rng(3).random((2048, 500)) < 0.3
    found = coactivation_gap(active)
    assert abs(found.gap) < 0.02
    own = active[:, 0]
    naive = (active[own, 1:].mean(axis=0)).max()
    assert naive > 0.35


def test_streaming_equals_one_batch() -> None:
    active = np.random.default_rng(4).random((700, 40)) < 0.4
    parts = PairCounts(40, sample=16, seed=5)
    for begin, end in ((0, 1), (1, 130), (130, 131), (131, 700)):
        parts.add(active[begin:end])
    assert parts.gap() == coactivation_gap(active, sample=16, seed=5)


def test_neurons_that_hardly_fire_are_not_judged() -> None:
    found = coactivation_gap(np.zeros((200, 5), np.bool_))
    assert found.neurons == 0
    assert math.isnan(found.gap)


def test_examples() -> None:
    assert doctest.testmod(coactivation_module).failed == 0


def test_counts_take_half_a_kilobyte_per_neuron() -> None:
    tracemalloc.start()
    counts = PairCounts(10_000)
    counts.add(np.ones((3, 10_000), np.bool_))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 10_000 * 530
