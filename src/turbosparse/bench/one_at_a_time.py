"""A synthetic model and its plain twin, made, timed and deleted one after the other: half the disk space."""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from turbosparse.bench.benchmark import BenchConfig, Row, bench_baseline, bench_model
from turbosparse.bench.shapes import SyntheticModel
from turbosparse.bench.synthetic_cache import synthetic_file

__all__ = ["bench_one_at_a_time"]

Progress = Callable[[str], AbstractContextManager[Callable[[float], None]]]


def bench_one_at_a_time(
    model: SyntheticModel,
    config: BenchConfig,
    *,
    progress: Progress = lambda label: nullcontext(lambda amount: None),
) -> list[Row]:
    """Time our engine, then llama.cpp.

    Parameters
    ----------
    model : SyntheticModel
        What is timed.
    config : BenchConfig
        How.
    progress : callable, optional
        Given a label, returns a context whose value is called as work gets done: with the bytes written of a
        file, or 1 after every run.

    Returns
    -------
    list of Row
        Ours, with the ratio of the medians as its speed relative to llama.cpp, then those of llama.cpp.
    """
    alone = replace(config, against_llama_cpp=False)
    with _file_for_now(model, progress, plain=False) as path, progress("timing it") as advance:
        ours = list(bench_model(path, alone, progress=lambda: advance(1)))
    with _file_for_now(model, progress, plain=True) as path, progress("timing llama.cpp") as advance:
        theirs = list(bench_baseline(path, config, progress=lambda: advance(1)))
    return [replace(row, ratio_to_baseline=_ratio(row, theirs)) for row in ours] + theirs


@contextlib.contextmanager
def _file_for_now(model: SyntheticModel, progress: Progress, *, plain: bool) -> Iterator[Path]:
    with progress("making the plain model" if plain else "making the synthetic model") as advance:
        path = synthetic_file(model, plain=plain, progress=advance)
    try:
        yield path
    finally:
        path.unlink()


def _ratio(row: Row, baselines: list[Row]) -> float:
    base = next(other for other in baselines if (other.test, other.threads) == (row.test, row.threads))
    return row.tok_per_s / statistics.median(base.rounds_tok_per_s)
