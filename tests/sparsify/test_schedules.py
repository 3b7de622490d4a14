"""Schedules at their corners."""

import pytest

from turbosparse.sparsify.schedules import learning_rate_factor, ramp


def factor(step: int, **settings: float | str) -> float:
    return learning_rate_factor(
        step,
        **{"steps": 100, "warmup_steps": 10, "decay_steps": 20, "schedule": "wsd", "final": 0.1, **settings},  # type: ignore[arg-type]
    )


def test_wsd_warms_up_stays_and_decays() -> None:
    assert [factor(step) for step in (0, 4, 9, 10, 80)] == [0.1, 0.5, 1, 1, 1]
    assert factor(90) == pytest.approx(0.55)
    assert factor(100) == pytest.approx(0.1)
    assert factor(110) == pytest.approx(0.1)


def test_the_stable_phase_does_not_know_the_end() -> None:
    assert all(factor(step) == factor(step, steps=1000) for step in range(80))


def test_cosine_and_constant() -> None:
    assert factor(10, schedule="cosine") == pytest.approx(1)
    assert factor(55, schedule="cosine") == pytest.approx(0.55)
    assert factor(100, schedule="cosine") == pytest.approx(0.1)
    assert factor(99, schedule="constant") == 1


def test_ramps() -> None:
    assert ramp(0, 0) == 1
    assert [ramp(done, 10) for done in (0, 5, 10, 20)] == [0, 0.5, 1, 1]
    assert ramp(0, 10, "sine") == 0
    assert ramp(5, 10, "sine") == pytest.approx(0.5)
    assert ramp(1, 10, "sine") < ramp(1, 10)
