"""Recall curves beside a measurement: of the same tokens in both columns, and of experts with few of them."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.measure.twins import TEXT, make_twins
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.cli import measure_model
from turbosparse.measure.config import MeasureConfig
from turbosparse.measure.measurement import measure
from turbosparse.models.activations import Activation
from turbosparse.predict.capture import CapturedInputs
from turbosparse.predict.layers import FFNLayer, RowBytes
from turbosparse.predict.predictability import predictability, recall_curves
from turbosparse.runtime.measured_file import MeasuredFile

CONFIG = MeasureConfig(tokens=512, context=64, quality_tokens=0, sample_tokens=64, pair_neurons=4)
OPTIONS = argparse.Namespace(threads=1, predict_layers=1)


class OneFFN:
    """An FFN of random weights, and as many tokens that reached it as asked for."""

    def __init__(self, tokens: int) -> None:
        random = torch.Generator().manual_seed(0)
        gate, up, down = (torch.randn(size, generator=random) for size in ((16, 8), (16, 8), (8, 16)))
        rows = RowBytes(32, 32, 32)
        self.layers = {
            "ffn": FFNLayer(gate=gate, up=up, down=down, activation=Activation(name="relu"), row_bytes=rows)
        }
        self._rows = torch.randn((tokens, 8), generator=random).numpy().astype(np.float16)

    def capture(self, directory: Path, inputs: Sequence[str]) -> Mapping[str, CapturedInputs]:
        self._rows.tofile(directory / "rows")
        files = {"ffn_norm": directory / "rows"}
        return {"ffn": CapturedInputs(files=files, hidden_size=8, tokens_seen=512)}


@pytest.mark.parametrize("tokens", [0, 3, 7, 8])
def test_an_expert_that_few_tokens_reach_is_left_out_with_a_note(tokens: int) -> None:
    unit = {"name": "layer 0 expert 1", "thresholds": []}
    record: dict[str, Any] = {"config": {"active": None}, "units": [unit], "notes": []}
    done: list[float] = []
    curves = recall_curves(OneFFN(tokens), [0], record, layers=1, advance=done.append)
    assert done == [1]
    if tokens < 8:
        assert curves == []
        assert record["notes"] == [f"layer 0 expert 1: {tokens} tokens reached it, too few to fit predictors"]
    else:
        assert [curve["predictor"] for curve in curves] == ["sign bits", "low rank 1"]
        assert record["notes"] == []


def test_a_model_file_and_its_twin_in_torch_are_judged_on_the_same_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    twin = make_twins(path, "drelu")
    file = MeasuredFile(path, scratch=tmp_path, threads=1)
    config = dataclasses.replace(CONFIG, active=None)
    record = measure(twin, TEXT, config)
    assert record["text"]["tokens_of_the_text"] > 2 * record["text"]["tokens"]
    theirs = predictability(twin, TEXT, record, layers=1)
    ours = measure_model._predictability(file, str(path), TEXT, record, OPTIONS)
    file.close()
    for got, expected in zip(ours, theirs, strict=True):
        assert got["name"] == expected["name"]
        assert got["active_share"] == pytest.approx(expected["active_share"], abs=1e-3)
        np.testing.assert_allclose(got["recall"], expected["recall"], atol=0.01)


def test_predictors_of_a_model_file_see_the_windows_that_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the token before every window that the file asks for."""
    path = tmp_path / "tiny.gguf"
    make_tiny_model(path, TinyModel(extra_metadata={"tokenizer.ggml.add_bos_token": True}))
    file = MeasuredFile(path, scratch=tmp_path, threads=1)
    measured: list[list[int]] = []
    capture = file.capture

    def note(window: Any, watcher: Any) -> None:
        measured.append(window.tolist())
        capture(window, watcher)

    monkeypatch.setattr(file, "capture", note)
    record = measure(file, TEXT, CONFIG)
    measured = measured[-record["text"]["windows"] :]  # the sample was taken before
    shown: list[Any] = []
    monkeypatch.setattr(
        "turbosparse.predict.predictability.recall_curves", lambda ffns, *args, **options: shown.append(ffns)
    )
    measure_model._predictability(file, str(path), TEXT, record, OPTIONS)
    assert {window[0] for window in measured} == {file.bos_id}
    assert [list(window) for window in shown[0]._captured] == measured
    file.close()
