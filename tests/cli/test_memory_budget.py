"""Verbs within a memory budget: experts on disk give what they give in memory, and too little is refused."""

import json
import re
from pathlib import Path

import pytest

from tests.bundled_model import make_bundled
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.cli.main import main

MODEL = TinyModel(
    activation="drelu",
    down_t=True,
    weight_type="Q8_0",
    experts=8,
    intermediate_size=320,
    num_hidden_layers=6,
    predictor="low_rank",
)
TEXT = "the cat and the hat and the rat in the land of the other men and then some. " * 4


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder / "plain.gguf", MODEL)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return make_bundled(folder / "plain.gguf", folder / "bundles.gguf")


def least(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The budget that a verb asks for when it gets too little."""
    assert main([*command, "--memory-budget", "1MiB"]) == 2
    error = capsys.readouterr().err
    found = re.search(r"\[memory budget\] expected at least (\d+) MiB .*, got 1 MiB", error)
    assert found is not None, error
    return f"{found[1]}MiB"


def test_run(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(bundles), "-p", "the cat", "--raw", "-n", "8", "--temp", "0", "--context", "64"]
    budget = least(command, capsys)
    assert main(command) == 0
    expected = capsys.readouterr().out
    assert main([*command, "--memory-budget", budget]) == 0
    shown = capsys.readouterr()
    assert shown.out == expected
    share = re.search(r"(\d+)% of the neurons in memory", shown.err)
    assert share is not None and 0 < int(share[1]) < 100


def test_perplexity(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(bundles.with_name("text.txt"))
    command = [
        "perplexity",
        str(bundles),
        "--text",
        text,
        "--context",
        "64",
        "--against-mode",
        "dense",
        "--json",
    ]
    assert main(command) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    budget = int(least(command, capsys).removesuffix("MiB")) + 1  # two sessions
    assert main([*command, "--memory-budget", f"{budget}MiB"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1]) == expected
    assert "of the neurons in memory" in shown.err
