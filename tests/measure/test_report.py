"""Tables and files of a report: what is in them where a measurement has gaps."""

from pathlib import Path

import pytest
import torch

from tests.measure.twins import TEXT, make_twins
from turbosparse.measure.config import MeasureConfig
from turbosparse.measure.measurement import measure
from turbosparse.measure.report import plain, write_parquet
from turbosparse.measure.summary import quality_table, tables

CONFIG = MeasureConfig(tokens=256, context=64, quality_tokens=64, sample_tokens=64, ppl_budgets=())


def test_top_k_errors_are_shown_though_the_first_layer_is_silent(tmp_path: Path) -> None:
    twin = make_twins(tmp_path / "tiny.gguf")
    with torch.no_grad():
        twin.model.model.layers[0].mlp.up_proj.weight.zero_()
    record = plain(measure(twin, TEXT, CONFIG))
    assert record["units"][0]["top_k"] == []
    [shown] = [table for table in tables([record]) if table.title.startswith("Error of the top-k rule")]
    assert shown.header == ["layer", "top 50 %", "top 30 %", "top 20 %", "top 15 %", "top 10 %"]
    assert [row[0].text for row in shown.rows] == ["layer 1"]


def test_a_perplexity_without_a_value_is_a_dash(tmp_path: Path) -> None:
    record = plain(measure(make_twins(tmp_path / "tiny.gguf"), TEXT, CONFIG))
    for point in record["quality"]:
        point |= {"dense_perplexity": None, "dense_perplexity_se": None, "perplexity": None}
    shown = quality_table([record])
    assert shown.note.startswith("Perplexity of the dense model: twin – on ")
    assert shown.rows[0][2].text == "–"


def test_parquet_tells_predictors_and_tasks_apart(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    curves = [
        {"name": "layer 1", "predictor": "sign bits", "bytes": 3},
        {"name": "layer 1", "predictor": "low rank 2", "bytes": 4},
    ]
    scores = [
        {"task": "arc", "metric": "acc", "value": 0.5},
        {"task": "arc", "metric": "acc_norm", "value": 0.6},
    ]
    record = {
        "model": {"name": "m"},
        "predictability": curves,
        "dense_tasks": scores,
        "quality": [{"label": "CETT 0.1", "tasks": scores, "curve": [1, 2]}],
    }
    write_parquet([record], tmp_path / "all.parquet")
    rows = parquet.read_table(tmp_path / "all.parquet").to_pylist()
    assert {(row["section"], row["item"], row["number"]): row["value"] for row in rows} == {
        ("predictability", "layer 1 sign bits", "bytes"): 3,
        ("predictability", "layer 1 low rank 2", "bytes"): 4,
        ("dense_tasks", "arc acc", "value"): 0.5,
        ("dense_tasks", "arc acc_norm", "value"): 0.6,
        ("quality", "CETT 0.1", "tasks.arc acc.value"): 0.5,
        ("quality", "CETT 0.1", "tasks.arc acc_norm.value"): 0.6,
        ("quality", "CETT 0.1", "curve.0"): 1,
        ("quality", "CETT 0.1", "curve.1"): 2,
    }
