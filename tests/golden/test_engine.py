"""The native engine equals the NumPy reference: architectures, weight types, modes, features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse._native import Model, Session
from turbosparse.errors import ConfigError
from turbosparse.runtime.reference import FfnTrace, ReferenceEngine

if TYPE_CHECKING:
    from turbosparse._native import Mode

IDS = np.random.default_rng(5).integers(0, 260, 24).astype(np.int32)
ZERO_ACTIVATIONS = ["relu", "relu2", "fatrelu", "drelu"]


def distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Relative difference in norm; its square is the NMSE."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def step_by_step(session: Session, ids: NDArray[np.int32], mode: Mode) -> NDArray[np.float32]:
    return np.concatenate([session.forward(ids[i : i + 1], mode=mode) for i in range(len(ids))])


def both(
    path: Path, mode: Mode = "dense", threads: int = 2
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits of a batch and step by step."""
    model = Model(str(path), threads=threads)
    batch = model.session(64).forward(IDS, mode=mode, logits="all")
    return batch, step_by_step(model.session(64), IDS, mode)


def greedy(engine: Session | ReferenceEngine, prompt: NDArray[np.int32], count: int) -> list[int]:
    tokens: list[int] = []
    logits = engine.forward(prompt)
    for _ in range(count):
        tokens.append(int(logits[-1].argmax()))
        logits = engine.forward(np.array(tokens[-1:], np.int32))
    return tokens


FEATURES = {
    "plain": TinyModel(),
    "untied": TinyModel(tied=False),
    "llama_with_bias": TinyModel(bias=True),
    "neuron_major": TinyModel(down_t=True),
    "linear_rope": TinyModel(rope_scaling_factor=4.0),
    "rope_factors": TinyModel(rope_freqs=True),
    "partial_rope": TinyModel(extra_metadata={"llama.rope.dimension_count": 8}),
    "no_gqa": TinyModel(num_key_value_heads=4),
    "one_kv_head": TinyModel(num_key_value_heads=1, num_attention_heads=2),
    "gelu": TinyModel(activation="gelu"),
    "qwen2": TinyModel(arch="qwen2"),
    "qwen3": TinyModel(arch="qwen3"),
    "qwen2_untied_without_bias": TinyModel(arch="qwen2", tied=False, bias=False),
    "qwen2_partial_rope": TinyModel(arch="qwen2", extra_metadata={"qwen2.rope.dimension_count": 8}),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_f32_logits_equal_the_reference(tmp_path: Path, feature: str) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, FEATURES[feature])
    expected = ReferenceEngine(path).forward(IDS)
    for logits in both(path):
        assert distance(logits, expected) < 1e-5


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_f32_greedy_tokens_equal_the_reference(tmp_path: Path, arch: str) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, TinyModel(arch=arch))
    tokens = greedy(Model(str(path)).session(128), IDS, 64)
    assert tokens == greedy(ReferenceEngine(path), IDS, 64)


# NMSE 5e-4 is the bound of one quantised product; two layers and the output chain seven of them.
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("weight_type", "bound"),
    [("F16", 1e-3), ("BF16", 1e-3), ("Q8_0", 0.05), ("Q4_0", 0.05), ("Q4_1", 0.06)],
)
def test_weight_types(tmp_path: Path, arch: str, weight_type: str, bound: float) -> None:
    path = tmp_path / "model.gguf"
    for down_t in (False, True):
        make_tiny_model(path, TinyModel(arch=arch, weight_type=weight_type, down_t=down_t, tied=not down_t))
        expected = ReferenceEngine(path).forward(IDS)
        for logits in both(path):
            assert distance(logits, expected) < bound


@pytest.mark.parametrize("transcode", ["F32", "Q8_0", "Q4_0"])
def test_types_without_kernel_are_transcoded(tmp_path: Path, transcode: str) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, TinyModel(weight_type="Q4_1"))
    model = Model(str(path), transcode=transcode)  # type: ignore[arg-type]
    assert model.info.transcoded == {"Q4_1": transcode}
    assert model.info.ffn_types == [transcode]
    bound = {"F32": 1e-5, "Q8_0": 0.06, "Q4_0": 0.5}[transcode]
    logits = model.session(64).forward(IDS, logits="all")
    kv_cache: Literal["f32", "f16"] = "f32" if transcode == "F32" else "f16"
    assert distance(logits, ReferenceEngine(path, kv_cache=kv_cache).forward(IDS)) < bound


@pytest.mark.parametrize("weight_type", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_read_exactly(tmp_path: Path, weight_type: str) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, TinyModel(weight_type=weight_type, hidden_size=256, intermediate_size=512))
    expected = ReferenceEngine(path, kv_cache="f32").forward(IDS)
    logits = Model(str(path), transcode="F32").session(64).forward(IDS, logits="all")
    assert distance(logits, expected) < 1e-5
    assert distance(Model(str(path)).session(64).forward(IDS, logits="all"), expected) < 0.1


@pytest.mark.parametrize("threads", [1, 2])
def test_8_bit_cache(tmp_path: Path, threads: int) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, TinyModel(hidden_size=128, num_attention_heads=4, num_key_value_heads=2))
    model = Model(str(path), threads=threads, kv_cache="q8_0")
    ids = np.tile(IDS, 5)[:100]  # more than three tiles of positions
    expected = ReferenceEngine(path, kv_cache="q8_0").forward(ids)
    whole = model.session(100).forward(ids, logits="all")
    # Queries and the shares of values are rounded to 8 bits too: as large an error again.
    bound = 1.5 * distance(expected, ReferenceEngine(path, kv_cache="f32").forward(ids))
    assert distance(whole, expected) < bound < 0.03
    assert distance(step_by_step(model.session(100), ids, "dense"), expected) < bound
    assert np.array_equal(whole, Model(str(path), kv_cache="q8_0").session(100).forward(ids, logits="all"))
    session = model.session(100)
    session.forward(ids[::-1].copy())
    session.truncate(0)  # what was there before does not matter
    assert np.array_equal(session.forward(ids, logits="all"), whole)


def test_cache_types(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, TinyModel())
    assert Model(str(path)).kv_cache == "f32"
    halves = Model(str(path), kv_cache="f16")
    assert halves.kv_cache == "f16"
    logits = halves.session(64).forward(IDS, logits="all")
    assert distance(logits, ReferenceEngine(path, kv_cache="f16").forward(IDS)) < 1e-5
    with pytest.raises(ConfigError, match=r"heads of 16 values \(q8_0 takes a multiple of 32\), got q8_0"):
        Model(str(path), kv_cache="q8_0")
    with pytest.raises(ConfigError, match=r"\[kv cache\] expected f32, f16 or q8_0, got q4_0"):
        Model(str(path), kv_cache="q4_0")


@pytest.mark.parametrize("activation", ZERO_ACTIVATIONS)
def test_exact_mode_is_dense_bit_by_bit(tmp_path: Path, activation: str) -> None:
    path = tmp_path / "model.gguf"
    param = 0.1 if activation == "fatrelu" else None
    make_tiny_model(path, TinyModel(activation=activation, activation_param=param, down_t=True))
    model = Model(str(path), threads=2)
    assert model.info.modes == ["dense", "exact"]
    session = model.session(64)
    exact = step_by_step(session, IDS, "exact")
    assert np.array_equal(exact, step_by_step(model.session(64), IDS, "dense"))
    assert distance(exact, ReferenceEngine(path).forward(IDS)) < 1e-5
    dense, exact = (model.session(64).forward(IDS, mode=m, logits="all") for m in ("dense", "exact"))
    assert np.array_equal(dense, exact)
    active = np.array(session.counters["active"]) / (len(IDS) * 160)
    assert np.all((active > 0.1) & (active < 0.6))


@pytest.mark.parametrize("activation", ["silu", "gelu", *ZERO_ACTIVATIONS])
def test_threshold_mode_equals_the_reference(tmp_path: Path, activation: str) -> None:
    path = tmp_path / "model.gguf"
    spec = TinyModel(
        activation=activation, down_t=True, threshold=0.2, gate_threshold=0.1, activation_param=0.05
    )
    make_tiny_model(path, spec)
    trace: list[FfnTrace] = []
    expected = ReferenceEngine(path).forward(IDS, "threshold", trace=trace)
    assert distance(expected, ReferenceEngine(path).forward(IDS)) > 1e-2
    for logits in both(path, "threshold"):
        assert distance(logits, expected) < 1e-5
    session = Model(str(path)).session(64)
    session.forward(IDS, mode="threshold")
    counters = session.counters
    assert counters["active"] == [np.count_nonzero(ffn.product) for ffn in trace]
    assert counters["gate_passed"] == [np.count_nonzero(abs(ffn.gate) >= 0.1) for ffn in trace]


def test_threshold_zero_is_dense(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, TinyModel(down_t=True, threshold=0.0))
    session = Model(str(path)).session(64)
    sparse = step_by_step(session, IDS, "threshold")
    assert np.array_equal(sparse, step_by_step(Model(str(path)).session(64), IDS, "dense"))
    assert session.counters["active"] == [160 * len(IDS)] * 2


def test_order_of_neurons_does_not_matter(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(160)
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    make_tiny_model(paths[0], TinyModel(down_t=True, threshold=0.2, activation="relu"))
    make_tiny_model(paths[1], TinyModel(down_t=True, threshold=0.2, activation="relu", neuron_order=order))
    for mode in ("dense", "exact", "threshold"):
        (a, _), (b, _) = (both(path, mode) for path in paths)
        assert distance(a, b) < 1e-5


def test_capture_returns_the_factors_of_every_neuron(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    weights = make_tiny_model(path, TinyModel(activation="drelu", down_t=True))
    session = Model(str(path), threads=2).session(64)
    session.forward(IDS[:4])
    captured = session.capture(IDS[4:], [1, 0])
    assert session.position == len(IDS)
    trace: list[FfnTrace] = []
    ReferenceEngine(path).forward(IDS, trace=trace)
    for (gate, up, out, residual, _), layer in zip(captured, (1, 0), strict=True):
        assert distance(gate, trace[layer].gate[4:]) < 1e-5
        assert distance(up, trace[layer].up[4:]) < 1e-5
        assert distance(out, trace[layer].out[4:]) < 1e-5
        x = residual / np.sqrt(np.square(residual).mean(axis=1, keepdims=True) + 1e-5)
        x = x * weights[f"blk.{layer}.ffn_norm.weight"]
        assert distance(gate, np.maximum(x @ weights[f"blk.{layer}.ffn_gate.weight"].T, 0)) < 1e-5
