"""How much memory the engine may take: sizes as people write them, and what the machine has free."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from turbosparse.errors import ConfigError

__all__ = ["AUTO", "automatic_budget", "forget_peak", "free_memory", "parse_size", "peak_resident_bytes"]

AUTO = "auto"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMG]I?)?B?", re.IGNORECASE)
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
        Bytes, 1 or more.

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
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise ConfigError(f"[memory budget] expected a size such as 6GiB or 800MB, got {text!r}")
    return size


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
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise ConfigError(
            "[memory budget] expected a size, got auto where /proc/meminfo is missing"
        ) from error
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([free, *_left_in_groups(Path("/proc/self/cgroup").read_text(encoding="ascii"), _GROUPS)])


def _left_in_groups(own: str, groups: Sequence[tuple[str, str, str, str]]) -> Iterator[int]:
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
                    used = int((group / used_name).read_text(encoding="ascii")) - _cached(group)
                    yield max(int(limit) - used, 0)


def _cached(group: Path) -> int:
    """Bytes of file pages in a cgroup."""
    stat = group / "memory.stat"
    lines = stat.read_text(encoding="ascii").splitlines() if stat.exists() else []
    counts = dict(line.split(maxsplit=1) for line in lines)
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


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
