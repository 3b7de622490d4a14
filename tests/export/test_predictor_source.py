"""Predictors fitted from a model file: the engine sees what torch sees, and runs what was chosen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.export.conftest import MakeDirectory
from tests.tiny_hf import make_texts
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse import load
from turbosparse.cli.main import main
from turbosparse.errors import ConfigError, ModelFileError, TextError
from turbosparse.export.draft import TypeChoice
from turbosparse.export.predictor_source import ModelFileSource
from turbosparse.export.run import ExportConfig, export_model, plan_export
from turbosparse.models.registry import load_model
from turbosparse.predict.capture import capture_inputs
from turbosparse.predict.config import PredictorConfig
from turbosparse.predict.layers import layers_of
from turbosparse.runtime.model_file import ModelFile

KINDS = ("ffn_norm", "residual")
CONFIG = PredictorConfig(ranks=(32,), inputs=KINDS, rivals=("sign_bits",), predictor_type="F32")
TEXT = " and the cat sat on the mat in the end" * 80


@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe"])
def test_the_engine_captures_what_torch_captures(
    model_type: str, make_directory: MakeDirectory, tmp_path: Path
) -> None:
    directory, path = make_directory(model_type, activation="drelu"), tmp_path / "model.gguf"
    config = ExportConfig(types=TypeChoice(weights="F32"), check=False)
    export_model(plan_export(directory, config), path, TEXT, config)
    source = ModelFileSource(path, [TEXT], [], CONFIG, tokens=70, window=32, threads=1)
    ours = source.capture(tmp_path / "ours", KINDS)
    model = load_model(directory, dtype=torch.float32)
    ids = load(path, threads=1).text_ids(TEXT)
    middle = len(ids) // 32 // 2 * 32
    windows = [{"input_ids": torch.tensor([ids[at : at + 32]])} for at in (0, middle)]
    theirs = capture_inputs(model, windows, tmp_path / "theirs", KINDS)
    layers = layers_of(model, "F32")
    assert set(ours) == set(theirs) == set(source.layers) == set(layers)
    for name, inputs in ours.items():
        assert inputs.tokens_seen == theirs[name].tokens_seen == 64
        for kind in KINDS:
            expected = theirs[name].open(kind).astype(np.float32)
            assert len(expected) == 64 or "experts" in name
            np.testing.assert_allclose(inputs.open(kind), expected, rtol=2e-3, atol=2e-3)
        layer, expected_layer = source.layers[name], layers[name]
        assert layer.row_bytes == expected_layer.row_bytes
        for part in ("gate", "up", "down"):
            assert torch.equal(getattr(layer, part), getattr(expected_layer, part))


@pytest.mark.parametrize("thresholds", [True, False])
def test_the_verb(thresholds: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text = tmp_path / "model.gguf", make_texts(tmp_path)["text"]
    limit = 0.1 if thresholds else None
    make_tiny_model(path, TinyModel(activation="drelu", down_t=True, threshold=limit, gate_threshold=limit))
    arguments = [str(path), f"--text={text}", f"--output={tmp_path / 'out'}", "--tokens=1500", "--ranks=32"]
    arguments += [
        "--steps=60",
        "--batch-tokens=64",
        "--sequence-length=64",
        "--ppl-budget=20%",
        "--threads=1",
    ]
    assert main(["fit-predictor", *arguments, "--inputs=ffn_norm,residual", "--predictor-type=F32"]) == 0
    assert "cheaper: " in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert set(report["rivals"]) == {"low_rank_residual", "sign_bits"}
    assert report["exact_bytes_ratio"] < (0.6 if thresholds else 0.7)
    assert list(report["layers"]) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    out = tmp_path / "predicted.gguf"
    assert main(["export", str(path), f"--output={out}", f"--predictor={tmp_path / 'out'}"]) == 0
    assert "predicted" in ModelFile(out).modes
    other = tmp_path / "other.gguf"
    make_tiny_model(other, TinyModel(activation="drelu", down_t=True, seed=9))
    capsys.readouterr()
    assert main(["export", str(other), f"--output={out}", f"--predictor={tmp_path / 'out'}", "--force"]) == 2
    assert (
        "expected predictors of this model, got those of one whose weights differ" in capsys.readouterr().err
    )


def test_experts(tmp_path: Path) -> None:
    path, text = tmp_path / "model.gguf", make_texts(tmp_path)["text"]
    experts = TinyModel(
        arch="qwen2moe", activation="drelu", experts=4, intermediate_size=64, shared_intermediate_size=96
    )
    make_tiny_model(path, experts)
    out = tmp_path / "out"
    options = [
        "--tokens=1000",
        "--ranks=32",
        "--steps=20",
        "--batch-tokens=64",
        "--sequence-length=64",
        "--threads=1",
    ]
    options += ["--ppl-budget=20%", "--predictor-type=F32", "--rivals=sign_bits"]
    assert main(["fit-predictor", str(path), f"--text={text}", f"--output={out}", *options]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    names = [f"experts.{expert}" for expert in range(4)] + ["shared_expert"]
    assert list(report["layers"]) == [
        f"model.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in names
    ]
    assert set(report["rivals"]) == {"sign_bits"}
    predicted = tmp_path / "predicted.gguf"
    assert main(["export", str(path), f"--output={predicted}", f"--predictor={out}"]) == 0
    file = ModelFile(predicted)
    assert file.modes == ["dense", "exact", "predicted"]
    assert file.tensor("blk.1.ffn_pred_b_exps.weight").shape == (4, 64, 32)
    words = text.read_text(encoding="utf-8")[:400]
    found = load(predicted, threads=1).perplexity(words, mode="predicted", context=64)
    assert np.isfinite(found.perplexity)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": ("previous",)}, r"\[predictor.inputs\] expected ffn_norm and residual for a model file"),
        ({"rivals": ("oracle",)}, r"\[predictor.rivals\] expected sign_bits for a model file"),
        ({"finetune_steps": 3}, r"\[predictor.finetune_steps\] expected 0 for a model file"),
    ],
)
def test_what_a_model_file_cannot_hold(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    config = PredictorConfig(**{"rivals": (), **changes})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        ModelFileSource(tmp_path / "none.gguf", [TEXT], [], config, tokens=64, window=32)


def test_too_little_text(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model.gguf")
    with pytest.raises(TextError, match="two held out, got 1 and 1: give"):
        ModelFileSource(tmp_path / "model.gguf", ["a" * 66], [], CONFIG, tokens=64, window=32)


def test_all_texts_are_captured_and_held_out_from(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path)
    first, second = "a" * 32 * 40, "b" * 32 * 30
    source = ModelFileSource(path, [first, second], [], CONFIG, tokens=32 * 8, window=32, threads=1)
    captured = source.capture(tmp_path / "captured", KINDS)["model.layers.0.mlp"]
    assert captured.tokens_seen == 32 * 8
    inputs = captured.open("ffn_norm").reshape(8, 32, -1)
    texts = [int(np.abs(window[0] - inputs[0][0]).max() > 1e-3) for window in inputs]
    assert texts == [0, 1] * 4  # in turn, so that its end has both
    few = ModelFileSource(path, ["a" * 32 * 20], [], CONFIG, tokens=32 * 99, window=32, threads=1)
    assert few.capture(tmp_path / "few", KINDS)["model.layers.0.mlp"].tokens_seen == 32 * 18


def test_labels_of_an_activation_without_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text = tmp_path / "model.gguf", make_texts(tmp_path)["text"]
    make_tiny_model(path)
    arguments = [str(path), f"--text={text}", f"--output={tmp_path / 'out'}", "--tokens=64", "--ranks=32"]
    assert main(["fit-predictor", *arguments, "--sequence-length=32", "--threads=1"]) == 2
    assert "[predictor.labels] expected cett for silu" in capsys.readouterr().err


def test_a_file_without_gate(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model.gguf", TinyModel(activation="relu2", gated=False, down_t=True))
    with pytest.raises(ModelFileError, match="expected gated FFNs"):
        ModelFileSource(tmp_path / "model.gguf", [TEXT], [], CONFIG, tokens=64, window=32)
