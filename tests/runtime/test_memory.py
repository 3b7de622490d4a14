import pytest

from turbosparse.errors import ConfigError
from turbosparse.runtime.memory import automatic_budget, free_memory, parse_size, peak_resident_bytes


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


def test_the_automatic_budget_leaves_something() -> None:
    assert 0 < automatic_budget() < free_memory()
    assert peak_resident_bytes() > 1 << 20
