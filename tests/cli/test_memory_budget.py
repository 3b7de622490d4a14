"""Verbs within a memory budget: experts on disk give what they give in memory, and too little is refused."""

import dataclasses
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.bundled_model import make_bundled
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.cli.main import main
from turbosparse.runtime.model_file import ModelFile

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


@pytest.mark.parametrize("verb", ["run", "chat"])
def test_the_share_in_memory_is_that_of_inspect(
    verb: str, bundles: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--memory-budget", "6MiB", "--context", "256", "-t", "1"]
    assert main(["inspect", str(bundles), *options, "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat")))
    assert main([verb, str(bundles), *options, "-n", "2"]) == 0
    share = re.search(r"(\d+)% of the neurons in memory", capsys.readouterr().err)
    assert share is not None
    assert int(share[1]) == pytest.approx(100 * memory["kept"] / memory["neurons"], abs=1)


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


def test_experts_are_exported_with_their_hotness(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, made = bundles.with_name("shared.gguf"), bundles.with_name("sorted.gguf")
    shared = dataclasses.replace(MODEL, arch="qwen2moe", weight_type="F32", shared_intermediate_size=96)
    make_tiny_model(plain, dataclasses.replace(shared, intermediate_size=64, num_hidden_layers=2))
    options = ["--layout", "bundled", "--hotness-tokens", "64", "--tokens", "64"]
    assert main(["export", str(plain), "-o", str(made), *options]) == 0
    hotness = ModelFile(made).dequantised("blk.1.ffn_hotness_exps")
    assert hotness.shape == (8, 64) and (np.diff(hotness) <= 0).all()
    assert ModelFile(made).dequantised("blk.1.ffn_hotness_shexp").shape == (96,)
    capsys.readouterr()
    records = {}
    for path in (plain, made):
        assert main(["inspect", str(path), "--json"]) == 0
        records[path] = json.loads(capsys.readouterr().out)
    added = 2 * (8 * 64 + 96)  # hotness counts as thresholds do
    assert records[made]["parameters"] == records[plain]["parameters"] + added
    assert records[made]["ffn_share"] > 0.3 and len(records[made]["predictor"]["layers"]) == 2
