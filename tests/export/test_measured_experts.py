"""Measuring a mixture of experts: a model file in the engine, and the directory it was made from in torch."""

import math
from pathlib import Path

import pytest

from tests.export.conftest import MakeDirectory
from tests.measure.test_measurement import numbers
from tests.measure.twins import TEXT
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.cli.main import main
from turbosparse.export.draft import TypeChoice
from turbosparse.export.run import ExportConfig, export_model, plan_export
from turbosparse.measure.config import MeasureConfig
from turbosparse.measure.hugging_face import open_hugging_face
from turbosparse.measure.measurement import measure
from turbosparse.runtime.calibration import calibrate
from turbosparse.runtime.calibration_report import CalibrationConfig
from turbosparse.runtime.measured_file import MeasuredFile
from turbosparse.runtime.model_file import ModelFile
from turbosparse.study.config import SweepStudy
from turbosparse.study.store import Store
from turbosparse.study.trade_off import run_trade_off, sweep_settings

CONFIG = MeasureConfig(
    tokens=256,
    context=64,
    quality_tokens=64,
    sample_tokens=64,
    cett_targets=(0.1, 0.3),
    top_k=(0.5,),
    ppl_budgets=(),
    pair_neurons=8,
)


@pytest.mark.parametrize(("model_type", "activation"), [("mixtral", "drelu"), ("qwen2_moe", None)])
def test_engine_and_torch_agree(
    model_type: str, activation: str | None, make_directory: MakeDirectory, tmp_path: Path
) -> None:
    directory, path = make_directory(model_type, activation=activation), tmp_path / "model.gguf"
    config = ExportConfig(types=TypeChoice(weights="F32"), check=False)
    export_model(plan_export(directory, config), path, TEXT, config)
    file = MeasuredFile(path, scratch=tmp_path, threads=1)
    ours, theirs = (measure(source, TEXT, CONFIG) for source in (file, open_hugging_face(directory)))
    file.close()
    assert [unit["name"] for unit in ours["units"]] == [unit["name"] for unit in theirs["units"]]
    for part in ("overall", "units", "routing"):
        expected, got = numbers(theirs[part]), numbers(ours[part])
        assert expected.keys() == got.keys()
        off = {
            name: (value, expected[name])
            for name, value in got.items()
            if not math.isclose(value, expected[name], rel_tol=0.01, abs_tol=0.005)
            and not (math.isnan(value) and math.isnan(expected[name]))
        }
        assert off == {}
    for point, other in zip(ours["quality"], theirs["quality"], strict=True):
        assert point["label"] == other["label"]
        assert point["dense_perplexity"] == pytest.approx(other["dense_perplexity"], rel=1e-3)
        assert point["perplexity"] == pytest.approx(other["perplexity"], rel=0.01)
        assert point["mean_kl"] == pytest.approx(other["mean_kl"], rel=0.05, abs=1e-3)


def test_rules_cost_as_much_in_the_engine_as_in_torch(make_directory: MakeDirectory, tmp_path: Path) -> None:
    """A token pays for the neurons of its own experts, not for those of all."""
    directory, path = make_directory("qwen2_moe", activation="drelu"), tmp_path / "model.gguf"
    export = ExportConfig(types=TypeChoice(weights="F32"), check=False)
    export_model(plan_export(directory, export), path, TEXT, export)
    config = SweepStudy(
        model="mixture",
        output="out",
        tokens=64,
        context=64,
        sample_tokens=32,
        cett_targets=(0.2,),
        top_k=(0.3,),
        gate_shares=(0.5,),
    )
    file = MeasuredFile(path, scratch=tmp_path, threads=1)
    points = []
    for name, source in (("engine", file), ("torch", open_hugging_face(directory))):
        store = Store(tmp_path / name, "experts", sweep_settings(config, TEXT))
        points.append(run_trade_off(source, TEXT, config, store)["quality"])
    file.close()
    for ours, theirs in zip(*points, strict=True):
        for cost in ("computed", "ffn_bytes"):
            assert ours[cost]["value"] == pytest.approx(theirs[cost]["value"], abs=0.01), ours["label"]


def test_thresholds_are_carried_to_another_file(tmp_path: Path) -> None:
    plain, sparse, out = (tmp_path / f"{name}.gguf" for name in ("plain", "sparse", "out"))
    make_tiny_model(plain, TinyModel(experts=4, intermediate_size=64))
    config = CalibrationConfig(cett=0.2, tokens=128, window=64, threads=1)
    calibrate(plain, TEXT[:2000], sparse, config)
    arguments = [
        "export",
        str(plain),
        f"--output={out}",
        f"--thresholds={sparse}",
        "--type=q8_0",
        "--no-check",
    ]
    assert main(arguments) == 0
    file = ModelFile(out)
    assert file.modes == ["dense", "threshold"]
    assert file.tensor("blk.0.ffn_down_t_exps.weight").type_name == "Q8_0"
    name = "blk.1.ffn_gate_threshold_exps"
    assert bytes(file.tensor_bytes(name)) == bytes(ModelFile(sparse).tensor_bytes(name))
    make_tiny_model(tmp_path / "dense.gguf", TinyModel(intermediate_size=64))
    assert main([*arguments[:1], str(tmp_path / "dense.gguf"), *arguments[2:], "--force"]) == 2
