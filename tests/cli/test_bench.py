"""The verb bench: table, JSON line, result file, and how it refuses."""

import json
from pathlib import Path

import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.cli.main import main

QUICK = ("-t", "1", "-p", "8", "-n", "4", "-r", "1")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "tiny.gguf", TinyModel(down_t=True, threshold=0.05))
    return tmp_path / "tiny.gguf"


def test_table_json_and_result_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    results.mkdir()
    assert main(["bench", str(model), *QUICK, "--mode", "dense", "--json", "--output", str(results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| model")
    record = json.loads(lines[-1])
    assert [(row["test"], row["mode"], row["threads"]) for row in record["rows"]] == [
        ("pp8", "dense", 1),
        ("tg4", "dense", 1),
    ]
    assert record["command"] == "turbosparse bench tiny.gguf --mode dense -t 1 -p 8 -n 4 -d 0 -r 1"
    (written,) = results.iterdir()
    assert written.name.endswith("-tiny.json")
    assert json.loads(written.read_text()) == record


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-t", "two"), "[bench --threads] expected numbers as in 1,2, got 'two'"),
        (("-r", "0"), "[bench rounds] expected 1 to 1000, got 0"),
        (("--output", "/nowhere"), "[bench --output] expected a folder, got /nowhere"),
        (("--mode", "exact"), "can run (dense, threshold), got exact"),
        (("--isa", "mmx"), "mmx"),
    ],
)
def test_wrong_usage_is_one_line(
    model: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(model), *QUICK, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
