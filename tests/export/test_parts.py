"""Predictors and thresholds in the file, and model files as input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.export.conftest import MakeDirectory
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse import load
from turbosparse.errors import TurboSparseError
from turbosparse.export.draft import TypeChoice
from turbosparse.export.run import ExportConfig, export_model, plan_export
from turbosparse.runtime.calibration import calibrate
from turbosparse.runtime.calibration_report import CalibrationConfig
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.reference import ReferenceEngine
from turbosparse.runtime.texts import CALIBRATION, read_text

TEXT = read_text(CALIBRATION)[:3000]
D, F = 32, 64
HEADER = {"version": "1", "kind": "low_rank", "input": "ffn_norm"}


def export(source: Path, out: Path, types: TypeChoice | None = None, **settings: Any) -> ModelFile:
    config = ExportConfig(types=types or TypeChoice(), check_tokens=200, threads=1, **settings)
    report = export_model(plan_export(source, config), out, TEXT, config)
    assert report.check is None or report.check.passed
    return ModelFile(report.output)


def make_predictors(directory: Path, *, ranks: tuple[int, ...] = (5, 32), **changes: Any) -> Path:
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, rank in enumerate(ranks):
        name = f"model.layers.{layer}.mlp."
        tensors[name + "pred_a.weight"] = torch.randn(rank, D, generator=generator)
        tensors[name + "pred_b.weight"] = torch.randn(F, rank, generator=generator)
        tensors[name + "pred_threshold"] = torch.tensor([-0.5 * layer])
    header = HEADER | changes.pop("header", {})
    tensors = {name: t for name, t in (tensors | changes).items() if t is not None}
    save_file(tensors, directory / "predictors.safetensors", metadata=header)
    scores = {f"model.layers.{layer}.mlp": {"score": {"recall": 0.9 + layer / 16}} for layer in (0, 1)}
    (directory / "report.json").write_text(json.dumps({"layers": scores}), encoding="utf-8")
    return directory


def make_expert_predictors(directory: Path, *, experts: int, shared: int) -> Path:
    """Predictors of two layers of a qwen2_moe model, of rank 5 and more, with neurons of 24 and `shared`."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        ffns = {f"experts.{e}.": (24, 5 + e) for e in range(experts)} | {"shared_expert.": (shared, 7)}
        for number, (ffn, (neurons, rank)) in enumerate(ffns.items()):
            name = f"model.layers.{layer}.mlp.{ffn}"
            tensors[name + "pred_a.weight"] = torch.randn(rank, D, generator=generator)
            tensors[name + "pred_b.weight"] = torch.randn(neurons, rank, generator=generator)
            tensors[name + "pred_threshold"] = torch.tensor([layer + number / 8])
    save_file(tensors, directory / "predictors.safetensors", metadata=HEADER)
    return directory


def test_experts_have_predictors_of_their_own(
    make_directory: MakeDirectory, tmp_path: Path, f32: TypeChoice
) -> None:
    source = make_directory("qwen2_moe", activation="drelu")
    predictors = make_expert_predictors(tmp_path / "predictors", experts=4, shared=40)
    file = export(source, tmp_path / "model.gguf", f32, predictors=predictors)
    assert file.tensor("blk.1.ffn_pred_a_exps.weight").shape == (4, 32, D)
    assert file.tensor("blk.1.ffn_pred_b_exps.weight").shape == (4, 24, 32)
    assert file.tensor("blk.1.ffn_pred_b_shexp.weight").shape == (40, 32)
    assert file.metadata["turbosparse.predictor.threshold"] == [
        layer + number / 8 for layer in range(2) for number in range(5)
    ]
    ids = np.arange(20, dtype=np.int32)
    expected = ReferenceEngine(file.path).forward(ids, "predicted")
    got = load(file.path, threads=1).logits(ids.tolist(), mode="predicted")
    assert np.linalg.norm(got - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.fixture
def f32() -> TypeChoice:
    return TypeChoice(weights="F32", predictor="F32")


def test_predictors_come_back(make_directory: MakeDirectory, tmp_path: Path, f32: TypeChoice) -> None:
    source, predictors = make_directory(activation="drelu"), make_predictors(tmp_path / "predictors")
    file = export(source, tmp_path / "out.gguf", f32, predictors=predictors, check=False)
    generator = torch.Generator().manual_seed(0)
    x = np.random.default_rng(0).standard_normal(D, np.float32)
    for layer, rank in enumerate((5, 32)):
        a, b = torch.randn(rank, D, generator=generator), torch.randn(F, rank, generator=generator)
        ours = [file.dequantised(f"blk.{layer}.ffn_pred_{part}.weight") for part in "ab"]
        assert [matrix.shape for matrix in ours] == [(32, D), (F, 32)]
        expected = b @ torch.relu(a @ torch.from_numpy(x))
        np.testing.assert_allclose(ours[1] @ np.maximum(ours[0] @ x, 0), expected, rtol=1e-4, atol=1e-4)
    assert file.metadata["turbosparse.predictor.kind"] == "low_rank"
    assert file.metadata["turbosparse.predictor.input"] == "ffn_norm"
    assert file.metadata["turbosparse.predictor.threshold"] == [0.0, -0.5]
    assert file.metadata["turbosparse.predictor.recall"] == pytest.approx([0.9, 0.9625])
    assert "turbosparse.predictor.cett" not in file.metadata
    assert file.neuron_major_down
    ids = list(range(1, 40))
    expected = ReferenceEngine(file.path).forward(np.array(ids, np.int32), mode="predicted")
    got = load(file.path, threads=1).logits(ids, mode="predicted")
    assert np.linalg.norm(got - expected) < 1e-3 * np.linalg.norm(expected)


def test_predictors_of_another_type_in_a_model_file(tmp_path: Path) -> None:
    shape = TinyModel(hidden_size=D, intermediate_size=F, activation="relu")
    make_tiny_model(tmp_path / "in.gguf", shape)
    predictors = make_predictors(tmp_path / "predictors", header={"input": "residual"})
    types = TypeChoice(predictor="Q4_0")
    file = export(tmp_path / "in.gguf", tmp_path / "out.gguf", types, predictors=predictors, check=False)
    assert file.tensor("blk.0.ffn_pred_a.weight").type_name == "Q4_0"
    assert file.tensor("blk.0.ffn_up.weight").type_name == "F32"
    assert file.metadata["turbosparse.predictor.input"] == "residual"
    names = list(file.tensors)
    assert names.index("blk.0.ffn_pred_b.weight") < names.index("blk.1.attn_norm.weight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": (4,)}, "expected a predictor for each of 2 layers, got 1"),
        ({"ranks": (4, 4, 4)}, r"expected a predictor for each of 2 layers, got 3: \[0, 1, 2\]"),
        ({"model.layers.1.mlp.pred_b.weight": None}, "expected pred_b.weight beside"),
        (
            {"model.layers.0.mlp.pred_b.weight": torch.ones(F, 7)},
            r"expected \[R, 32\] and \[64, R\] as of this",
        ),
        ({"model.layers.0.mlp.pred_a.weight": torch.ones(5, 16)}, r"got \[5, 16\] and \[64, 5\]"),
        ({"model.layers.0.mlp.pred_threshold": torch.tensor([torch.nan])}, "expected a finite number"),
        ({"model.layers.0.mlp.bias": torch.ones(4)}, "mlp.bias] expected a name as in"),
        ({"header": {"version": "2"}}, r"version\] expected 1, got '2'"),
        ({"header": {"kind": "sign"}}, r"kind\] expected low_rank, got 'sign'"),
        ({"header": {"input": "previous"}}, r"input\] expected ffn_norm or residual, got 'previous'"),
    ],
)
def test_predictors_that_do_not_fit(
    changes: dict[str, Any], message: str, make_directory: MakeDirectory, tmp_path: Path
) -> None:
    source, predictors = make_directory(activation="drelu"), make_predictors(tmp_path / "p", **changes)
    with pytest.raises(TurboSparseError, match=message.replace("bias] ", r"bias\] ")):
        plan_export(source, ExportConfig(predictors=predictors))


def test_thresholds_are_carried_to_another_type(make_directory: MakeDirectory, tmp_path: Path) -> None:
    source = make_directory(activation="drelu")
    wide = export(source, tmp_path / "f16.gguf", TypeChoice(weights="F16"))
    calibrate(wide.path, TEXT, tmp_path / "cett.gguf", CalibrationConfig(cett=0.2, tokens=256, threads=1))
    calibrated = ModelFile(tmp_path / "cett.gguf")
    assert calibrated.modes == ["dense", "exact", "threshold"]
    types = TypeChoice(weights="Q8_0")
    file = export(source, tmp_path / "q8.gguf", types, thresholds=tmp_path / "cett.gguf")
    assert file.modes == calibrated.modes
    for layer in range(2):
        for name in (f"blk.{layer}.ffn_threshold", f"blk.{layer}.ffn_gate_threshold"):
            np.testing.assert_array_equal(file.dequantised(name), calibrated.dequantised(name))
    assert file.calibration() == calibrated.calibration()


def test_calibrating_a_drelu_model_counts_its_zeros(make_directory: MakeDirectory, tmp_path: Path) -> None:
    file = export(make_directory(activation="drelu"), tmp_path / "in.gguf")
    config = CalibrationConfig(cett=0.2, tokens=256, threads=1)
    report = calibrate(file.path, TEXT, tmp_path / "out.gguf", config)
    for layer in report.ffns:
        assert 0.5 < layer.zeros < 0.95
        assert layer.active < 1 - layer.zeros


def test_thresholds_of_another_model(make_directory: MakeDirectory, tmp_path: Path) -> None:
    source = make_directory(activation="relu")
    shape = TinyModel(hidden_size=D, intermediate_size=F, down_t=True, threshold=0.1)
    for activation, message in (
        ("relu", "expected thresholds of this model, got those of one whose weights differ by 1"),
        ("drelu", r"expected thresholds of this model, \('relu', 2, \(64, 32\)\), got \('drelu', 2, "),
    ):
        make_tiny_model(tmp_path / "other.gguf", replace(shape, activation=activation))
        with pytest.raises(TurboSparseError, match=message):
            plan_export(source, ExportConfig(thresholds=tmp_path / "other.gguf"))
    make_tiny_model(tmp_path / "plain.gguf")
    with pytest.raises(TurboSparseError, match="expected a calibrated file, got one without thresholds"):
        plan_export(source, ExportConfig(thresholds=tmp_path / "plain.gguf"))


@pytest.mark.parametrize("weight_type", ["F32", "Q4_0", "Q8_0"])
def test_a_model_file_keeps_its_types(weight_type: str, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "in.gguf", TinyModel(weight_type=weight_type, tied=False))
    before = ModelFile(tmp_path / "in.gguf")
    after = export(tmp_path / "in.gguf", tmp_path / "out.gguf", name="Another")
    assert after.metadata["general.name"] == "Another"
    assert list(after.tensors) == list(before.tensors)
    for name in before.tensors:
        np.testing.assert_array_equal(after.tensor_bytes(name), before.tensor_bytes(name))


def test_a_model_file_in_another_type(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "in.gguf", TinyModel(weight_type="F32"))
    file = export(tmp_path / "in.gguf", tmp_path / "out.gguf", TypeChoice(weights="Q8_0"))
    assert {tensor.type_name for tensor in file.tensors.values() if len(tensor.shape) == 2} == {"Q8_0"}
    assert file.metadata["general.file_type"] == 7


def test_thresholds_make_a_plain_file_neuron_major(tmp_path: Path) -> None:
    shape = TinyModel(weight_type="Q4_0")
    make_tiny_model(tmp_path / "in.gguf", shape)
    config = CalibrationConfig(cett=0.2, tokens=256, threads=1)
    calibrate(tmp_path / "in.gguf", TEXT, tmp_path / "cett.gguf", config)
    file = export(tmp_path / "in.gguf", tmp_path / "out.gguf", thresholds=tmp_path / "cett.gguf")
    assert file.modes == ["dense", "threshold"]
    assert file.tensor("blk.0.ffn_down_t.weight").type_name == "Q8_0"
    assert file.tensor("blk.0.ffn_up.weight").type_name == "Q4_0"
