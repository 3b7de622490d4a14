"""Synthetic models: what they are made to be like is what the engine computes with them."""

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from turbosparse import _native
from turbosparse.bench import synthetic_cache
from turbosparse.bench.benchmark import BenchConfig, bench_model, cases_of
from turbosparse.bench.shapes import SHAPES, Shape, SyntheticModel, shape_named
from turbosparse.bench.synthetic_cache import synthetic_files
from turbosparse.errors import ConfigError
from turbosparse.runtime.model_file import ModelFile

SMALL = Shape(
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=1024,
)
MODEL = SyntheticModel(name="small", shape=SMALL, rank=64)

COUNTS = ("candidates", "gate_passed", "active")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "turbosparse" / "synthetic"


def counts(path: Path, mode: "_native.Mode") -> dict[str, list[float]]:
    """Shares of neurons per layer, over 64 tokens of real text."""
    model = _native.Model(str(path), threads=1)
    ids = cases_of(path, BenchConfig(prompt_tokens=64, generated_tokens=0), 512)[0].timed
    session = model.session(64)
    for token in ids:
        session.forward(np.array([token], np.int32), mode=mode)
    neurons = len(ids) * model.info.token_neurons
    return {name: [n / neurons for n in session.counters[name]] for name in COUNTS}


@pytest.mark.parametrize("weight_type", ["Q4_0", "Q8_0", "F16"])
def test_every_layer_reaches_the_sparsity(weight_type: str) -> None:
    (path,) = synthetic_files(replace(MODEL, weight_type=weight_type), with_plain=False)
    shares = counts(path, "exact")
    assert shares["active"] == pytest.approx([0.1] * 3, abs=0.015)
    assert shares["gate_passed"] == pytest.approx([0.1 / 0.65] * 3, abs=0.02)
    assert _native.Model(str(path)).info.ffn_types == [weight_type]


def test_the_predictor_has_the_stated_recall_and_precision() -> None:
    model = replace(MODEL, rank=128, recall=0.9, precision=0.8)
    (path,) = synthetic_files(model, with_plain=False)
    shares = counts(path, "predicted")
    assert shares["candidates"] == pytest.approx([0.1 * 0.9 / 0.8] * 3, abs=0.015)
    assert shares["active"] == pytest.approx([0.1 * 0.9] * 3, abs=0.015)
    config = BenchConfig(modes=("predicted",), threads=(1,), prompt_tokens=64, generated_tokens=2, rounds=1)
    for row in bench_model(path, config, progress=lambda: None):
        assert row.recall == pytest.approx(0.9, abs=0.02)
        assert row.precision == pytest.approx(0.8, abs=0.02)
        assert row.predictor_bytes == 3 * (128 * 512 + 1024 * 128) // 32 * 18


def test_other_sparsities_are_reached_too() -> None:
    (path,) = synthetic_files(replace(MODEL, sparsity=0.6, layers=1), with_plain=False)
    assert counts(path, "exact")["active"] == pytest.approx([0.4], abs=0.02)


def test_hot_neurons_have_their_share_and_come_first() -> None:
    model = replace(MODEL, hot_share=0.8, bundled=True, layers=2)
    (path,) = synthetic_files(model, with_plain=False)
    shares = counts(path, "predicted")
    assert shares["active"] == pytest.approx([0.1 * 0.95] * 2, abs=0.015)
    assert shares["candidates"] == pytest.approx([0.1] * 2, abs=0.015)
    gate, up, *_ = _native.Model(str(path)).session(256).capture(np.arange(256, dtype=np.int32), [1])[0]
    active = ((gate > 0) & (up > 0)).sum(axis=0)
    assert active[:256].sum() / active.sum() == pytest.approx(0.8, abs=0.02)
    with pytest.raises(ConfigError, match="hot-share"):
        replace(MODEL, sparsity=0.85, hot_share=0.8)


def test_experts_are_as_sparse_and_all_in_use() -> None:
    shape = replace(SMALL, num_experts=4, num_experts_per_tok=2, num_hidden_layers=2)
    sparse, plain = synthetic_files(replace(MODEL, shape=shape, name="moe"), with_plain=True)
    shares = counts(sparse, "predicted")
    assert shares["active"] == pytest.approx([0.1 * 0.95] * 2, abs=0.015)
    assert shares["candidates"] == pytest.approx([0.1] * 2, abs=0.015)
    theirs = _native.Model(str(plain))
    assert (theirs.info.architecture, theirs.info.num_experts, theirs.info.num_experts_per_tok) == (
        "llama",
        4,
        2,
    )
    gate = theirs.session(64).capture(np.arange(64, dtype=np.int32), [1])[0][0]  # [T, E * F]
    used = np.any(gate.reshape(64, 4, 1024) != 0, axis=2)
    assert (used.sum(axis=1) == 2).all()
    assert (used.mean(axis=0) > 0.2).all()


def test_the_plain_model_has_the_same_sizes_and_no_trace_of_ours() -> None:
    sparse, plain = synthetic_files(MODEL, with_plain=True)
    ours, theirs = _native.Model(str(sparse)).info, _native.Model(str(plain)).info
    assert (theirs.architecture, theirs.activation, theirs.neuron_major_down) == ("llama", "silu", False)
    for size in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "ffn_types"):
        assert getattr(ours, size) == getattr(theirs, size)
    assert not any(key.startswith("turbosparse.") for key in ModelFile(plain).metadata)


def test_files_say_that_they_are_synthetic_and_are_made_once(cache: Path) -> None:
    written: list[float] = []
    (path,) = synthetic_files(MODEL, with_plain=False, progress=written.append)
    assert path.parent == cache
    assert path.name == "SYNTHETIC-small-q4_0-L3-s90-r64-95-95.gguf"
    assert _native.GgufFile(str(path)).metadata["general.name"] == "SYNTHETIC small-q4_0-L3-s90-r64-95-95"
    first, size = path.read_bytes(), sum(written)
    assert synthetic_files(MODEL, with_plain=False, progress=written.append) == [path]
    assert sum(written) == size
    path.unlink()
    synthetic_files(MODEL, with_plain=False)
    assert path.read_bytes() == first


def test_what_does_not_fit_is_refused_before_it_is_made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 0))
    with pytest.raises(ConfigError, match=r"expected 2\.\d GB of free disk, got 0\.0 GB in .*synthetic"):
        synthetic_files(MODEL, with_plain=False)
    monkeypatch.setattr(synthetic_cache, "available_memory", lambda: 10**9)
    with pytest.raises(ConfigError, match=r"expected 2\.\d GB of free memory, got 1\.0 GB; fewer --layers"):
        synthetic_files(MODEL, with_plain=False)
    assert list(cache.glob("*")) == []


def test_every_shape_can_be_asked_for() -> None:
    for name, shape in SHAPES.items():
        assert shape.hidden_size % 64 == shape.intermediate_size % 64 == 0
        assert shape.num_attention_heads % shape.num_key_value_heads == 0
        assert SyntheticModel(name=name, shape=shape_named(name), rank=512).num_hidden_layers >= 24


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_type": "Q2_K"}, r"\[bench --quant\] expected one of Q4_0, Q8_0, F16, got 'Q2_K'"),
        ({"sparsity": 1.0}, r"\[bench --sparsity\] expected 0.5 to 0.99, got 1.0"),
        ({"sparsity": float("nan")}, r"\[bench --sparsity\] expected 0.5 to 0.99, got nan"),
        ({"recall": 1.0}, r"\[bench --recall\] expected 0.5 to 0.98, got 1.0"),
        ({"sparsity": 0.6, "precision": 0.4}, r"\[bench --precision\] expected 0.48 to 0.98, got 0.4"),
        ({"rank": 100}, r"\[bench --rank\] expected a multiple of 64 from 0 to 896 for small, got 100"),
        ({"rank": 960}, r"\[bench --rank\] expected a multiple of 64 from 0 to 896 for small, got 960"),
        ({"layers": 4}, r"\[bench --layers\] expected 1 to 3, got 4"),
        ({"layers": 0}, r"\[bench --layers\] expected 1 to 3, got 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(MODEL, **settings)  # type: ignore[arg-type]


def test_an_unknown_shape_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"expected one of mistral-7b, mixtral.*smollm2-135m, got 'gpt-5'"):
        shape_named("gpt-5")
