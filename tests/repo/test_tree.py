"""What is in the repository: text of this project, and nothing of the machine it was written on."""

import subprocess
from pathlib import Path

import pytest

from turbosparse.runtime.default_model import SHIPPED_MODEL

ROOT = Path(__file__).parents[2]
MOST_BYTES = 1_000_000
# Split, so that this file does not find itself.
MACHINE_PATHS = ("/ro" + "ot/", "/ho" + "me/", "/wo" + "rk/", "/Us" + "ers/")
TEXTS = Path("src/turbosparse/runtime/texts")  # documents written by others
MODEL = SHIPPED_MODEL.relative_to(ROOT)
MODEL_BYTES = 150_000_000


def tracked() -> list[Path]:
    """All files but the one model."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [
        path
        for name in listed.decode().split("\0")
        if name and (path := Path(name)) != MODEL and (ROOT / path).is_file()
    ]


def test_no_paths_of_a_machine() -> None:
    found = []
    for path in tracked():
        if TEXTS not in path.parents:
            text = (ROOT / path).read_text(encoding="utf-8", errors="replace")
            found += [f"{path}: {part}" for part in MACHINE_PATHS if part in text]
    assert found == []


def test_no_large_or_binary_files() -> None:
    large = [path for path in tracked() if (ROOT / path).stat().st_size > MOST_BYTES]
    binary = [path for path in tracked() if b"\0" in (ROOT / path).read_bytes()[:4096]]
    assert (large, binary) == ([], [])


def test_one_model_and_its_card() -> None:
    folder = ROOT / MODEL.parent
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", MODEL.name]
    assert (ROOT / MODEL).stat().st_size <= MODEL_BYTES
