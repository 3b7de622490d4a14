"""Activations against their definitions."""

import math

import pytest
import torch

from turbosparse.errors import ConfigError
from turbosparse.models.activations import ACTIVATIONS, Activation, parse_activation

GATE = torch.tensor([-2.0, -0.5, 0.0, 0.2, 1.0, 3.0])
UP = torch.tensor([1.0, -2.0, 3.0, 4.0, -0.3, 0.7])


def by_definition(name: str, threshold: float, g: float, u: float) -> float:
    return {
        "silu": g / (1 + math.exp(-g)) * u,
        "gelu": 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u,
        "relu": max(g, 0.0) * u,
        "shifted_relu": max(g - threshold, 0.0) * u,
        "relu2": max(g, 0.0) ** 2 * u,
        "fatrelu": (g if g > threshold else 0.0) * u,
        "drelu": (g if g > threshold else 0.0) * (u if u > threshold else 0.0),
    }[name]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("threshold", [0.0, 0.25])
def test_definition(name: str, threshold: float) -> None:
    if threshold and name not in ("shifted_relu", "fatrelu", "drelu"):
        with pytest.raises(ConfigError, match="threshold of 0"):
            Activation(name=name, threshold=threshold)
        return
    result = Activation(name=name, threshold=threshold)(GATE, UP)
    expected = [
        by_definition(name, max(threshold, 0.0), g, u)
        for g, u in zip(GATE.tolist(), UP.tolist(), strict=True)
    ]
    torch.testing.assert_close(result, torch.tensor(expected))


def test_drelu_is_zero_unless_both_are_positive() -> None:
    result = Activation(name="drelu")(GATE, UP)
    assert torch.equal(result != 0, (GATE > 0) & (UP > 0))


@pytest.mark.parametrize("text", ["drelu", "fatrelu:0.01", "shifted_relu:1"])
def test_parse_and_print_are_inverse(text: str) -> None:
    assert str(parse_activation(text)) == text


@pytest.mark.parametrize(
    "text", ["drolu", "fatrelu:much", "relu:0.1", "fatrelu:-1", "drelu:nan", "fatrelu:inf", ""]
)
def test_bad_names(text: str) -> None:
    with pytest.raises(ConfigError, match=r"\[activation\] expected"):
        parse_activation(text)


def test_aliases() -> None:
    assert parse_activation("reglu") == Activation(name="relu")
    assert parse_activation("swiglu").is_sparse is False
