"""Turns, medians and ratios, with runners that do not run."""

from dataclasses import dataclass, field

import pytest

from turbosparse.bench.rounds import Case, Timing, alternate, median_ratio

CASES = [
    Case(name="pp2", warm=[], timed=[1, 2], stepwise=False),
    Case(name="tg1 @ d1", warm=[1], timed=[2], stepwise=True),
]


@dataclass
class Scripted:
    """Takes the seconds it was given, in turn, and writes down when it ran."""

    mode: str
    seconds: list[float]
    diary: list[str]
    backend: str = "turbosparse"
    seen: list[tuple[list[int], list[int], bool]] = field(default_factory=list)

    def evaluate(self, warm: list[int], timed: list[int], *, stepwise: bool) -> float:
        self.diary.append(self.mode)
        self.seen.append((warm, timed, stepwise))
        return self.seconds[(len(self.seen) - 1) % len(self.seconds)]


def test_everyone_runs_in_turn_and_backwards_every_other_round() -> None:
    diary: list[str] = []
    runners = [Scripted("dense", [1.0], diary), Scripted("threshold", [0.5], diary)]
    ticks: list[int] = []
    timings = alternate(runners, CASES[:1], 2, progress=lambda: ticks.append(1))
    assert diary == ["threshold", "dense", "dense", "threshold", "threshold", "dense"]
    assert len(ticks) == 6
    assert [timing.tok_per_s for timing in timings] == [[2.0, 2.0], [4.0, 4.0]]


def test_the_first_round_does_not_count() -> None:
    runner = Scripted("dense", [100.0, 1.0, 0.5, 0.25], [])
    (timing,) = alternate([runner], CASES[:1], 3, progress=lambda: None)
    assert timing.tok_per_s == [2.0, 4.0, 8.0]
    assert timing.median == 4.0
    assert timing.deviation == pytest.approx(3.055, abs=1e-3)


def test_cases_reach_the_runner_as_they_are() -> None:
    runner = Scripted("dense", [1.0], [])
    timings = alternate([runner], CASES, 1, progress=lambda: None)
    assert [timing.case.name for timing in timings] == ["pp2", "tg1 @ d1"]
    assert runner.seen[-2:] == [([], [1, 2], False), ([1], [2], True)]


def test_ratio_is_the_median_over_pairs_not_the_ratio_of_medians() -> None:
    def timing(*speeds: float) -> Timing:
        return Timing(runner=Scripted("dense", [1.0], []), case=CASES[0], tok_per_s=list(speeds))

    ours, base = timing(2.0, 30.0, 9.0), timing(1.0, 10.0, 9.0)
    assert median_ratio(ours, base) == 2.0
    assert median_ratio(ours, ours) == 1.0
    assert median_ratio(ours, None) is None
    assert timing(3.0).deviation == 0.0
