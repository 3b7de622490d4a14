"""Perplexity and divergence of predictions."""

import doctest
import math

import numpy as np
import pytest

from turbosparse.errors import CalibrationError
from turbosparse.sparsity import quality as quality_module
from turbosparse.sparsity.quality import QualitySums, cut_windows, log_softmax


def test_by_hand() -> None:
    log_p = np.log(np.array([[0.5, 0.5], [0.75, 0.25]], np.float32))
    log_q = np.log(np.array([[0.25, 0.75], [0.75, 0.25]], np.float32))
    sums = QualitySums()
    sums.add(log_q, log_p, np.array([0, 0]))
    found = sums.result()
    assert found.dense_perplexity == pytest.approx((0.5 * 0.75) ** -0.5)
    assert found.perplexity == pytest.approx((0.25 * 0.75) ** -0.5)
    assert found.perplexity_rise == pytest.approx(math.sqrt(2) - 1)
    # differences of the losses: log 2 and 0; their mean has a standard error of log(2) / 2
    assert found.perplexity_rise_se == pytest.approx(math.sqrt(2) * math.log(2) / 2)
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found.mean_kl == pytest.approx(kl / 2)
    assert found.max_kl == pytest.approx(kl)
    assert found.kl_99_percentile == pytest.approx(kl, rel=0.06)
    assert found.same_top_1 == 0.5
    assert found.tokens == 2


def test_pieces_equal_the_whole() -> None:
    rng = np.random.default_rng(0)
    log_p, log_q = (log_softmax(rng.standard_normal((50, 11)).astype(np.float32)) for _ in range(2))
    targets = rng.integers(0, 11, 50)
    whole, parts = QualitySums(), QualitySums()
    whole.add(log_q, log_p, targets)
    for begin in range(0, 50, 7):
        piece = slice(begin, begin + 7)
        parts.add(log_q[piece], log_p[piece], targets[piece])
    for name, value in vars(whole.result()).items():
        assert getattr(parts.result(), name) == pytest.approx(value, rel=1e-9), name


def test_equal_predictions_are_at_no_distance() -> None:
    log_p = log_softmax(np.random.default_rng(1).standard_normal((9, 5)).astype(np.float32))
    sums = QualitySums()
    sums.add(log_p, log_p, np.zeros(9, np.int64))
    found = sums.result()
    assert (found.perplexity_rise, found.mean_kl, found.max_kl, found.same_top_1) == (0, 0, 0, 1)


@pytest.mark.parametrize(("broken", "model"), [(0, "sparse"), (1, "dense")])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_loss_that_is_not_finite_is_an_error(broken: int, model: str, value: float) -> None:
    sums = QualitySums()
    targets = np.zeros(4, np.int64)
    fine = np.full((4, 2), np.log(0.5), np.float32)
    sums.add(fine, fine, targets)
    both = [fine, fine.copy()]
    both[broken] = fine.copy()
    both[broken][2, 0] = value
    with pytest.raises(CalibrationError, match=rf"finite losses.* of the {model} model at scored token 6"):
        sums.add(both[0], both[1], targets)


def test_log_softmax_is_stable() -> None:
    np.testing.assert_allclose(log_softmax(np.array([[1000.0, 0.0]], np.float32)), [[0, -1000]])


def test_windows_do_not_overlap_and_leave_the_rest() -> None:
    assert [window.tolist() for window in cut_windows(range(7), 3, None)] == [[0, 1, 2], [3, 4, 5]]
    assert doctest.testmod(quality_module).failed == 0
