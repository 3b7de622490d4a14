"""Histograms whose bins do not depend on the data."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from turbosparse.sparsity import float_histogram
from turbosparse.sparsity.float_histogram import FloatHistogram

finite = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
values = arrays(np.float32, st.integers(1, 300), elements=finite)


@given(values, values)
def test_parts_add_up(first: np.ndarray, second: np.ndarray) -> None:
    whole, parts = FloatHistogram(), FloatHistogram()
    whole.add(np.concatenate([first, second]))
    parts.add(first)
    parts.add(second)
    for got, expected in zip(parts.bins(), whole.bins(), strict=True):
        np.testing.assert_array_equal(got, expected)


@given(values)
def test_bins_hold_their_values(sample: np.ndarray) -> None:
    histogram = FloatHistogram()
    histogram.add(sample)
    low, high, counts = histogram.bins()
    assert counts.sum() == len(sample) == histogram.total
    assert (np.diff(low + high) >= 0).all()
    inside = (sample[:, None] >= low) & (sample[:, None] <= high)
    tiny = np.abs(sample) < 1e-37  # counted as zeros
    assert (inside.any(axis=1) | tiny).all()


def test_quantiles_are_near() -> None:
    sample = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    histogram = FloatHistogram()
    histogram.add(sample)
    for share in (0.01, 0.25, 0.9, 0.99):
        assert histogram.quantile(share) == pytest.approx(np.quantile(sample, share), rel=0.03)
    assert np.isnan(FloatHistogram().quantile(0.5))


def test_the_share_of_the_largest() -> None:
    histogram = FloatHistogram()
    histogram.add(np.array([0] * 90 + [1.03125] * 10, np.float32))  # the middle of its bin
    np.testing.assert_allclose(histogram.share_of_largest(np.array([0, 0.05, 0.1, 1])), [0, 0.5, 1, 1])


def test_examples() -> None:
    assert doctest.testmod(float_histogram).failed == 0
