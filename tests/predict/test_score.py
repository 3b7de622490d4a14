"""Scores of candidates against counting by hand, and the threshold's promise."""

import pytest
import torch

from turbosparse.errors import ConfigError
from turbosparse.predict.score import ALL_NEURONS, choose_threshold, score_candidates


def test_a_case_done_by_hand() -> None:
    activations = torch.tensor([[3.0, 0.0, 4.0, 0.0]])
    down = torch.eye(4)
    candidates = torch.tensor([[True, True, False, False]])
    score = score_candidates(candidates, activations, activations != 0, down, predictor_weights=12)
    assert score.recall == 0.5
    assert score.precision == 0.5
    assert score.norm_kept == pytest.approx(3 / 7)
    assert score.cett == pytest.approx(4 / 5)
    assert (score.active_ratio, score.candidate_ratio) == (0.5, 0.5)
    assert score.bytes_ratio == pytest.approx(12 / 48 + 0.5)


def test_the_oracle_set_loses_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    activations = torch.relu(torch.randn(50, 30, generator=generator))
    down = torch.randn(8, 30, generator=generator)
    active = activations != 0
    score = score_candidates(active, activations, active, down, predictor_weights=0)
    assert (score.recall, score.precision) == (1.0, 1.0)
    assert score.norm_kept == pytest.approx(1)
    assert score.cett == pytest.approx(0)


@pytest.mark.parametrize("target", [0.01, 0.1, 0.5])
def test_the_threshold_meets_its_target_and_a_higher_one_does_not(target: float) -> None:
    generator = torch.Generator().manual_seed(1)
    activations = torch.relu(torch.randn(64, 100, generator=generator))
    down = torch.randn(16, 100, generator=generator)
    scores = activations + 0.3 * torch.randn(64, 100, generator=generator)
    threshold = choose_threshold(scores, activations, down, target)

    def cett(cut: float) -> float:
        return score_candidates(scores >= cut, activations, activations != 0, down, 0).cett

    assert cett(threshold) <= target
    assert cett(threshold + 0.2) > target


def test_no_threshold_but_all_neurons() -> None:
    activations = torch.ones(2, 3)
    assert choose_threshold(torch.zeros(2, 3), activations, torch.eye(3), 0.1) <= 0
    scores = torch.tensor([[1.0, 1.0, -5.0], [1.0, 1.0, -6.0]])
    assert choose_threshold(scores, activations, torch.eye(3), 0.1) in (-6.0, ALL_NEURONS)
    with pytest.raises(ConfigError, match="expected held-out tokens"):
        choose_threshold(torch.zeros(0, 3), torch.zeros(0, 3), torch.eye(3), 0.1)
