from pathlib import Path

import pytest

from turbosparse.errors import ConfigError
from turbosparse.runtime.memory import (
    _left_in_groups,
    automatic_budget,
    free_memory,
    parse_size,
    peak_resident_bytes,
    unused_memory,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GiB", 6 << 30), ("800 MB", 800_000_000), ("1.5g", 1_500_000_000), ("4096", 4096), ("2 KiB", 2048)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "six", "-1GiB", "0", "6 GiB of it", "1TiB", "0.1B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="6GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["1048577GiB", "9" * 400])
def test_more_than_any_machine_has(text: str) -> None:
    assert parse_size("1048576GiB") == 2**50
    with pytest.raises(ConfigError, match=r"\[memory budget\] expected at most 1048576 GiB, got '"):
        parse_size(text)


def test_own_cgroup_and_those_around_it(tmp_path: Path) -> None:
    groups = (("memory", str(tmp_path), "limit", "used"),)
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, limit, used in ((inner, "max", 10), (inner.parent, "1000", 700)):
        (folder / "limit").write_text(limit)
        (folder / "used").write_text(str(used))
    (inner.parent / "memory.stat").write_text("inactive_file 150\nactive_file 50\n")
    assert list(_left_in_groups("4:cpu,memory:/outer/inner\n0::/else\n", groups)) == [500]
    assert list(_left_in_groups("4:memory:/outer/inner\n", groups, files_make_room=False)) == [300]


def test_pages_of_files_are_free_but_not_unused() -> None:
    assert unused_memory() < free_memory()


def test_the_automatic_budget_leaves_something() -> None:
    assert 0 < automatic_budget() < free_memory()
    assert peak_resident_bytes() > 1 << 20
