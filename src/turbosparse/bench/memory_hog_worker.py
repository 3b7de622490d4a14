"""Holds all memory but a limit's bytes; started by :mod:`turbosparse.bench.memory_hog`, as a file.

What it holds is written to, so that it is there, and locked where the system allows. First it holds whatever
is available beyond the limit, which drives out pages of files that nobody needs. From then on, ten times a
second, it holds more or less, so that unused memory and what the side (the parent and its other children) has
taken since the start, pages of files included, make the limit: what other programs take is let go, what they
free is held, and pages of files that others keep are not the side's loss. One JSON object per line:

    {"ready": true} once it holds enough; then a Held as a dictionary for any line; {"error": text} at the end

It ends with its input, so with its parent. Should memory run out, the kernel ends this process first.
"""

import ctypes
import json
import mmap
import os
import select
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turbosparse.errors import ConfigError, TurboSparseError
from turbosparse.runtime.memory import free_memory, unused_memory

__all__ = ["PIECE", "RESERVE", "Held", "HeldMemory", "main", "pieces_missing", "prefer_as_victim", "taken_by"]

PIECE = 16 << 20  # bytes held or let go at once, and how far off the limit is let be
MOST_PIECES = 4  # held at once, which takes some 20 ms of a CPU
RESERVE = 64 << 20  # bytes that stay available whatever a side takes
POLL_S = 0.1
FILL_S = 300  # at most, until enough is held
# Anonymous memory, shared memory and page tables: what a cgroup counts of a process beside pages of files.
_ANONYMOUS = ("RssAnon:", "RssShmem:", "VmPTE:")
_MAPPED = ("RssFile:",)
_OOM_SCORE = Path("/proc/self/oom_score_adj")


@dataclass(kw_only=True)
class Held:
    """What is held, and what a side has of the rest."""

    held_bytes: int = 0
    """At most."""
    locked: bool = True
    """Whether the system let all of it be locked."""
    left_bytes_min: int = 0
    """What the side has taken and what nobody uses, at least and at most."""
    left_bytes_max: int = 0
    taken_bytes_max: int = 0
    """What the side has taken, pages of files included."""
    anonymous_bytes_max: int = 0
    """Without those."""


class HeldMemory:
    """Memory that is really there, in pieces."""

    def __init__(self) -> None:
        self._pieces: list[mmap.mmap] = []
        self._libc = ctypes.CDLL(None)
        self.locked = True
        """Whether every piece so far could be locked."""

    @property
    def size(self) -> int:
        """What is held, in bytes."""
        return len(self._pieces) * PIECE

    def add(self) -> None:
        """Hold one piece more; an OSError says that the system gives none."""
        piece = mmap.mmap(-1, PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        piece[:: mmap.PAGESIZE] = b"\1" * (PIECE // mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(piece))
        self.locked &= self._libc.mlock(ctypes.c_void_p(start), ctypes.c_size_t(PIECE)) == 0
        self._pieces.append(piece)

    def release(self, count: int) -> None:
        """Let pieces go.

        Parameters
        ----------
        count : int
            How many; all where there are fewer.
        """
        for _ in range(min(count, len(self._pieces))):
            self._pieces.pop().close()


def prefer_as_victim(path: Path = _OOM_SCORE) -> None:
    """Let the kernel end this process before any other when memory runs out.

    Parameters
    ----------
    path : Path, optional
        Where the kernel is told so.

    Raises
    ------
    ConfigError
        Where it cannot be told, since others would be in danger.
    """
    try:
        path.write_text("1000", encoding="ascii")
        score = path.read_text(encoding="ascii").strip()
    except OSError as error:
        score = str(error.strerror)
    if score != "1000":
        raise ConfigError(
            f"[bench --memory-budget] expected to be first to go when memory runs out, got {score}"
        )


def pieces_missing(left: int, available: int, limit: int) -> int:
    """How many pieces more are to be held.

    Parameters
    ----------
    left : int
        Bytes that the side has taken or could take now.
    available : int
        Bytes that any program could have, if pages of files make room.
    limit : int
        Bytes that the side may have.

    Returns
    -------
    int
        Negative where too many are held, 0 where it is less than a piece either way.

    Examples
    --------
    >>> pieces_missing(5 << 30, 8 << 30, 4 << 30)
    64
    >>> pieces_missing(5 << 30, 0, 4 << 30) * PIECE == -RESERVE
    True
    """
    return int(min(left - limit, available - RESERVE) / PIECE)


def taken_by(process: int) -> tuple[int, int]:
    """Count what a process and its children have, this one aside.

    Parameters
    ----------
    process : int
        Its id.

    Returns
    -------
    int
        Bytes without pages of files.
    int
        Bytes of mapped pages of files.
    """
    ids = {process}
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        ids.update(map(int, _text(children).split()))
    statuses = [_text(Path(f"/proc/{one}/status")).splitlines() for one in ids - {os.getpid()}]
    lines = [line.split() for status in statuses for line in status]
    anonymous, mapped = (
        sum(int(line[1]) * 1024 for line in lines if line and line[0] in names)
        for names in (_ANONYMOUS, _MAPPED)
    )
    return anonymous, mapped


def _text(path: Path) -> str:
    """What a file of /proc says; nothing where the process has ended meanwhile."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


class _Hog:
    """Holds what is to be held beside a process."""

    def __init__(self, limit: int, most: int, process: int) -> None:
        if not Path(f"/proc/{process}/task/{process}/children").exists():  # in kernels since 4.2, if wanted
            raise ConfigError(
                "[bench --memory-budget] expected a kernel that lists a process's children, got none"
            )
        self._limit, self._most, self._process = limit, most, process
        self._begin = taken_by(process)
        self._cached = 0  # pages of files that others left
        self._memory = HeldMemory()
        self.held = Held()

    def drive_out(self) -> bool:
        """Hold some of what is available beyond the limit; whether all of that is held."""
        available = free_memory()
        missing = pieces_missing(available, available, self._limit)
        if missing <= 0 and not self._memory.size:
            raise ConfigError(
                "[bench --memory-budget] expected more free memory than the limit of "
                f"{self._limit >> 20} MiB, got {available >> 20} MiB: there is nothing to hold"
            )
        self._cached = available - unused_memory()
        return self._move(missing)

    def follow(self) -> bool:
        """Hold more or less, as the side and other programs take and free; whether it is as it should be."""
        before = taken_by(self._process)
        available, unused = free_memory(), unused_memory()
        after = taken_by(self._process)
        if abs(sum(after) - sum(before)) >= PIECE:  # the numbers would not fit together
            return False
        anonymous, mapped = after[0] - self._begin[0], after[1] - self._begin[1]
        # All that is mapped is the side's, others' pages driven out or not; so is what is there beyond these.
        taken, held = anonymous + max(mapped, available - unused - self._cached), self.held
        left = unused + taken
        held.left_bytes_min = min(held.left_bytes_min or left, left)
        held.left_bytes_max = max(held.left_bytes_max, left)
        held.taken_bytes_max = max(held.taken_bytes_max, taken)
        held.anonymous_bytes_max = max(held.anonymous_bytes_max, anonymous)
        return self._move(pieces_missing(left, available, self._limit))

    def settled(self) -> None:
        """Forget what was before the side began."""
        self.held = Held(held_bytes=self._memory.size, locked=self._memory.locked)

    def _move(self, missing: int) -> bool:
        self._memory.release(-missing)
        room = (self._most - self._memory.size) // PIECE
        for _ in range(min(missing, MOST_PIECES, room)):
            self._memory.add()
        self.held.held_bytes = max(self.held.held_bytes, self._memory.size)
        self.held.locked = self._memory.locked
        return missing <= 0 or room <= 0


def main(limit: int, most: int) -> None:
    """Hold memory until the input ends.

    Parameters
    ----------
    limit : int
        Bytes that the side may have.
    most : int
        Bytes held at most.
    """
    try:
        prefer_as_victim()
        _serve(_Hog(limit, most, os.getppid()))
    except (TurboSparseError, OSError) as error:
        _answer({"error": str(error)})


def _serve(hog: _Hog) -> None:
    deadline = time.monotonic() + FILL_S
    for step in (hog.drive_out, hog.follow):
        while not step():
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"[bench --memory-budget] expected to hold the memory within {FILL_S} s, got "
                    f"{hog.held.held_bytes >> 20} MiB"
                )
            if select.select([0], [], [], 0)[0]:  # nobody asks before it is ready: the end
                return
    hog.settled()
    hog.follow()
    _answer({"ready": True})
    while True:
        if select.select([0], [], [], POLL_S)[0]:
            if not os.read(0, 4096):
                return
            _answer(asdict(hog.held))
        hog.follow()


def _answer(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
