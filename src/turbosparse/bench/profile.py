"""Where the time of a token goes, by part of the layers, as the engine's stopwatches have it."""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from turbosparse import _native
from turbosparse.bench.benchmark import BenchConfig, default_modes, load_for
from turbosparse.bench.filled_sessions import FilledSessions

if TYPE_CHECKING:
    from turbosparse._native import Mode
    from turbosparse.bench.rounds import Case

__all__ = ["Profile", "profile_model"]

# Parts that are left out where they took no time: most models have no router, and neurons in memory.
_WHERE_THERE_IS_ONE = ("router", "disk")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The parts of one test in one mode."""

    model: str
    threads: int
    test: str
    mode: str
    us_per_token: dict[str, float]
    """Microseconds by part, mean of the threads, median over rounds; ``barrier`` is waiting for others."""

    def as_record(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)


def profile_model(path: Path, config: BenchConfig) -> Iterator[Profile]:
    """Profile one model file.

    Parameters
    ----------
    path : Path
        Model file.
    config : BenchConfig
        Modes, threads, tests and rounds; llama.cpp takes no part.

    Yields
    ------
    Profile
        Per thread count, test and mode.
    """
    for threads in config.threads:
        model, cases = load_for(path, config, threads)
        modes = config.modes or default_modes(path, config)
        sessions = FilledSessions(model, modes[0], cases)
        for case in cases:
            for mode in modes:
                rounds = [_parts(sessions.after(case.warm), case, mode) for _ in range(config.rounds)]
                yield Profile(
                    model=path.stem,
                    threads=model.threads,
                    test=case.name,
                    mode=mode,
                    us_per_token={
                        part: statistics.median(times[part] for times in rounds)
                        for part in rounds[0]
                        if part not in _WHERE_THERE_IS_ONE or any(times[part] for times in rounds)
                    },
                )


def _parts(session: _native.Session, case: "Case", mode: "Mode") -> dict[str, float]:
    """Microseconds per token by part of one run."""
    session.reset_counters()
    session.profiling = True
    ids = np.array(case.timed, np.int32)
    for piece in np.split(ids, len(ids)) if case.stepwise else [ids]:
        session.forward(piece, mode=mode, logits="last")
    times = session.counters["decode_ns" if case.stepwise or len(ids) == 1 else "batch_ns"]
    return {part: ns / 1e3 / len(ids) for part, ns in times.items()}
