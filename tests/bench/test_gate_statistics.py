"""Sparsity, recall and precision of the solved statistics, by drawing from them."""

import numpy as np
import pytest

from turbosparse.bench.gate_statistics import UP_GIVEN_GATE, solve_gate_statistics


@pytest.mark.parametrize(
    ("sparsity", "recall", "precision"),
    [(0.9, 0.95, 0.95), (0.9, 0.95, 0.5), (0.5, 0.7, 0.6), (0.97, 0.8, 0.9), (0.99, 0.98, 0.98)],
)
def test_draws_have_the_stated_shares(sparsity: float, recall: float, precision: float) -> None:
    found = solve_gate_statistics(sparsity=sparsity, recall=recall, precision=precision)
    score, *noise = np.random.default_rng(0).standard_normal((3, 1_000_000))
    own = np.sqrt(1 - found.correlation**2)
    gate = found.correlation * score + own * noise[0] - found.gate_shift
    up = found.correlation * score + own * noise[1] - found.up_shift
    active, candidate = (gate > 0) & (up > 0), score >= found.threshold
    hits = np.mean(active & candidate)
    assert np.mean(active) == pytest.approx(1 - sparsity, rel=0.02)
    assert np.mean(active) / np.mean(gate > 0) == pytest.approx(UP_GIVEN_GATE, abs=0.01)
    assert hits / np.mean(active) == pytest.approx(recall, abs=0.01)
    assert hits / np.mean(candidate) == pytest.approx(precision, abs=0.01)
    squares = np.mean((np.maximum(gate, 0) * np.maximum(up, 0)) ** 2)
    assert squares == pytest.approx(found.mean_square, rel=0.05)
