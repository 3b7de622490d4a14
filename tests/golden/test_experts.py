"""Models with experts: the native engine equals the NumPy reference, whatever the schedule."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.golden.test_engine import IDS, both, distance, greedy
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse._native import Model
from turbosparse.runtime.reference import FfnTrace, ReferenceEngine

SPARSE: dict[str, Any] = {"activation": "drelu", "down_t": True, "threshold": 0.1, "gate_threshold": 0.05}
MANY: dict[str, Any] = {"experts": 8, "experts_used": 3, "intermediate_size": 64}
MODELS = {
    "mixtral": TinyModel(experts=4),
    "one_expert": TinyModel(experts=1, experts_used=1),
    "all_experts": TinyModel(experts=3, experts_used=3),
    "neuron_major": TinyModel(experts=4, down_t=True),
    "qwen2moe": TinyModel(arch="qwen2moe", shared_intermediate_size=96, **MANY),
    "qwen3moe": TinyModel(arch="qwen3moe", **MANY),
    "olmoe": TinyModel(arch="olmoe", **MANY),
    "smallthinker": TinyModel(arch="smallthinker", **MANY),
    "smallthinker_window": TinyModel(
        arch="smallthinker",
        num_hidden_layers=5,
        extra_metadata={"smallthinker.attention.sliding_window": 4096, "smallthinker.expert_gating_func": 2},
        **MANY,
    ),
    "factors": TinyModel(
        arch="olmoe",
        extra_metadata={"olmoe.expert_weights_norm": True, "olmoe.expert_weights_scale": 2.5},
        **MANY,
    ),
    "dReLU": TinyModel(
        arch="qwen2moe", shared_intermediate_size=96, predictor="low_rank", hot=(3, 70), **SPARSE, **MANY
    ),
    "signs": TinyModel(predictor="sign", predictor_threshold=-0.05, **SPARSE, **MANY),
    "residual": TinyModel(
        activation="relu2",
        gated=False,
        down_t=True,
        predictor="low_rank",
        predictor_input="residual",
        **MANY,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_f32_logits_equal_the_reference(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, MODELS[name])
    for mode in Model(str(path)).info.modes:
        expected = ReferenceEngine(path).forward(IDS, mode)
        for logits in both(path, mode):
            assert distance(logits, expected) < 1e-5


def test_greedy_tokens_equal_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, MODELS["mixtral"])
    assert greedy(Model(str(path)).session(128), IDS, 64) == greedy(ReferenceEngine(path), IDS, 64)


# Rounding may send a token to another expert, so a bound holds for most tokens, not for the worst one.
@pytest.mark.parametrize("weight_type", ["F16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2moe", "dReLU"])
def test_weight_types(tmp_path: Path, name: str, weight_type: str) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, replace(MODELS[name], weight_type=weight_type))
    expected = ReferenceEngine(path).forward(IDS)
    for logits in both(path):
        distances = [distance(*rows) for rows in zip(logits, expected, strict=True)]
        assert np.median(distances) < 0.06


@pytest.mark.parametrize("mode", ["dense", "exact", "threshold", "predicted"])
@pytest.mark.parametrize("name", ["dReLU", "signs"])
def test_threads_change_no_bit(tmp_path: Path, name: str, mode: str) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, MODELS[name])
    expected = both(path, mode, threads=1)  # type: ignore[arg-type]
    for threads in (2, 3):
        for got, want in zip(both(path, mode, threads=threads), expected, strict=True):  # type: ignore[arg-type]
            assert np.array_equal(got, want)


def test_exact_is_dense_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, MODELS["dReLU"])
    for dense, exact in zip(both(path, "dense"), both(path, "exact"), strict=True):
        assert np.array_equal(dense, exact)


def test_counters(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, MODELS["dReLU"])
    trace: list[FfnTrace] = []
    ReferenceEngine(path).forward(IDS, "predicted", trace=trace)
    sessions = [Model(str(path)).session(64) for _ in range(2)]
    sessions[0].forward(IDS, mode="predicted")
    for i in range(len(IDS)):
        sessions[1].forward(IDS[i : i + 1], mode="predicted")
    layers = [trace[:9], trace[9:]]
    chosen = [[(ffn, ffn.factor[:, 0] != 0) for ffn in layer] for layer in layers]
    for session in sessions:
        counters = session.counters
        assert counters["candidates"] == [
            sum(int(ffn.candidates[rows].sum()) for ffn, rows in layer) for layer in chosen
        ]
        assert counters["active"] == [
            sum(int((ffn.product[rows] != 0).sum()) for ffn, rows in layer) for layer in chosen
        ]


def test_capture_has_zeros_for_experts_that_were_not_chosen(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, MODELS["qwen2moe"])
    trace: list[FfnTrace] = []
    ReferenceEngine(path).forward(IDS, trace=trace)
    gate, up, out, _, chosen = Model(str(path)).session(64).capture(IDS, [1])[0]
    layer = trace[9:]
    factors = np.hstack([ffn.factor for ffn in layer[:8]])
    assert [np.flatnonzero(row).tolist() for row in factors] == chosen.tolist()
    expected = np.concatenate([np.where(ffn.factor != 0, ffn.gate, 0) for ffn in layer], axis=1)
    assert distance(gate, expected) < 1e-5
    assert (
        distance(up, np.concatenate([np.where(ffn.factor != 0, ffn.up, 0) for ffn in layer], axis=1)) < 1e-5
    )
    assert distance(out, np.asarray(sum(ffn.factor * ffn.out for ffn in layer))) < 1e-5
