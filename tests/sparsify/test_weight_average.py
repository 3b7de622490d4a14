"""The average is that of the last steps, stays out of the training, and goes through a checkpoint."""

from pathlib import Path

import pytest
import torch
from torch import nn

from turbosparse.sparsify.weight_average import WeightAverage


def started(model: nn.Module, steps: float, checkpoint: Path | None = None) -> WeightAverage:
    average = WeightAverage(steps, checkpoint)
    average.on_train_begin(None, None, None, model=model)
    return average


def train(model: nn.Linear, average: WeightAverage, values: list[float]) -> None:
    """Pretend that each step sets all weights to the next value."""
    for value in values:
        nn.init.constant_(model.weight, value)
        average.on_optimizer_step(None, None, None)


def averaged(model: nn.Linear, average: WeightAverage) -> float:
    with average.applied():
        return float(model.weight.detach().mean())


def test_it_is_the_mean_at_first_then_exponential() -> None:
    model = nn.Linear(3, 2)
    average = started(model, 4)
    train(model, average, [1.0, 2.0, 6.0, 7.0])
    assert averaged(model, average) == pytest.approx(4.0)
    train(model, average, [8.0])
    assert averaged(model, average) == pytest.approx(4.0 + (8.0 - 4.0) / 4)
    assert float(model.weight.detach().mean()) == 8.0


def test_frozen_weights_are_left_alone() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    bias = model.bias.clone()
    average = started(model, 2)
    train(model, average, [5.0])
    with average.applied():
        assert torch.equal(model.bias, bias)


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    whole, first = started(model, 3), started(other, 3)
    train(model, whole, [1.0, 5.0, 3.0, 9.0])
    train(other, first, [1.0, 5.0])
    first.save(tmp_path)
    rest = started(other, 3, tmp_path)
    train(other, rest, [3.0, 9.0])
    assert averaged(other, rest) == averaged(model, whole)


def test_a_checkpoint_without_average_starts_one(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    average = started(model, 10, tmp_path)
    train(model, average, [2.0, 4.0])
    assert averaged(model, average) == pytest.approx(3.0)
