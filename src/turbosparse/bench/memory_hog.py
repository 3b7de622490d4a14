"""A memory limit where no cgroup can be made: another process holds the rest of the machine's memory.

Then pages of a mapped file cannot take more than the limit either. What is left, is left to all programs, so
only one side of a comparison may run at a time. Swap has to be off: nothing else keeps a side out of it.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from turbosparse.bench.memory_hog_worker import Held
from turbosparse.bench.memory_limit import LimitKind, LimitRecord, cgroup_refusal
from turbosparse.errors import ConfigError, EngineError
from turbosparse.runtime.memory import free_memory

__all__ = ["MemoryHog", "choose_limit"]

logger = logging.getLogger(__name__)

WORKER = Path(__file__).with_name("memory_hog_worker.py")
_MEMINFO = Path("/proc/meminfo")
_EVERYTHING = 1 << 62  # bytes


class MemoryHog:
    """Leaves so many bytes of the machine's memory; use it as a context.

    Parameters
    ----------
    name : str
        Of the side that may have them: this process, and those that it starts.
    size : int
        Bytes that the side may have beyond what it has now, pages of files among them.
    most : int, optional
        Bytes held at most.

    Raises
    ------
    ConfigError
        Where there is swap, no /proc/meminfo, or no more free memory than that.

    Notes
    -----
    The difference to a cgroup is precision. The kernel keeps a reserve of free pages (some 100 MB). Other
    programs are followed within some tenths of a second; where they read files meanwhile, these count as the
    side's. Where others left many pages of files, a side has to drive them out before it has all that it may.
    """

    processes: None = None
    """No cgroup to come into."""

    def __init__(self, name: str, size: int, *, most: int = _EVERYTHING) -> None:
        _require_no_swap(size)
        self.size = size
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(size), str(most)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            self._read(ConfigError)
        except BaseException:
            self.close()
            raise

    def join(self) -> None:
        """Do nothing: what is held is missing to every process."""

    def record(self) -> LimitRecord:
        """Say how the limit was kept so far.

        Returns
        -------
        LimitRecord
            With what was held, and what that left.

        Raises
        ------
        EngineError
            When the limit was not kept: the side took more, or the kernel took back what was held.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it may have said why it ended
        held = Held(**self._read(EngineError))
        if held.anonymous_bytes_max > self.size:
            raise EngineError(
                f"[bench --memory-budget] expected {self._name} to take at most {self.size >> 20} MiB, got "
                f"{held.anonymous_bytes_max >> 20} MiB, pages of files not among them"
            )
        return LimitRecord(
            kind="hog",
            limit_bytes=self.size,
            held_bytes=held.held_bytes,
            locked=held.locked,
            left_bytes_min=held.left_bytes_min,
            left_bytes_max=held.left_bytes_max,
            taken_bytes_max=held.taken_bytes_max,
        )

    def close(self) -> None:
        """Let everything go."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> "MemoryHog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, failure: type[ConfigError] | type[EngineError]) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        ended = (
            "[bench --memory-budget] expected memory to stay held, got the end of the process that held it"
        )
        message: dict[str, Any] = json.loads(line) if line else {"error": ended}
        if "error" in message:
            raise failure(message["error"])
        return message


def choose_limit(size: int) -> LimitKind:
    """Choose how each side's memory is limited, and log why where that is not a cgroup.

    Parameters
    ----------
    size : int
        Bytes that each side may have.

    Returns
    -------
    {"cgroup", "hog"}
        A cgroup where one can be made.

    Raises
    ------
    ConfigError
        Where the memory cannot be held instead.
    """
    refusal = cgroup_refusal()
    if not refusal:
        return "cgroup"
    _require_no_swap(size)
    free = free_memory()
    if free <= size:
        raise ConfigError(
            f"[bench --memory-budget] expected more free memory than a side may have ({size >> 20} MiB), so "
            f"that the rest can be held where no cgroup can be made, got {free >> 20} MiB"
        )
    logger.warning("%s; a process holds the other memory instead, one side is timed after the other", refusal)
    return "hog"


def _require_no_swap(size: int) -> None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise ConfigError(
            f"[bench --memory-budget] expected cgroups or {_MEMINFO}, got {error.strerror}"
        ) from error
    swap = next((int(line.split()[1]) for line in lines if line.startswith("SwapTotal:")), 0)
    if swap:
        raise ConfigError(
            f"[bench --memory-budget] expected no swap where no cgroup can be made, got {swap >> 10} MiB; "
            f"turn it off (swapoff -a), or compare in scopes: systemd-run --user --scope -p MemoryMax={size} "
            "-p MemorySwapMax=0 with the baseline alone, then with ours"
        )
