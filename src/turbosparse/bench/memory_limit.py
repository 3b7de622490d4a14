"""A memory limit that the kernel enforces: a cgroup of its own for each side of a comparison, without swap.

What a process in it maps from a file counts while it is cached; what was in the page cache before does not,
so files are dropped from there first. Needs the right to make cgroups, which root has; where it is missing,
:mod:`turbosparse.bench.memory_hog` has the same effect.
"""

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from turbosparse.errors import ConfigError

__all__ = ["LimitKind", "LimitRecord", "MemoryLimit", "cgroup_refusal", "drop_cached_pages"]

LimitKind = Literal["cgroup", "hog"]

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class LimitRecord:
    """How a side's memory was limited. A cgroup says its size alone; the rest is None."""

    kind: LimitKind
    """A cgroup of its own, or a process that held the machine's other memory."""
    limit_bytes: int
    held_bytes: int | None = None
    """By that process, at most."""
    locked: bool | None = None
    """Whether all of that was locked."""
    left_bytes_min: int | None = None
    """What the side had taken and what nobody used while it ran, at least and at most."""
    left_bytes_max: int | None = None
    taken_bytes_max: int | None = None
    """What the side took of it at most, pages of files included."""


class MemoryLimit:
    """A cgroup that allows so many bytes; use it as a context. Processes are back where they were at its end.

    Parameters
    ----------
    name : str
        Part of the cgroup's name.
    size : int
        Bytes.

    Raises
    ------
    ConfigError
        Where no cgroup can be made.
    """

    def __init__(self, name: str, size: int) -> None:
        root = _V1 if (_V1 / "memory.limit_in_bytes").exists() else _V2
        limits = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        swap = str(size)
        if root == _V2:
            limits, swap = ("memory.max", "memory.swap.max"), "0"
        self.size = size
        self._folder = root / f"turbosparse-{os.getpid()}-{name}"
        self._outside = _own_group(root) / "cgroup.procs"
        try:
            self._folder.mkdir()
            if not (self._folder / limits[0]).exists():  # the kernel makes it, unless this is a plain folder
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            (self._folder / limits[0]).write_text(str(size), encoding="ascii")
            if (self._folder / limits[1]).exists():  # not in kernels that don't count swap
                (self._folder / limits[1]).write_text(swap, encoding="ascii")
        except OSError as error:
            if self._folder.exists():
                self._folder.rmdir()
            raise ConfigError(
                f"[bench --memory-budget] expected the right to make cgroups under {root}, got "
                f"{error.strerror}"
            ) from error

    @property
    def processes(self) -> Path:
        """Where a process writes 0 to come under the limit."""
        return self._folder / "cgroup.procs"

    def join(self) -> None:
        """Put this process under the limit; what it holds already counts elsewhere."""
        self.processes.write_text("0", encoding="ascii")

    def record(self) -> LimitRecord:
        """Say what limits the side.

        Returns
        -------
        LimitRecord
            Its size.
        """
        return LimitRecord(kind="cgroup", limit_bytes=self.size)

    def __enter__(self) -> "MemoryLimit":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes.read_text(encoding="ascii").split():
            self._outside.write_text(process, encoding="ascii")
        self._folder.rmdir()


def _own_group(root: Path) -> Path:
    """Where this process is."""
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if (root == _V1 and "memory" in controllers.split(",")) or (root == _V2 and not controllers):
            return root / path.lstrip("/")
    return root


def cgroup_refusal() -> str:
    """Try to make a cgroup.

    Returns
    -------
    str
        Why none can be made; empty where one can.
    """
    try:
        with MemoryLimit("trial", 1 << 30):
            return ""
    except ConfigError as error:
        return str(error)


def drop_cached_pages(path: Path) -> None:
    """Write a file's pages to disk and drop them from the page cache.

    Parameters
    ----------
    path : Path
        The file.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
