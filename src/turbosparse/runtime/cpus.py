"""How many threads may compute: the CPUs that this process is allowed to run on."""

import os

from turbosparse.errors import ConfigError

__all__ = ["available_cpus", "check_threads"]


def available_cpus() -> int:
    """Count the logical CPUs that this process may use.

    Returns
    -------
    int
        At least 1.
    """
    return len(os.sched_getaffinity(0))


def check_threads(threads: int | None) -> int:
    """Check a number of threads that a user asks for.

    Parameters
    ----------
    threads : int or None
        1 or more, at most `available_cpus`; None lets the engine choose.

    Returns
    -------
    int
        The number, 0 for None.

    Raises
    ------
    ConfigError
        If it is out of that range: threads that share a CPU wait for each other at every barrier.
    """
    if threads is None:
        return 0
    if not 1 <= threads <= available_cpus():
        raise ConfigError(f"[threads] expected 1 to {available_cpus()} (CPUs of this process), got {threads}")
    return threads
