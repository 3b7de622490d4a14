"""The verb demo on a tiny model: everything it promises is printed."""

import json
from pathlib import Path

import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.cli.demo_report import bar_chart
from turbosparse.cli.main import main
from turbosparse.runtime.engine import Model
from turbosparse.runtime.model_file import ModelFile


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_shows_texts_speed_sparsity_and_perplexity_of_both(
    tmp_path: Path,
    activation: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_tiny_model(tmp_path / "tiny.gguf", TinyModel(activation=activation))
    options = ["--model", str(tmp_path / "tiny.gguf"), "--cett", "0.2", "-n", "8", "-t", "1"]
    assert main(["demo", *options, "--prompt", "the thing", "--json"]) == 0
    printed = capsys.readouterr().out
    for expected in ("CETT 0.2", "dense  ", "threshold  ", "tok/s", "x dense", "perplexity on", "100% "):
        assert expected in printed
    assert ("this model uses silu" in printed) == (activation == "silu")
    record = json.loads(printed.splitlines()[-1])
    assert record["dense"]["tok_per_s"] > 0
    assert record["dense"]["ratio_to_dense"] == 1
    assert record["threshold"]["bytes_per_token"] < record["dense"]["bytes_per_token"]
    assert record["threshold"]["active_ratio"] < record["dense"]["active_ratio"] == 1
    assert len(record["threshold"]["sparsity_per_layer"]) == 2
    assert ("exact" in record) == (activation == "relu")
    if activation == "relu":
        assert record["exact"]["perplexity_ratio"] == 1
        assert record["exact"]["text"] == record["dense"]["text"]
    written = tmp_path / "cache" / "turbosparse" / "tiny.cett-0.2.gguf"
    assert record["model"] == str(written)
    assert "threshold" in ModelFile(written).modes


@pytest.mark.parametrize(("chats", "go_on"), [(True, "chat {}"), (False, 'run {} -p "Backups are one')])
def test_a_sparse_file_runs_as_it_is(
    chats: bool,
    go_on: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Model, "has_chat_template", chats)
    path = tmp_path / "sparse.gguf"
    make_tiny_model(path, TinyModel(activation="drelu", down_t=True))
    assert main(["demo", "--model", str(path), "-n", "8", "-t", "1", "--json"]) == 0
    printed = capsys.readouterr().out
    assert "Calibration" not in printed
    assert "(the same text)" in printed
    assert f"turbosparse {go_on.format(path)}" in printed
    record = json.loads(printed.splitlines()[-1])
    assert record["model"] == str(path)
    assert set(record) == {"model", "dense", "exact"}
    assert record["exact"]["mean_kl"] == pytest.approx(0, abs=1e-6)


def test_bar_chart() -> None:
    lines = bar_chart([1.0, 0.5, 0.0, 0.25, 0.75, 0.6], rows=2)
    assert lines == [
        " 100% ██      ▄▄▂▂",
        "  50% ████  ▄▄████",
        "layer 0         5",
    ]
