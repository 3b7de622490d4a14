"""Experts larger than memory: on disk they give the bits that they give in memory, hot neurons come first,
and what goes wrong ends one answer.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bundled_model import CONTEXT, IDS, least_budget, logits, make_bundled
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse import _native
from turbosparse.errors import ConfigError, EngineError, ModelFileError
from turbosparse.runtime.ffns import ffn_groups, ffns_of
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.model_file_writer import TensorSource, write_model_file
from turbosparse.runtime.neuron_hotness import neuron_hotness

SPARSE: dict[str, Any] = {"activation": "drelu", "down_t": True, "threshold": 0.02, "gate_threshold": 0.01}
MANY: dict[str, Any] = {"experts": 8, "experts_used": 3, "intermediate_size": 320, "num_hidden_layers": 6}
MODELS = {
    "mixtral": TinyModel(weight_type="Q4_0", predictor="low_rank", **SPARSE, **MANY),
    "shared": TinyModel(
        arch="qwen2moe",
        weight_type="Q8_0",
        shared_intermediate_size=96,
        predictor="low_rank",
        hot=(3, 400),
        **SPARSE,
        **MANY,
    ),
    "early_router": TinyModel(
        arch="smallthinker", weight_type="Q8_0", predictor="low_rank", down_t=True, **MANY
    ),
}
SMALL = dataclasses.replace(MODELS["shared"], weight_type="F32", intermediate_size=64, num_hidden_layers=2)


@pytest.fixture(scope="module", params=MODELS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    plain = tmp_path_factory.mktemp(request.param) / "plain.gguf"
    make_tiny_model(plain, MODELS[request.param])
    return plain, make_bundled(plain, plain.with_name("bundles.gguf"))


def open_on_disk(path: Path, **options: Any) -> _native.Model:
    model = _native.Model(str(path), memory_budget=least_budget(path), context=CONTEXT, **options)
    assert model.info.memory is not None
    return model


@pytest.mark.parametrize("io", ["io_uring", "pread", "mmap"])
def test_on_disk_equals_in_memory(files: tuple[Path, Path], io: str) -> None:
    plain, bundles = files
    try:
        disk = open_on_disk(bundles, io=io)
    except ConfigError as error:
        if io != "io_uring":  # the one that a kernel may forbid
            raise
        pytest.skip(str(error))
    memory = _native.Model(str(plain))
    assert {"dense", "exact", "predicted"} <= set(memory.info.modes)
    for mode in memory.info.modes:
        for stepwise in (True, False):
            expected = logits(memory, mode, stepwise=stepwise)
            np.testing.assert_array_equal(logits(disk, mode, stepwise=stepwise), expected)


def test_few_neurons_fit_and_are_counted(files: tuple[Path, Path]) -> None:
    disk = open_on_disk(files[1])
    info, memory = disk.info, disk.info.memory
    assert memory is not None
    room = memory["pinned_neurons"] + memory["cached_neurons"]
    assert info.token_neurons <= room < info.num_hidden_layers * info.layer_neurons
    session = disk.session(CONTEXT)
    for token in np.split(IDS, len(IDS)):
        session.forward(token, mode="predicted")
    counters = session.counters
    assert sum(counters["cached"]) + sum(counters["missed"]) == sum(counters["candidates"])
    assert 0 < sum(counters["foreseen"]) <= sum(counters["missed"])


def test_a_refused_budget_says_what_is_needed(files: tuple[Path, Path]) -> None:
    enough = least_budget(files[1])
    with pytest.raises(ConfigError, match=r"of weights that stay, .* for a context of 16, .* for neurons"):
        _native.Model(str(files[1]), memory_budget=enough - (1 << 20), context=CONTEXT)


def test_a_file_cut_short_ends_the_answer(files: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "copy.gguf"
    path.write_bytes(files[1].read_bytes())
    session = open_on_disk(path).session(CONTEXT)
    session.forward(IDS[:1], mode="exact")
    os.truncate(path, path.stat().st_size // 2)
    for ids in (IDS[1:2], IDS[1:]):
        with pytest.raises(EngineError, match="changed"):
            session.forward(ids, mode="exact")
    assert session.position == 1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "plain.gguf"
    make_tiny_model(path, SMALL)
    return path


@pytest.mark.parametrize("gate_apart", [False, True])
def test_sorted_experts_compute_the_same(small: Path, tmp_path: Path, gate_apart: bool) -> None:
    rng = np.random.default_rng(1)
    hotness = {(layer, "_exps"): rng.random((8, 64)) for layer in range(2)}
    hotness |= {(layer, "_shexp"): rng.random(96) for layer in range(2)}
    path = make_bundled(small, tmp_path / "b.gguf", gate_apart=gate_apart, hotness=hotness)
    plain, ours = _native.Model(str(small)), _native.Model(str(path))
    for mode in plain.info.modes:
        expected = logits(plain, mode, stepwise=False)
        np.testing.assert_allclose(logits(ours, mode, stepwise=False), expected, atol=1e-4)
    stored = ModelFile(path).tensors["blk.1.ffn_hotness_exps"]
    assert stored.shape == (8, 64)


def test_hotness_of_experts_counts_all_tokens(small: Path) -> None:
    file = ModelFile(small)
    hotness = neuron_hotness(file, "the end and the beginning of the rain", tokens=32)
    assert hotness.keys() == {(group[0].layer, group[0].suffix) for group in ffn_groups(ffns_of(file))}
    experts = hotness[0, "_exps"]
    assert experts.shape == (8, 64)
    # 3 of 8 experts take a token, and dReLU leaves about a quarter of their neurons.
    assert 0 < experts.mean() < 3 / 8 / 2 < hotness[0, "_shexp"].mean() * 2
    popularity = experts.max(axis=1)
    assert popularity.max() > 2 * popularity.min()


@pytest.mark.parametrize("damage", ["size", "rise", "nan", "infinite", "negative"])
def test_hotness_that_means_nothing_is_refused(small: Path, damage: str, tmp_path: Path) -> None:
    hotness = {key: np.zeros((8, 64)) if key[1] == "_exps" else np.zeros(96) for key in keys_of(small)}
    file = ModelFile(make_bundled(small, tmp_path / "b.gguf", hotness=hotness))
    stored = np.full((8, 32 if damage == "size" else 64), 0.5, np.float32)
    at, value = {"rise": (9, 0.6), "nan": (9, np.nan), "infinite": (0, np.inf), "negative": (-1, -1.0)}.get(
        damage, (0, 0.5)
    )
    stored[3, at] = value
    tensors = [
        TensorSource.of_array(name, stored)
        if name == "blk.0.ffn_hotness_exps"
        else TensorSource.of_file(file, name)
        for name in file.tensors
    ]
    write_model_file(tmp_path / "bad.gguf", file.stored_metadata(), tensors)
    with pytest.raises(ModelFileError, match="ffn_hotness_exps"):
        _native.Model(str(tmp_path / "bad.gguf"))


def keys_of(path: Path) -> list[tuple[int, str]]:
    return [(group[0].layer, group[0].suffix) for group in ffn_groups(ffns_of(ModelFile(path)))]
