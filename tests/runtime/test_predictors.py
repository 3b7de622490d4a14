"""Predictors in model files: added, read back, described; those that do not fit are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse import load
from turbosparse.cli.main import main
from turbosparse.errors import ModelFileError
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.predictors import (
    LayerPredictor,
    Predictors,
    StoredPredictor,
    add_predictors,
    read_predictors,
)

IDS = np.random.default_rng(5).integers(0, 260, 16).astype(np.int32)


def low_rank(*ranks: int) -> Predictors:
    rng = np.random.default_rng(1)
    return Predictors(
        kind="low_rank",
        reads="residual",
        layers=[
            LayerPredictor(
                a=rng.standard_normal((rank, 64)),
                b=rng.standard_normal((160, rank)),
                threshold=0.5 - layer,
                hot=np.array([2, 5]) if layer else None,
            )
            for layer, rank in enumerate(ranks)
        ],
        record={"method": "test", "tokens": 7, "recall": [0.9, 0.8]},
    )


SIGN = Predictors(kind="sign", reads="ffn_norm", layers=[LayerPredictor(threshold=0.1)] * 2)


@pytest.fixture
def source(tmp_path: Path) -> ModelFile:
    make_tiny_model(tmp_path / "m.gguf", TinyModel(activation="drelu", down_t=True))
    return ModelFile(tmp_path / "m.gguf")


def test_round_trip(source: ModelFile, tmp_path: Path) -> None:
    given = low_rank(32, 96)
    add_predictors(source, tmp_path / "p.gguf", given, type_name="Q8_0")
    file = ModelFile(tmp_path / "p.gguf")
    assert file.modes == ["dense", "exact", "predicted"] == load(tmp_path / "p.gguf").info.modes
    assert load(tmp_path / "p.gguf").default_mode == "predicted"
    sizes = [rank * (64 + 160) // 32 * 34 for rank in (32, 96)]
    assert read_predictors(file) == [
        StoredPredictor(threshold=0.5, rank=32, types=("Q8_0",), nbytes=sizes[0], hot=0),
        StoredPredictor(threshold=-0.5, rank=96, types=("Q8_0",), nbytes=sizes[1], hot=2),
    ]
    stored = file.dequantised("blk.1.ffn_pred_b.weight")
    expected = given.layers[1].b
    assert expected is not None
    assert np.linalg.norm(stored - expected) < 0.01 * np.linalg.norm(expected)
    assert file.tensor_bytes("blk.1.ffn_pred_hot").view(np.int32).tolist() == [2, 5]
    assert file.metadata["turbosparse.predictor.tokens"] == 7


def test_new_predictors_replace_old_ones(source: ModelFile, tmp_path: Path) -> None:
    add_predictors(source, tmp_path / "a.gguf", low_rank(32, 32))
    add_predictors(ModelFile(tmp_path / "a.gguf"), tmp_path / "b.gguf", SIGN)
    file = ModelFile(tmp_path / "b.gguf")
    assert set(file.tensors) == set(source.tensors)
    assert "turbosparse.predictor.method" not in file.metadata
    assert (
        read_predictors(file)
        == [StoredPredictor(threshold=float(np.float32(0.1)), rank=None, types=(), nbytes=2 * 160 * 8, hot=0)]
        * 2
    )
    model = load(tmp_path / "b.gguf").engine
    assert model.info.weight_bytes - load(source.path).info.weight_bytes == 2 * 2 * 160 * 8
    assert model.session(16).forward(IDS, mode="predicted").shape == (1, 267)


def test_plain_files_get_rows_of_neurons(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "plain.gguf", TinyModel(weight_type="Q4_0"))
    add_predictors(ModelFile(tmp_path / "plain.gguf"), tmp_path / "p.gguf", low_rank(32, 32))
    file = ModelFile(tmp_path / "p.gguf")
    assert file.modes == ["dense", "predicted"]
    assert file.tensor("blk.0.ffn_down_t.weight").type_name == "Q8_0"
    assert load(tmp_path / "p.gguf").engine.session(16).forward(IDS, mode="predicted").shape == (1, 267)


def changed(layer: int, **fields: object) -> Predictors:
    given = low_rank(32, 32)
    layers = list(given.layers)
    layers[layer] = replace(layers[layer], **fields)  # type: ignore[arg-type]
    return replace(given, layers=layers)


@pytest.mark.parametrize(
    ("predictors", "text"),
    [
        (low_rank(32), "[predictors] expected one for each of 2 layers, got 1"),
        (changed(1, b=None), "[predictor of layer 1] expected matrices of shape (R, 64) and (160, R), got"),
        (changed(0, a=np.zeros((32, 63))), "got (32, 63) and (160, 32)"),
        (changed(1, threshold=np.nan), "[predictor of layer 1] expected a finite threshold, got nan"),
        (changed(1, hot=np.array([5, 2])), "[predictor of layer 1] expected ascending hot neurons below 160"),
        (changed(1, hot=np.array([160])), "expected ascending hot neurons below 160"),
        (replace(low_rank(32, 32), kind="sign"), "[predictor of layer 0] expected no matrices, got"),
        (low_rank(32, 20), "[blk.1.ffn_pred_b.weight] expected rows of a multiple of 32 for Q8_0, got 20"),
    ],
)
def test_what_does_not_fit_is_refused(
    source: ModelFile, tmp_path: Path, predictors: Predictors, text: str
) -> None:
    with pytest.raises(ModelFileError) as error:
        add_predictors(source, tmp_path / "p.gguf", predictors)
    assert text in str(error.value)
    assert not (tmp_path / "p.gguf").exists()


def test_inspect_shows_cost_and_quality(
    source: ModelFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.gguf"
    add_predictors(source, path, low_rank(32, 96), type_name="F16")
    assert main(["inspect", str(path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["predictor"]
    assert (record["kind"], record["input"], record["method"]) == ("low_rank", "residual", "test")
    assert record["bytes"] == 2 * (32 + 96) * (64 + 160)
    assert record["ffn_share"] == pytest.approx(record["bytes"] / (2 * 3 * 160 * 64 * 4))
    assert [layer["rank"] for layer in record["layers"]] == [32, 96]
    assert [layer["recall"] for layer in record["layers"]] == pytest.approx([0.9, 0.8])
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    for words in ("low_rank on residual, 57.3 kB, 23.3% of the feed-forward bytes", "exact, predicted"):
        assert words in shown


def test_inspect_of_broken_predictors_is_one_line(
    source: ModelFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.gguf"
    add_predictors(source, path, SIGN)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"predictor.threshold", b"predictor.thresholt"))
    assert main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert "predictor.threshold'] expected 2 numbers, got None" in error
    assert error.count("\n") == 1


def test_the_command_line_runs_and_judges_predicted_mode(
    source: ModelFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, text = tmp_path / "p.gguf", tmp_path / "text.txt"
    text.write_text("the cat and the hat and the rat in the land. " * 8, encoding="utf-8")
    add_predictors(source, path, low_rank(32, 32))
    assert main(["perplexity", str(path), "--text", str(text), "--context", "64", "--json"]) == 0
    shown = capsys.readouterr().out.splitlines()
    record = json.loads(shown[-1])
    assert record["mode"] == "predicted"
    assert 0 < record["candidates"]["recall"] < 1
    assert 0 < record["candidates"]["precision"] < 1
    assert record["active_ratio"] < record["candidates"]["candidate_ratio"] < 1
    assert "% candidates (recall " in shown[0]
    for mode in ("dense", "exact"):
        arguments = [
            "perplexity",
            str(path),
            "--text",
            str(text),
            "--context",
            "64",
            "--mode",
            mode,
            "--json",
        ]
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["candidates"] is None
    assert main(["run", str(path), "--raw", "-p", "the cat", "-n", "3", "--mode", "predicted"]) == 0
    capsys.readouterr()
    assert main(["run", source.path, "--raw", "-p", "the cat", "-n", "3", "--mode", "predicted"]) == 2
    error = capsys.readouterr().err
    assert "can run (dense, exact), got predicted; turbosparse export --predictor writes a file" in error
