"""Our engine and llama.cpp timed one after the other, where the machine has no room for both at once.

Of a synthetic model and its plain twin only one file exists at a time: half the disk space. Of two files only
one is in memory, where that is held down to one side's limit.
"""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from turbosparse.bench.benchmark import BenchConfig, Row, baseline_path, bench_baseline, bench_model
from turbosparse.bench.shapes import SyntheticModel
from turbosparse.bench.synthetic_cache import synthetic_file

__all__ = ["bench_files_one_at_a_time", "bench_one_at_a_time"]

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
    return _compared(ours, theirs)


def bench_files_one_at_a_time(path: Path, config: BenchConfig, *, progress: Callable[[], None]) -> list[Row]:
    """Time our engine on its file, then llama.cpp on the baseline's.

    Parameters
    ----------
    path : Path
        Our model file.
    config : BenchConfig
        How.
    progress : callable
        Called after every run.

    Returns
    -------
    list of Row
        As from :func:`bench_one_at_a_time`.
    """
    baseline = baseline_path(path, config)
    alone = replace(config, against_llama_cpp=False, baseline_model=None)
    ours = list(bench_model(path, alone, progress=progress))
    return _compared(ours, list(bench_baseline(baseline, config, progress=progress)))


def _compared(ours: list[Row], theirs: list[Row]) -> list[Row]:
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
