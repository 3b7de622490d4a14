"""The search for the CETT target that spends a perplexity budget."""

import doctest
from collections.abc import Callable

import pytest

from turbosparse.errors import CalibrationError, ConfigError
from turbosparse.sparsity import budget as budget_module
from turbosparse.sparsity.budget import largest_cett_within


def counted(rise: Callable[[float], float]) -> tuple[Callable[[float], float], list[float]]:
    tried: list[float] = []

    def wrapped(target: float) -> float:
        tried.append(target)
        return rise(target)

    return wrapped, tried


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("scale", [0.02, 0.5, 4.0])
@pytest.mark.parametrize("budget", [0.01, 0.1])
def test_spends_the_budget_and_no_more(power: float, scale: float, budget: float) -> None:
    rise, tried = counted(lambda target: scale * target**power)
    found = largest_cett_within(rise, budget)
    assert found in tried
    assert rise(found) <= budget
    assert found == 0.8 or rise(found) >= 0.9 * budget or rise(found * 1.05) > budget
    assert len(tried) <= 13


def test_a_perplexity_that_first_falls() -> None:
    rise, _ = counted(lambda target: target**2 - 0.1 * target)
    found = largest_cett_within(rise, 0.01)
    assert 0.0 < rise(found) <= 0.01


def test_a_rise_that_is_not_finite_is_beyond_the_budget() -> None:
    found = largest_cett_within(lambda target: float("inf") if target > 0.15 else 0.001, 0.01)
    assert 0.14 < found <= 0.15


def test_a_target_that_cannot_be_reached_is_beyond_the_budget() -> None:
    def rise(target: float) -> float:
        if target > 0.5:
            raise CalibrationError("[layer 3] expected an error above 0.8")
        return 0.001

    assert 0.48 < largest_cett_within(rise, 0.01) <= 0.5


def test_no_target_that_can_be_reached() -> None:
    def rise(target: float) -> float:
        raise CalibrationError(f"[layer 3] expected an error above {target}")

    with pytest.raises(CalibrationError, match=r"layer 3.*0\.002"):
        largest_cett_within(rise, 0.01)


def test_a_model_that_nothing_harms_gets_the_largest_target() -> None:
    assert largest_cett_within(lambda target: 0.0, 0.01) == 0.8


def test_a_budget_that_cannot_be_met() -> None:
    with pytest.raises(CalibrationError, match=r"rise of at most 1\.00%, got 5\.00% at CETT 0\.002"):
        largest_cett_within(lambda target: 0.05, 0.01)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_a_budget_out_of_range(budget: float) -> None:
    with pytest.raises(ConfigError, match="expected above 0"):
        largest_cett_within(lambda target: 0.0, budget)


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(budget_module).failed == 0
