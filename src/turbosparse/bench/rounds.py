"""Runs that take turns, so that whatever the machine does meanwhile hits every side alike."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from turbosparse.bench.runners import Runner

__all__ = ["Case", "Timing", "alternate", "median_ratio"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One test: what is evaluated."""

    name: str
    """As llama-bench names it: pp256, tg64, tg64 @ d256."""
    warm: list[int]
    """Token ids already in the cache, computed once."""
    timed: list[int]
    """Token ids that are timed."""
    stepwise: bool
    """Token by token instead of in one batch."""


@dataclass(kw_only=True)
class Timing:
    """Results of one runner on one case, in the order of the rounds."""

    runner: Runner
    case: Case
    tok_per_s: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median, tokens per second."""
        return statistics.median(self.tok_per_s)

    @property
    def deviation(self) -> float:
        """Sample standard deviation, tokens per second; 0 for a single round."""
        return statistics.stdev(self.tok_per_s) if len(self.tok_per_s) > 1 else 0.0


def alternate(
    runners: Sequence[Runner], cases: Sequence[Case], rounds: int, *, progress: Callable[[], None]
) -> list[Timing]:
    """Time every runner on every case, run by run in turn.

    Parameters
    ----------
    runners : sequence of Runner
        Sides of the comparison.
    cases : sequence of Case
        Tests.
    rounds : int
        Timed runs of each pair, at least 1; one more comes first, untimed.
    progress : callable
        Called after every run.

    Returns
    -------
    list of Timing
        By case, then by runner.

    Notes
    -----
    Every other round goes through the runners backwards, which cancels a steady drift of the clock.
    """
    timings = [Timing(runner=runner, case=case) for case in cases for runner in runners]
    for round_number in range(-1, rounds):
        for case in cases:
            group = [timing for timing in timings if timing.case is case]
            for timing in group if round_number % 2 == 0 else group[::-1]:
                seconds = timing.runner.evaluate(case.warm, case.timed, stepwise=case.stepwise)
                if round_number >= 0:
                    timing.tok_per_s.append(len(case.timed) / seconds)
                progress()
    return timings


def median_ratio(timing: Timing, base: Timing | None) -> float | None:
    """Median over rounds of one side's speed relative to another's.

    Parameters
    ----------
    timing : Timing
        The side in the numerator.
    base : Timing or None
        The side in the denominator, from the same rounds.

    Returns
    -------
    float or None
        Ratio of the pairs' speeds; None without a base.
    """
    if base is None:
        return None
    return statistics.median(a / b for a, b in zip(timing.tok_per_s, base.tok_per_s, strict=True))
