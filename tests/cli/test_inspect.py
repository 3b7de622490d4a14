"""`turbosparse inspect`: what it says about files of several kinds."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.cli.main import main
from turbosparse.runtime.model_file import KEY_CALIBRATION, KEY_CETT_TARGET, ModelFile
from turbosparse.runtime.model_file_copy import copy_with
from turbosparse.runtime.model_file_writer import TensorSource, write_model_file


def on_a_terminal(command: list[str]) -> list[str]:
    """What a terminal of 80 columns shows, without its styles."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen(command, stdout=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()]


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json"]) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record


def test_record_of_a_plain_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = make_tiny_model(tmp_path / "m.gguf", TinyModel(weight_type="Q8_0"))
    record = inspected(tmp_path / "m.gguf", capsys)
    expected = {
        "architecture": "llama",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "context_length": 256,
        "tied_embeddings": True,
        "activation": "silu",
        "gated": True,
        "modes": ["dense"],
        "tokenizer": "gpt2",
        "chat_template": True,
        "thresholds": [],
        "calibration": None,
        "parameters": sum(array.size for array in stored.values()),
        "ffn_bytes": 2 * 3 * 160 * 64 // 32 * 34,
        "file_bytes": (tmp_path / "m.gguf").stat().st_size,
    }
    assert {key: record[key] for key in expected} == expected
    assert record["ffn_share"] == pytest.approx(record["ffn_bytes"] / record["weight_bytes"])
    assert sum(total["bytes"] for total in record["types"].values()) == record["weight_bytes"]
    assert set(record["types"]) == {"Q8_0", "F32"}
    assert len(record["tensors"]) == len(stored)


def test_thresholds_and_calibration_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_model(tmp_path / "m.gguf", TinyModel(down_t=True, threshold=0.5, gate_threshold=0.25))
    source = ModelFile(tmp_path / "m.gguf")
    keys = source.stored_metadata() | {
        KEY_CETT_TARGET: 0.2,
        KEY_CALIBRATION + "tokens": 4096,
        KEY_CALIBRATION + "cett": [0.19, 0.2],
        KEY_CALIBRATION + "active_ratio": [0.25, 0.5],
        KEY_CALIBRATION + "gate_passed": [0.5, 0.75],
    }
    copy_with(source, tmp_path / "c.gguf", metadata=keys)
    record = inspected(tmp_path / "c.gguf", capsys)
    assert record["thresholds"][1] == {
        "layer": 1,
        "median_threshold": 0.5,
        "median_gate_threshold": 0.25,
        "cett": pytest.approx(0.2),
        "gate_passed": 0.75,
        "active_ratio": 0.5,
    }
    assert record["calibration"]["tokens"] == 4096
    assert main(["inspect", str(tmp_path / "c.gguf")]) == 0
    shown = capsys.readouterr().out
    assert "dense, threshold" in shown
    assert "25.0%  █████\n" in shown
    assert "tokens        4096" in shown


def test_a_predictor_takes_one_line_of_a_terminal(tmp_path: Path) -> None:
    shape = TinyModel(down_t=True, predictor="low_rank", hot=(3, 5), intermediate_size=1024)
    make_tiny_model(tmp_path / "plain.gguf", shape)
    source = ModelFile(tmp_path / "plain.gguf")
    ratios = ("recall", "precision", "candidate_ratio", "active_ratio")
    measured = {f"turbosparse.predictor.{name}": [1.0, 0.5] for name in ratios}
    copy_with(source, tmp_path / "m.gguf", metadata=source.stored_metadata() | measured)
    shown = on_a_terminal([sys.executable, "-m", "turbosparse", "inspect", str(tmp_path / "m.gguf")])
    (begin,) = (n for n, line in enumerate(shown) if line.startswith("predictors per layer"))
    header, *layers = shown[begin + 1 :]
    titles = "layer rank kB share threshold hot recall precision candidates active"
    assert header.split() == titles.split()
    assert [line.split()[0] for line in layers] == ["0", "1"]
    assert [line.split()[-4:] for line in layers] == [["100.0%"] * 4, ["50.0%"] * 4]
    assert max(map(len, shown)) <= 80


def test_a_file_of_another_architecture_is_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = {"general.architecture": "mamba", "general.name": "[bold]x\x1b[2J", "mamba.block_count": 3}
    sources = [TensorSource.of_array("token_embd.weight", np.zeros((8, 32)), "Q5_1")]
    write_model_file(tmp_path / "m.gguf", metadata, sources)
    record = inspected(tmp_path / "m.gguf", capsys)
    assert (record["activation"], record["hidden_size"], record["num_hidden_layers"]) == (None, None, 3)
    assert main(["inspect", "--tensors", str(tmp_path / "m.gguf")]) == 0
    shown = capsys.readouterr().out
    assert "activation    not stated" in shown
    assert "[bold]x\ufffd[2J" in shown
    assert "token_embd.weight  Q5_1  8 x 32    192" in shown
    assert not [line for line in shown.splitlines() if line != line.rstrip()]


def test_a_file_without_tensors_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model_file(tmp_path / "m.gguf", {"general.architecture": "llama"}, [])
    record = inspected(tmp_path / "m.gguf", capsys)
    assert (record["parameters"], record["ffn_share"], record["modes"]) == (0, 0.0, ["dense"])
    assert main(["inspect", str(tmp_path / "m.gguf")]) == 0
    assert "0 parameters" in capsys.readouterr().out


def test_a_reader_needs_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_model(tmp_path / "m.gguf")
    assert main(["inspect", str(tmp_path / "m.gguf"), "--io", "mmap"]) == 2
    assert "[--io] expected --memory-budget beside it, got mmap alone" in capsys.readouterr().err
