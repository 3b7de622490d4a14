"""Limits that the kernel enforces: a process in one cannot hold more, and is let out again."""

import subprocess
import sys
from pathlib import Path

import pytest

from turbosparse.bench.memory_limit import MemoryLimit, drop_cached_pages
from turbosparse.errors import ConfigError

HOLD = "import sys; open(sys.argv[1], 'w').write('0'); x = b'1' * {size}; print(len(x))"


def test_a_process_cannot_hold_more() -> None:
    try:
        limit = MemoryLimit("test", 64 << 20)
    except ConfigError as error:
        assert "cgroups" in str(error)
        pytest.skip(str(error))
    with limit:
        for size, fits in ((16 << 20, True), (256 << 20, False)):
            command = [sys.executable, "-c", HOLD.format(size=size), str(limit.processes)]
            assert (subprocess.run(command, capture_output=True, check=False).returncode == 0) == fits
    assert not limit.processes.exists()


def test_dropped_pages_do_not_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content" * 1000)
    drop_cached_pages(path)
    assert path.read_bytes() == b"content" * 1000
