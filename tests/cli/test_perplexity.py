"""`turbosparse perplexity` as a user types it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.cli.main import main

TEXT = "the cat and the hat and the rat in the land of the other men and then some. " * 6


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(
        folder / "tiny.gguf", TinyModel(activation="drelu", down_t=True, threshold=0.4, gate_threshold=0.1)
    )
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(folder / "tiny.gguf"), str(folder / "text.txt")


def measure(capsys: pytest.CaptureFixture[str], files: tuple[str, str], *options: str) -> dict[str, Any]:
    assert main(["perplexity", files[0], "--text", files[1], *options, "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(record, dict)
    return record


def test_one_mode(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    record = measure(capsys, files, "--context", "64")
    assert record["mode"] == "exact"
    assert record["context"] == 64
    assert 0 < record["active_ratio"] < 1
    assert record["perplexity"] > 1
    fewer = measure(capsys, files, "--context", "64", "--tokens", "128", "--mode", "dense")
    assert fewer["tokens"] == 2 * 31
    assert fewer["active_ratio"] == 1.0


def test_against_another_mode(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--context", "64", "--mode", "threshold", "--against-mode", "dense"]
    record = measure(capsys, files, *arguments)
    assert record["mode"] == "threshold"
    assert record["against"] == measure(capsys, files, "--context", "64", "--mode", "dense")
    assert record["perplexity_ratio"] == pytest.approx(record["perplexity"] / record["against"]["perplexity"])
    assert 0 < record["mean_kl"] < record["max_kl"]
    assert 0 < record["same_top_1"] < 1
    assert main(["perplexity", files[0], "--text", files[1], *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["threshold", "dense", "ratio"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", [], "[text] expected text"),
        (b"\xff\xfe\x00", [], "expected UTF-8 text, got byte 0xff at position 0"),
        (b"short", [], "[text] expected at least 8 tokens"),
        (TEXT.encode(), ["--context", "4"], "[context] expected at least 8 tokens, got 4"),
        (TEXT.encode(), ["--context", "100000"], "[context] expected at most 256 tokens, as the model was"),
        (TEXT.encode(), ["--tokens", "0"], "[tokens] expected 1 or more, got 0"),
        (TEXT.encode(), ["--threads", "-3"], "[threads] expected 1 to "),
    ],
)
def test_bad_input(
    files: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    options: list[str],
    message: str,
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    assert main(["perplexity", files[0], "--text", str(text), *options]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("turbosparse: error: ")
    assert message in last


def test_without_a_context_windows_fit_the_model(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.txt").write_text(TEXT * 3, encoding="utf-8")
    assert measure(capsys, (files[0], str(tmp_path / "long.txt")))["context"] == 256


def test_fewer_tokens_than_a_window(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["perplexity", files[0], "--text", files[1], "--tokens", "100"]) == 0
    warning = capsys.readouterr().err.splitlines()[-1]
    assert warning.endswith("warning: 100 tokens are fewer than a window of 256: they are one window")


def test_a_missing_text(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["perplexity", files[0], "--text", "/nowhere.txt"]) == 2
    assert "[/nowhere.txt] No such file or directory" in capsys.readouterr().err
    assert main(["perplexity", files[0]]) == 2
    assert "--text" in capsys.readouterr().err
