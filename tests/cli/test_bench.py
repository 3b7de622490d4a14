"""The verb bench: table, JSON line, result file, and how it refuses."""

import json
import re
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
    results = tmp_path / "made" / "results"
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


def test_lines_fit_a_terminal(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbosparse.cli.console.PIPE_WIDTH", 80)
    assert main(["bench", str(model), *QUICK, "--profile"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_profile_shows_every_part(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(model), *QUICK, "--profile", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    profiles = json.loads(lines[-1])["profiles"]
    assert [(profile["test"], profile["mode"]) for profile in profiles] == [
        (test, mode) for test in ("pp8", "tg4") for mode in ("dense", "threshold")
    ]
    for profile in profiles:
        times = profile["us_per_token"]
        assert all(times[part] > 0 for part in times if part != "predictor")
        assert times["predictor"] < 0.1 * sum(times.values())
    (begin,) = (n for n, line in enumerate(lines) if line.startswith("| us per token"))
    shown = [line.split("|")[1].strip() for line in lines[begin + 2 : -1]]
    assert shown == [*profiles[0]["us_per_token"], "sum"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-t", "two"), "[bench --threads] expected numbers as in 1,2, got 'two'"),
        (("-d", "deep"), "[bench --depth] expected numbers as in 1,2, got 'deep'"),
        (("-r", "0"), "[bench rounds] expected 1 to 1000, got 0"),
        (
            ("--output", "/dev/null"),
            "[/dev/null] expected a directory that can be written to, got: ",
        ),
        (("--output", "/proc"), "[/proc] expected a directory that can be written to, got: "),
        (
            ("--against", "llama.cpp", "--baseline-model", "/nowhere.gguf"),
            "[/nowhere.gguf] expected a readable model file, got No such file",
        ),
        (
            ("--against", "llama.cpp", "--baseline-model", "/"),
            "[/] expected a readable model file, got a dir",
        ),
        (("--memory-budget", "99999999999999999999GiB"), "[memory budget] expected at most 1048576 GiB"),
        (("--mode", "exact"), "can run (dense, threshold), got exact"),
        (("--isa", "mmx"), "mmx"),
        (("--io", "pread"), "[--io] expected --memory-budget beside it, got pread alone"),
        (("-t", "4000"), "[bench threads] expected 0 to "),
        (("--shape", "mistral-7b"), "[bench --shape] expected no file beside it, got "),
        (("--sparsity", "0.9"), "[bench] expected --shape together with --sparsity"),
    ],
)
def test_wrong_usage_is_one_line(
    model: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(model), *QUICK, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "[bench] expected a MODEL, a --shape or --roofline, got none of them"),
        (("--shape", "mistral"), "[bench --shape] expected one of mistral-7b, "),
        (
            ("--shape", "mistral-7b", "--quant", "q3"),
            "expected one of Q4_0, Q8_0, F16, got 'Q3'",
        ),
        (
            ("--shape", "mistral-7b", "--rank", "77"),
            "[bench --rank] expected a multiple of 64 from 0 to 8064",
        ),
    ],
)
def test_wrong_usage_without_a_file(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_roofline_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--roofline", "-t", "1", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "10 % of rows of 4 KiB" in lines[0]
    assert lines[2].startswith("| 1 thread ")
    record = json.loads(lines[-1])
    assert record["rows"] == []
    (roofline,) = record["roofline"]
    assert roofline["stream_gb_per_s"] > 0
    assert all(roofline["rows_gb_per_s"][size] > 0 for size in ("2048", "4096", "8192"))


def test_synthetic_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = ("--shape", "smollm2-135m", "--quant", "q8_0", "--layers", "1")
    assert main(["bench", *shape, *QUICK, "--mode", "exact", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["command"].startswith(
        "turbosparse bench --shape smollm2-135m --quant q8_0 --layers 1 --mode"
    )
    assert record["files"][0]["name"].startswith("SYNTHETIC-smollm2-135m-q8_0-L1-")
    for row in record["rows"]:
        assert row["synthetic"] is True
        assert row["active_ratio"] == pytest.approx(0.1, abs=0.02)


def test_a_budget_too_small_is_refused_before_a_file_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = ("--shape", "smollm2-135m", "--layers", "1", *QUICK)
    assert main(["bench", *shape, "--memory-budget", "1MiB"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    found = re.search(r"\[memory budget\] expected at least (\d+) MiB .* a context of 8, got 1 MiB", error)
    assert found is not None, error
    assert not list(tmp_path.rglob("*"))
    assert main(["bench", *shape, "--memory-budget", f"{found[1]}MiB"]) == 0
