"""`turbosparse inspect`: what it says about files of several kinds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.cli.main import main
from turbosparse.runtime.model_file import KEY_CALIBRATION, KEY_CETT_TARGET, ModelFile
from turbosparse.runtime.model_file_copy import copy_with
from turbosparse.runtime.model_file_writer import TensorSource, write_model_file


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
