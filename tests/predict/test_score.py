"""Scores of candidates against counting by hand, and the curve against scoring each of its thresholds."""

import numpy as np
import pytest
import torch

from turbosparse.models.activations import Activation
from turbosparse.predict.layers import FFNLayer, Neurons, RowBytes
from turbosparse.predict.score import exact_bytes, score_candidates, trade_off

ACTIVE = 1e-30  # norm of an output that makes a neuron active


def make_layer(down: torch.Tensor) -> FFNLayer:
    weight = torch.zeros(down.shape[1], down.shape[0])
    rows = RowBytes(4.0, 2.0, 1.0)
    return FFNLayer(gate=weight, up=weight, down=down, activation=Activation(name="drelu"), row_bytes=rows)


def test_a_case_done_by_hand() -> None:
    layer = make_layer(torch.eye(4))
    neurons = Neurons(torch.tensor([[True, True, True, False]]), torch.tensor([[3.0, 0.0, 4.0, 0.0]]))
    candidates = torch.tensor([[True, True, False, False]])
    score = score_candidates(candidates, neurons, layer, bound=ACTIVE, predictor_bytes=7)
    assert score.recall == 0.5
    assert score.precision == 0.5
    assert score.norm_kept == pytest.approx(3 / 7)
    assert score.cett == pytest.approx(4 / 5)
    assert (score.active_ratio, score.candidate_ratio) == (0.5, 0.5)
    assert score.bytes_ratio == pytest.approx((7 + 2 * 4 + 2 * 2 + 1 * 1) / 28)
    assert exact_bytes(neurons, layer) == 4 * 4 + 3 * 2 + 2 * 1


def test_the_oracle_set_loses_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    activations = torch.relu(torch.randn(50, 30, generator=generator))
    layer = make_layer(torch.randn(8, 30, generator=generator))
    neurons = Neurons(activations != 0, activations)
    score = score_candidates(activations != 0, neurons, layer, bound=ACTIVE, predictor_bytes=0)
    assert (score.recall, score.precision) == (1.0, 1.0)
    assert score.norm_kept == pytest.approx(1)
    assert score.cett == pytest.approx(0)


def test_the_curve_is_what_each_threshold_costs_and_loses() -> None:
    generator = torch.Generator().manual_seed(1)
    activations = torch.relu(torch.randn(40, 20, generator=generator))
    layer = make_layer(torch.randn(16, 20, generator=generator))
    neurons = Neurons(torch.rand(40, 20, generator=generator).gt(0.5) | (activations != 0), activations)
    scores = activations + 0.3 * torch.randn(40, 20, generator=generator)
    curve = trade_off(scores, neurons, layer, 11.0)
    assert (np.diff(curve.thresholds) > 0).all()
    assert (np.diff(curve.read_bytes) <= 0).all()
    assert (np.diff(curve.lost) >= -1e-9).all()
    energy = (activations * layer.down.norm(dim=0)).square()
    energy /= energy.sum(dim=1, keepdim=True)
    for at in (0, 100, 200, len(curve.thresholds) - 1):
        candidates = scores >= torch.tensor(curve.thresholds[at], dtype=torch.float32)
        score = score_candidates(candidates, neurons, layer, bound=ACTIVE, predictor_bytes=11.0)
        assert curve.read_bytes[at] == pytest.approx(score.bytes_ratio * layer.dense_bytes)
        assert curve.lost[at] == pytest.approx(float((energy * ~candidates).sum()) / 40, abs=1e-5)


def test_one_token_of_a_huge_norm_does_not_hide_what_the_others_lose() -> None:
    activations = torch.tensor([[1000.0, 0.0]] + [[0.0, 1.0]] * 9)
    neurons = Neurons(activations != 0, activations)
    curve = trade_off(torch.tensor([[1.0, 0.0]] * 10), neurons, make_layer(torch.eye(2)), 0.0)
    assert curve.lost[[0, -1]] == pytest.approx([0.0, 0.9])  # at thresholds 0 and 1


def test_scores_that_are_all_equal_have_one_threshold() -> None:
    neurons = Neurons(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3))
    curve = trade_off(torch.zeros(2, 3), neurons, make_layer(torch.eye(3)), 0.0)
    assert curve.thresholds.tolist() == [0.0]
    assert curve.lost.tolist() == [0.0]
    assert curve.read_bytes.tolist() == [21.0]
