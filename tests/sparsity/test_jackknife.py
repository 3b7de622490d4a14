"""Standard errors of statistics of totals."""

import doctest
import math

import numpy as np
import pytest

from turbosparse.sparsity import jackknife as jackknife_module
from turbosparse.sparsity.jackknife import group_of, jackknife


def test_of_a_mean_it_is_the_usual_standard_error() -> None:
    values = np.random.default_rng(0).standard_normal(10)
    found = jackknife((values, np.ones(10)), lambda total, count: total / count)
    assert float(found.value) == pytest.approx(values.mean())
    assert float(found.standard_error) == pytest.approx(values.std(ddof=1) / math.sqrt(10))


def test_it_covers_the_truth() -> None:
    """A ratio of means, 300 times: the truth lies within two standard errors in about 93 % of them."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(300):
        counts = rng.integers(50, 150, 10)
        hits = rng.binomial(counts, 0.3)
        found = jackknife((hits, counts), lambda a, b: a / b)
        inside += abs(float(found.value) - 0.3) < 2 * float(found.standard_error)
    assert 0.88 < inside / 300 < 0.98


def test_one_group_says_nothing() -> None:
    found = jackknife((np.array([3.0]),), lambda total: total)
    assert float(found.value) == 3
    assert np.isnan(found.standard_error)


def test_groups_are_runs_of_even_length() -> None:
    groups = [group_of(window, 25, 10) for window in range(25)]
    assert groups == sorted(groups)
    assert set(np.bincount(groups)) == {2, 3}


def test_examples() -> None:
    assert doctest.testmod(jackknife_module).failed == 0
