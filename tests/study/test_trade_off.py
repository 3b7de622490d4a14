"""A sweep: its points, what it costs to go on, and what stops it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.measure.twins import TEXT, byte_tokenizer, make_twins
from tests.tiny_hf import make_hf_model
from turbosparse.errors import ConfigError, TextError
from turbosparse.measure.hugging_face import HuggingFaceModel
from turbosparse.measure.quality_points import QualityRuns
from turbosparse.study.config import SweepStudy
from turbosparse.study.experts import check_experts, expert_tables
from turbosparse.study.store import Store
from turbosparse.study.trade_off import run_trade_off, sweep_settings, trade_off_tables

CONFIG = SweepStudy(
    model="tiny",
    output="out",
    tokens=128,
    context=64,
    sample_tokens=32,
    cett_targets=(0.2, 0.1),
    top_k=(1.0, 0.2),
    gate_shares=(0.5,),
)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceModel:
    return make_twins(tmp_path_factory.mktemp("twin") / "tiny.gguf", "drelu")


def store(folder: Path, config: SweepStudy = CONFIG) -> Store:
    return Store(folder, "trade-off", sweep_settings(config, TEXT))


def test_every_rule_is_on_the_same_axes(tmp_path: Path, twin: HuggingFaceModel) -> None:
    asked = []

    def ask(selection: Any) -> list[dict[str, Any]]:
        asked.append(selection)
        return [{"task": "quiz", "metric": "acc", "value": 0.5, "standard_error": None}]

    record = run_trade_off(twin, TEXT, CONFIG, store(tmp_path), ask=ask)
    points = {point["label"]: point for point in record["quality"]}
    assert list(points) == [
        *("CETT 0.1", "CETT 0.2", "top 100 %", "top 20 %", "gate, 50 %", "gate > 0", "nonzero"),
    ]
    assert len(asked) == len(points) + 1
    for lossless in ("top 100 %", "nonzero", "gate > 0"):  # dReLU: a closed gate is a zero
        assert points[lossless]["mean_kl"] == pytest.approx(0, abs=1e-6)
        assert points[lossless]["computed"] == pytest.approx(points["nonzero"]["computed"])
    assert points["CETT 0.2"]["computed"]["value"] < points["CETT 0.1"]["computed"]["value"] < 0.5
    for point in points.values():
        computed, read = point["computed"]["value"], point["ffn_bytes"]["value"]
        assert (1 + 2 * computed) / 3 - 1e-9 <= read <= 1
    table, tasks = trade_off_tables(record)
    assert len(table.rows) == len(points)
    assert [row[1].text for row in tasks.rows] == ["50.0 %"] * (len(points) + 1)


def test_it_goes_on_where_it_was_stopped(
    tmp_path: Path, twin: HuggingFaceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_trade_off(twin, TEXT, CONFIG, store(tmp_path / "whole"))
    run = QualityRuns.run
    done: list[str] = []
    patience = [2]

    def run_while_patient(self: QualityRuns, *args: Any) -> Any:
        if len(done) == patience[0]:
            raise KeyboardInterrupt
        done.append(args[0].label)
        return run(self, *args)

    monkeypatch.setattr(QualityRuns, "run", run_while_patient)
    with pytest.raises(KeyboardInterrupt):
        run_trade_off(twin, TEXT, CONFIG, store(tmp_path / "stopped"))
    patience[0] = 100
    resumed = run_trade_off(twin, TEXT, CONFIG, store(tmp_path / "stopped"))
    assert len(done) == len(set(done)) == len(whole["quality"])
    for got, expected in zip(resumed["quality"], whole["quality"], strict=True):
        assert {**got, "seconds": 0} == {**expected, "seconds": 0}


def test_points_can_be_added_and_tokens_not_changed(tmp_path: Path, twin: HuggingFaceModel) -> None:
    small = dataclasses.replace(CONFIG, cett_targets=(0.1,), top_k=(), gate_shares=())
    assert len(run_trade_off(twin, TEXT, small, store(tmp_path, small))["quality"]) == 3
    more = dataclasses.replace(small, top_k=(0.5,))
    assert len(run_trade_off(twin, TEXT, more, store(tmp_path, more))["quality"]) == 4
    with pytest.raises(ConfigError, match="expected the tokens that this study began with, 128, got 64"):
        store(tmp_path, dataclasses.replace(small, tokens=64))


def test_near_targets_are_points_of_their_own(tmp_path: Path, twin: HuggingFaceModel) -> None:
    config = dataclasses.replace(CONFIG, cett_targets=(0.3, 0.3004), top_k=(), gate_shares=())
    points = run_trade_off(twin, TEXT, config, store(tmp_path, config))["quality"]
    assert [point["label"] for point in points[:2]] == ["CETT 0.3", "CETT 0.3004"]
    assert len(list((tmp_path / "results").glob("CETT*"))) == 2


def test_a_short_text_is_refused(tmp_path: Path, twin: HuggingFaceModel) -> None:
    with pytest.raises(TextError, match="expected at least 64 tokens, one window"):
        run_trade_off(twin, "too short", CONFIG, store(tmp_path))


def test_inside_of_experts(tmp_path: Path, twin: HuggingFaceModel) -> None:
    with pytest.raises(ConfigError, match="expected a mixture of experts, got dense FFNs"):
        check_experts(twin)
    model = make_hf_model("qwen3_moe", max_position_embeddings=64)
    mixture = HuggingFaceModel(model, byte_tokenizer(), name="mixture")
    check_experts(mixture)
    config = dataclasses.replace(CONFIG, cett_targets=(0.2,), top_k=(0.5, 0.2), gate_shares=())
    record = run_trade_off(mixture, TEXT, config, store(tmp_path, config))
    assert len(record["top_k_errors"]) == 2 * 4
    [table] = expert_tables(record)
    assert [row[0].text for row in table.rows] == ["layer 0", "layer 1"]
    for row in table.rows:  # keeping fewer neurons errs more
        assert float(row[1].text.split()[0]) < float(row[2].text.split()[0])
    assert "2 of 4 experts" in table.note


def test_the_shared_expert_is_none_of_the_experts() -> None:
    def unit(expert: int | None, error: float) -> dict[str, Any]:
        return {"name": "", "layer": 0, "expert": expert, "errors": [{"share": 0.5, "cett": error}]}

    record = {
        "model": {"experts_per_token": 1, "num_experts": 2},
        "top_k_errors": [unit(0, 0.1), unit(1, 0.3), unit(None, 0.9)],
    }
    [table] = expert_tables(record)
    assert [cell.text for cell in table.rows[0]] == ["layer 0", "0.200 (0.100–0.300)"]
