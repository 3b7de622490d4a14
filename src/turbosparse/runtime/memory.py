"""How much memory the engine may take: sizes as people write them, and what the machine has free."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from turbosparse.errors import ConfigError

__all__ = [
    "AUTO",
    "automatic_budget",
    "forget_peak",
    "free_memory",
    "parse_size",
    "peak_resident_bytes",
    "unused_memory",
]

AUTO = "auto"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMG]I?)?B?", re.IGNORECASE)
_LARGEST = 2**50  # bytes: more than any machine has, and few enough to be added up in 64 bits
_RESERVE = 512 * 2**20  # bytes left to the rest of the machine, at least
# Where cgroups are mounted, and their files for the limit and for what is used: version 1, then version 2.
_GROUPS = (
    ("memory", "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("", "/sys/fs/cgroup", "memory.max", "memory.current"),
)


def parse_size(text: str) -> int:
    """Read a number of bytes.

    Parameters
    ----------
    text : str
        Such as ``6GiB``, ``800 MB`` or ``1073741824``.

    Returns
    -------
    int
        Bytes, 1 to a pebibyte.

    Raises
    ------
    ConfigError
        For anything else.

    Examples
    --------
    >>> parse_size("1.5GiB")
    1610612736
    """
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * _UNITS[(match[2] or "").upper()] if match else 0
    if size < 1:
        raise ConfigError(f"[memory budget] expected a size such as 6GiB or 800MB, got {text!r}")
    if size > _LARGEST:
        raise ConfigError(f"[memory budget] expected at most {_LARGEST // 2**30} GiB, got {text!r}")
    return int(size)


def free_memory() -> int:
    """Say how much memory a new program can have.

    Returns
    -------
    int
        Bytes: what the kernel calls available, or less where a cgroup of this process, or one around it, has
        less left. Pages of files in it count as free, since they make room.

    Raises
    ------
    ConfigError
        Where the system does not say.
    """
    return _least(files_make_room=True)


def unused_memory() -> int:
    """Say how much memory a new program can have at once, before pages of files make room.

    Returns
    -------
    int
        Bytes, as from :func:`free_memory`; below 0 by up to the kernel's reserve of free pages where pages of
        files fill everything.

    Raises
    ------
    ConfigError
        Where the system does not say.
    """
    return _least(files_make_room=False)


def _least(*, files_make_room: bool) -> int:
    """What the machine and each cgroup around this process has left, the least of them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise ConfigError(
            "[memory budget] expected a size, got auto where /proc/meminfo is missing"
        ) from error
    sizes = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}
    cached = 0 if files_make_room else sizes["Active(file)"] + sizes["Inactive(file)"]
    own = Path("/proc/self/cgroup").read_text(encoding="ascii")
    groups = _left_in_groups(own, _GROUPS, files_make_room=files_make_room)
    return min([sizes["MemAvailable"] - cached, *groups])


def _left_in_groups(
    own: str, groups: Sequence[tuple[str, str, str, str]], *, files_make_room: bool = True
) -> Iterator[int]:
    """Bytes that each cgroup around this process has left; `own` is what /proc says of where it is."""
    for line in own.splitlines():
        _, controllers, place = line.split(":", 2)
        for controller, mount, limit_name, used_name in groups:
            if controller not in controllers.split(","):
                continue
            folder = Path(mount, place.lstrip("/"))
            for group in (folder, *folder.parents):
                if not group.is_relative_to(mount) or not (group / limit_name).exists():
                    continue
                limit = (group / limit_name).read_text(encoding="ascii").strip()
                if limit != "max":
                    used = int((group / used_name).read_text(encoding="ascii"))
                    used -= _cached(group) if files_make_room else 0
                    yield max(int(limit) - used, 0)


def _cached(group: Path) -> int:
    """Bytes of file pages in a cgroup: those used often too, as where the kernel says what is available."""
    stat = group / "memory.stat"
    lines = stat.read_text(encoding="ascii").splitlines() if stat.exists() else []
    counts = dict(line.split(maxsplit=1) for line in lines)
    names = ("inactive_file", "active_file")
    return sum(int(counts.get(f"total_{name}", counts.get(name, 0))) for name in names)


def automatic_budget() -> int:
    """Choose a budget: nine tenths of the free memory, and half a gibibyte is left in any case.

    Returns
    -------
    int
        Bytes, 1 or more.
    """
    free = free_memory()
    return max(1, min(free * 9 // 10, free - _RESERVE))


def forget_peak() -> None:
    """Let `peak_resident_bytes` begin anew; without effect where the system has no way to do so."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_resident_bytes() -> int:
    """Say how much memory this process has had at most, since it began or `forget_peak`.

    Returns
    -------
    int
        Bytes that were resident at once, those of Python and of mapped files among them; 0 where the system
        does not say.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
