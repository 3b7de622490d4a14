"""Models larger than memory: bundles on disk give the numbers of the file they were made from, in every mode,
token by token and together, however they are read.
"""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest

from tests.bundled_model import CONTEXT, IDS, least_budget, logits, make_bundled
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse import _native
from turbosparse.errors import ConfigError, EngineError, ModelFileError
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.model_file_writer import TensorSource, write_model_file
from turbosparse.runtime.neuron_hotness import neuron_hotness
from turbosparse.runtime.reference import ReferenceEngine

# Wide enough that one layer's neurons are fewer than all, and more than prefill reads at a time.
WIDE = TinyModel(
    activation="drelu",
    down_t=True,
    intermediate_size=1632,
    num_hidden_layers=6,
    weight_type="Q8_0",
    predictor="low_rank",
    hot=(3, 7),
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "plain.gguf"
    make_tiny_model(path, WIDE)
    return path


@pytest.fixture(scope="module")
def bundles(plain: Path) -> Path:
    return make_bundled(plain, plain.with_name("bundles.gguf"))


@pytest.mark.parametrize("gate_apart", [False, True])
@pytest.mark.parametrize("weight_type", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_in_memory_equals_the_plain_file(tmp_path: Path, weight_type: str, gate_apart: bool) -> None:
    source = tmp_path / "plain.gguf"
    model = TinyModel(
        activation="silu", down_t=True, weight_type=weight_type, threshold=0.02, gate_threshold=0.01
    )
    make_tiny_model(source, model)
    plain = _native.Model(str(source))
    ours = _native.Model(str(make_bundled(source, tmp_path / "b.gguf", gate_apart=gate_apart)))
    assert ours.info.memory is None and ours.info.modes == plain.info.modes
    for mode in plain.info.modes:
        for stepwise in (True, False):
            expected = logits(plain, mode, stepwise=stepwise)
            np.testing.assert_array_equal(logits(ours, mode, stepwise=stepwise), expected)


@pytest.mark.parametrize("io", ["io_uring", "pread", "mmap"])
def test_on_disk_equals_in_memory(plain: Path, bundles: Path, io: str) -> None:
    try:
        disk = _native.Model(str(bundles), memory_budget=least_budget(bundles), context=CONTEXT, io=io)
    except ConfigError as error:
        if io != "io_uring":  # the one that a kernel may forbid
            raise
        pytest.skip(str(error))
    assert disk.info.memory is not None and disk.info.memory["io"] == io
    memory = _native.Model(str(plain))
    for mode in memory.info.modes:
        for stepwise in (True, False):
            expected = logits(memory, mode, stepwise=stepwise)
            np.testing.assert_array_equal(logits(disk, mode, stepwise=stepwise), expected)


def test_gate_in_memory_and_hot_neurons_first(tmp_path: Path) -> None:
    # F32: with 8-bit inputs, sums that are rounded elsewhere may fall on the other side of a step.
    plain = tmp_path / "plain.gguf"
    make_tiny_model(plain, dataclasses.replace(WIDE, weight_type="F32", threshold=0.01, gate_threshold=0.01))
    hotness = {(layer, ""): np.random.default_rng(layer).random(1632) for layer in range(6)}
    path = make_bundled(plain, tmp_path / "b.gguf", gate_apart=True, hotness=hotness)
    disk = _native.Model(str(path), memory_budget=least_budget(path), context=CONTEXT)
    assert disk.info.memory is not None
    memory = _native.Model(str(plain))
    for mode in memory.info.modes:
        expected = logits(memory, mode, stepwise=True)
        np.testing.assert_allclose(logits(disk, mode, stepwise=True), expected, atol=1e-3)


def test_counters_add_up(bundles: Path) -> None:
    disk = _native.Model(str(bundles), memory_budget=least_budget(bundles), context=CONTEXT)
    session = disk.session(CONTEXT)
    for token in np.split(IDS, len(IDS)):
        session.forward(token, mode="predicted")
    counters = session.counters
    asked = sum(counters["cached"]) + sum(counters["missed"])
    assert asked == sum(counters["candidates"])
    assert sum(counters["missed"]) > 0
    assert sum(counters["disk_bytes"]) >= 4096
    assert sum(counters["disk_wait_ns"]) > 0


def test_a_budget_that_holds_everything_reads_nothing(bundles: Path) -> None:
    model = _native.Model(str(bundles), memory_budget=1 << 30, context=CONTEXT)
    assert model.info.memory is None
    assert sum(model.session(CONTEXT).counters["disk_bytes"]) == 0


def test_a_cache_of_8_bits_takes_less_of_the_budget(tmp_path: Path) -> None:
    plain = tmp_path / "plain.gguf"
    make_tiny_model(plain, dataclasses.replace(WIDE, hidden_size=128, context_length=4096))

    def least(kv_cache: str) -> int:
        with pytest.raises(ConfigError, match="at least") as error:
            _native.Model(str(plain), memory_budget=1 << 20, context=4096, kv_cache=kv_cache)
        return int(re.search(r"(\d+) MiB for a context of 4096", str(error.value))[1])  # type: ignore[index]

    info = _native.Model(str(plain)).info
    halves = info.num_hidden_layers * 4096 * 2 * info.num_key_value_heads * info.head_dim * 2 / (1 << 20)
    assert least("f16") - least("q8_0") == pytest.approx(halves * (1 - 8.5 / 16), abs=1)


def test_a_plain_file_needs_its_whole_size(plain: Path) -> None:
    with pytest.raises(ConfigError, match="layout bundled"):
        _native.Model(str(plain), memory_budget=1 << 20, context=CONTEXT)


def test_a_file_that_changes_ends_the_answer_and_one_that_is_removed_does_not(
    bundles: Path, tmp_path: Path
) -> None:
    path = tmp_path / "copy.gguf"
    path.write_bytes(bundles.read_bytes())
    model = _native.Model(str(path), memory_budget=least_budget(bundles), context=CONTEXT)
    session = model.session(CONTEXT)
    expected = session.forward(IDS[:1], mode="exact")
    path.rename(path.with_name("moved.gguf"))
    session.truncate(0)
    np.testing.assert_array_equal(session.forward(IDS[:1], mode="exact"), expected)
    os.truncate(path.with_name("moved.gguf"), 8192)
    with pytest.raises(EngineError, match="changed"):
        session.forward(IDS[1:2], mode="exact")
    assert session.position == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cluster", 3),
        ("cluster", 64),
        ("bytes", 100),
        ("types", ["Q8_0", "Q8_0", "Q4_0"]),  # another size of rows than the tensor has
        ("types", ["Q8_0", "Q8_0"]),
        ("types", ["Q8_0", "Q8_0", "Q5_0"]),
        ("parts", ["up", "gate", "down_t"]),
        ("parts", ["gate", "down_t"]),
    ],
)
def test_bundles_that_do_not_match_are_refused(
    bundles: Path, tmp_path: Path, key: str, value: object
) -> None:
    file = ModelFile(bundles)
    metadata = dict(file.stored_metadata()) | {f"turbosparse.bundle.{key}": value}
    if key == "types" and value == ["Q8_0", "Q8_0", "Q4_0"]:
        metadata["turbosparse.bundle.bytes"] = 4096
    path = tmp_path / "broken.gguf"
    write_model_file(path, metadata, [TensorSource.of_file(file, name) for name in file.tensors])
    with pytest.raises(ModelFileError, match=r"bundle"):
        _native.Model(str(path))


def test_what_cannot_be_bundled(plain: Path, bundles: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="without bundles"):
        make_bundled(bundles, tmp_path / "twice.gguf")
    make_tiny_model(tmp_path / "dense.gguf", TinyModel())
    with pytest.raises(ModelFileError, match="can skip neurons"):
        make_bundled(tmp_path / "dense.gguf", tmp_path / "b.gguf")
    signs = TinyModel(activation="drelu", down_t=True, predictor="sign")
    make_tiny_model(tmp_path / "sign.gguf", signs)
    with pytest.raises(ModelFileError, match="signs"):
        make_bundled(tmp_path / "sign.gguf", tmp_path / "b.gguf")


@pytest.mark.parametrize("weight_type", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_the_reference_reads_bundles(tmp_path: Path, weight_type: str) -> None:
    source = tmp_path / "plain.gguf"
    experts = {"arch": "qwen2moe", "experts": 4, "intermediate_size": 64, "shared_intermediate_size": 96}
    model = TinyModel(activation="drelu", down_t=True, weight_type=weight_type, hidden_size=96, **experts)  # type: ignore[arg-type]
    make_tiny_model(source, model)
    path = make_bundled(source, tmp_path / "b.gguf", gate_apart=weight_type == "F16")
    expected = ReferenceEngine(source).forward(IDS, "exact")
    np.testing.assert_array_equal(ReferenceEngine(path).forward(IDS, "exact"), expected)


def test_hotness_counts_what_is_active(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    make_tiny_model(path, TinyModel(activation="drelu", down_t=True))
    hotness = neuron_hotness(ModelFile(path), "the end and the beginning", tokens=8)
    assert {key: values.shape for key, values in hotness.items()} == {(0, ""): (160,), (1, ""): (160,)}
    assert all(0 < values.mean() < 0.6 and values.max() <= 1 for values in hotness.values())
    passed = neuron_hotness(ModelFile(path), "the end and the beginning", tokens=8, gate_apart=True)
    for key, values in hotness.items():  # dReLU: about half of what passes the gate is stopped by up
        assert (passed[key] >= values).all() and passed[key].mean() > 1.5 * values.mean()
