"""Sound GGUF files that are no sound models: the engine refuses them by name, or runs; it never crashes.

Every key of a tiny model is replaced by values of every kind; every tensor is dropped, reshaped and retyped.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse import _native
from turbosparse.cli.main import main
from turbosparse.errors import EngineError, ModelFileError, TurboSparseError
from turbosparse.runtime.model_description import describe
from turbosparse.runtime.model_file import ModelFile, StoredValue
from turbosparse.runtime.model_file_copy import copy_with
from turbosparse.runtime.model_file_writer import TensorSource

MODEL = TinyModel(
    activation="fatrelu",
    activation_param=0.1,
    down_t=True,
    threshold=0.1,
    gate_threshold=0.05,
    predictor="low_rank",
    ranks=(32,),
    hot=(3, 9),
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=2,
    num_key_value_heads=1,
    rope_scaling_factor=2.0,
    rope_freqs=True,
)
MODES = ["dense", "exact", "threshold", "predicted"]
ODD_VALUES = [
    StoredValue("uint32", 0),
    StoredValue("uint32", 1),
    StoredValue("uint32", 3),
    StoredValue("int32", -1),
    StoredValue("uint32", 2**31),
    StoredValue("uint64", 2**64 - 1),
    StoredValue("int64", -(2**63)),
    StoredValue("float32", 0.0),
    StoredValue("float32", -1.0),
    StoredValue("float32", math.nan),
    StoredValue("float32", math.inf),
    StoredValue("float64", 1e300),
    StoredValue("bool", True),
    StoredValue("string", ""),
    StoredValue("string", "gpt5"),
    StoredValue("uint32[]", [1, 2]),
    StoredValue("float32[]", [1.0, math.nan]),
    StoredValue("float32[]", [1.0]),
    StoredValue("string[]", ["a"]),
    None,
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    make_tiny_model(path, MODEL)
    return ModelFile(path)


def run(path: Path) -> str:
    """Loads a file and runs it in each of its modes; the error's text, or nothing. Describes it, too."""
    with suppress(ModelFileError):
        describe(ModelFile(path), tensors=True)
    try:
        model = _native.Model(str(path), threads=1)
        ids = np.arange(min(2, model.info.context_length), dtype=np.int32)
        for mode in model.info.modes:
            logits = model.session(len(ids)).forward(ids, mode=mode)
            assert logits.shape == (1, model.info.vocab_size)
    except TurboSparseError as error:
        assert isinstance(error, (ModelFileError, EngineError))
        assert str(error).startswith("[")
        assert "] expected " in str(error)
        assert "\n" not in str(error)
        return str(error)
    return ""


def keys_of_the_engine() -> list[str]:
    sizes = (
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
    )
    more = (
        "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.dimension_count",
    )
    others = ("rope.scaling.type", "rope.scaling.factor", "attention.key_length", "attention.sliding_window")
    ours = ("version", "activation", "activation_param", "gated", "predictor.kind", "predictor.input")
    return [
        "general.architecture",
        *(f"turbosparse-llama.{name}" for name in (*sizes, *more, *others, "expert_count")),
        *(f"turbosparse.{name}" for name in (*ours, "predictor.threshold")),
    ]


def test_the_model_itself_runs(source: ModelFile) -> None:
    assert run(Path(source.path)) == ""
    assert _native.Model(source.path, threads=1).info.modes == MODES == source.modes


@pytest.mark.parametrize("key", keys_of_the_engine())
def test_odd_values_of_keys(source: ModelFile, key: str, tmp_path: Path) -> None:
    outcomes = []
    for number, value in enumerate(ODD_VALUES):
        keys = source.stored_metadata() | ({key: value} if value is not None else {})
        if value is None:
            keys.pop(key, None)
        if "general.architecture" not in keys:
            continue  # the writer refuses that; tests/hostile/test_broken_files.py has it
        copy_with(source, tmp_path / f"{number}.gguf", metadata=keys)
        outcomes.append(run(tmp_path / f"{number}.gguf"))
    assert any(outcomes), "no value was refused"


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({}, "blk.9.ffn_up.weight"),
        ({}, "blk.0.ffn_bundles"),
        ({"turbosparse-llama.block_count": StoredValue("uint32", 4_000_000_000)}, "blk.1.ffn_threshold"),
        ({"turbosparse-llama.expert_count": StoredValue("string", "abc")}, "blk.0.ffn_up_exps.weight"),
        (
            {
                "turbosparse.calibration.ffn_tokens": StoredValue("string[]", ["a", "b"]),
                "turbosparse.calibration.cett": StoredValue("string[]", ["a", "b"]),
            },
            "blk.1.ffn_threshold",
        ),
    ],
)
def test_what_does_not_fit_together_can_be_inspected(
    source: ModelFile, keys: dict[str, StoredValue], name: str, tmp_path: Path
) -> None:
    values = np.zeros((64,) if name.endswith("threshold") else (64, 32))
    tensors = [TensorSource.of_array(name, values)]
    copy_with(source, tmp_path / "m.gguf", metadata=source.stored_metadata() | keys, tensors=tensors)
    run(tmp_path / "m.gguf")


Array = np.ndarray[Any, Any]
SHAPES: dict[str, Callable[[Array], Array]] = {
    "one row less": lambda values: values[:-1],
    "one more dimension": lambda values: values[None],
    "flat": lambda values: values.reshape(-1),
    "transposed": lambda values: np.ascontiguousarray(values.T),
}
VALUES: dict[str, Callable[[Array], Array]] = {
    "all NaN": lambda values: np.full_like(values, np.nan),
    "all infinite": lambda values: np.full_like(values, np.inf),
    "huge": lambda values: np.full_like(values, 3e38),
    "negative": lambda values: -np.abs(values),
}


HOT = "blk.0.ffn_pred_hot"


def weights(source: ModelFile) -> list[str]:
    return [name for name in source.tensors if name != HOT]


def damaged(source: ModelFile, path: Path, tensor: TensorSource) -> str:
    copy_with(source, path, tensors=[tensor])
    return run(path)


@pytest.mark.parametrize("damage", SHAPES)
def test_tensors_of_another_shape_are_refused(source: ModelFile, damage: str, tmp_path: Path) -> None:
    for number, name in enumerate(weights(source)):
        values = source.dequantised(name)
        changed = SHAPES[damage](values)
        if changed.shape == values.shape:
            continue
        error = damaged(source, tmp_path / f"{number}.gguf", TensorSource.of_array(name, changed))
        if damage == "one row less" and name == "token_embd.weight":
            continue  # just a smaller vocabulary
        # A predictor's rank is that of its first layer; then the second has the wrong one.
        assert (name.replace("pred_a", "pred_b") if damage == "one row less" else name) in error


@pytest.mark.parametrize("damage", VALUES)
def test_tensors_of_odd_values_crash_nothing(source: ModelFile, damage: str, tmp_path: Path) -> None:
    for number, name in enumerate(weights(source)):
        changed = VALUES[damage](source.dequantised(name))
        error = damaged(source, tmp_path / f"{number}.gguf", TensorSource.of_array(name, changed))
        if "threshold" in name:
            assert (error == "") == (damage == "huge")
        elif damage == "all NaN" and name != "rope_freqs.weight":
            assert error, f"NaN in {name} went unnoticed"


def test_integers_instead_of_weights_are_refused(source: ModelFile, tmp_path: Path) -> None:
    for number, name in enumerate(weights(source)):
        zeros = np.zeros(source.tensor(name).shape, np.int32)
        tensor = TensorSource(name=name, type_name="I32", shape=zeros.shape, read=zeros.copy)
        assert f"[{name}] expected a type that can be read" in damaged(
            source, tmp_path / f"{number}.gguf", tensor
        )


def test_missing_tensors_are_named(source: ModelFile, tmp_path: Path) -> None:
    optional = {"rope_freqs.weight", HOT, "blk.0.ffn_gate_threshold", "blk.1.ffn_gate_threshold"}
    for number, name in enumerate(source.tensors):
        path = tmp_path / f"{number}.gguf"
        copy_with(source, path, drop=[name])
        error = run(path)
        assert (error == "") == (name in optional), f"{name}: {error!r}"
        # Without down_t the first layer is asked for down; without one threshold the others are too many.
        part = name.removeprefix("blk.0.").removeprefix("blk.1.").removesuffix("_t.weight")
        assert name in optional or part in error


@pytest.mark.parametrize("indices", [[3, 3], [9, 3], [-1, 3], [3, 64], [2**31 - 1], [[3, 9]]], ids=str)
def test_hot_neurons_that_are_none(source: ModelFile, indices: list[int], tmp_path: Path) -> None:
    values = np.array(indices, np.int32)
    tensor = TensorSource(name=HOT, type_name="I32", shape=values.shape, read=values.copy)
    error = damaged(source, tmp_path / "m.gguf", tensor)
    assert f"[{HOT}] expected ascending I32 indices from 0 to 63, got " in error


def test_hot_neurons_as_floats_are_refused(source: ModelFile, tmp_path: Path) -> None:
    assert HOT in damaged(source, tmp_path / "m.gguf", TensorSource.of_array(HOT, np.array([3.0])))


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("threshold", StoredValue("float32[]", [0.0]), "array of 2 finite float32, one per layer, got 1"),
        ("threshold", StoredValue("float32[]", [0.0, math.inf]), "got NaN or Inf at 1"),
        ("threshold", StoredValue("float32", 0.0), "got another kind of value"),
        ("threshold", None, "got no such key"),
        ("kind", StoredValue("string", "magic"), "expected low_rank or sign, got magic"),
        ("kind", StoredValue("string", "sign"), "low_rank where there is blk.0.ffn_pred_a.weight, got sign"),
        ("kind", None, "low_rank or sign where there is turbosparse.predictor."),
        ("input", StoredValue("string", "logits"), "expected ffn_norm or residual, got logits"),
        ("input", None, "expected ffn_norm or residual, got no such key"),
    ],
)
def test_keys_of_predictors_are_checked(
    source: ModelFile, key: str, value: StoredValue | None, text: str, tmp_path: Path
) -> None:
    keys = source.stored_metadata()
    del keys[f"turbosparse.predictor.{key}"]
    copy_with(
        source,
        tmp_path / "m.gguf",
        metadata=keys | ({f"turbosparse.predictor.{key}": value} if value is not None else {}),
    )
    error = run(tmp_path / "m.gguf")
    assert f"[turbosparse.predictor.{key}]" in error
    assert text in error


def test_predictors_of_another_shape_are_named(source: ModelFile, tmp_path: Path) -> None:
    for name, shape, expected in [
        ("blk.1.ffn_pred_a.weight", (32, 31), "shape [32, 32], got [32, 31]"),
        ("blk.1.ffn_pred_a.weight", (31, 32), "shape [64, 31], got [64, 32]"),  # b has another rank
        ("blk.0.ffn_pred_b.weight", (64, 33), "shape [64, 32], got [64, 33]"),
        ("blk.0.ffn_pred_b.weight", (65, 32), "shape [64, 32], got [65, 32]"),
    ]:
        tensor = TensorSource.of_array(name, np.zeros(shape, np.float32))
        assert f"expected {expected}" in damaged(source, tmp_path / f"{shape}.gguf", tensor)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_thresholds_that_mean_nothing(
    source: ModelFile, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("blk.1.ffn_threshold", "blk.0.ffn_gate_threshold"):
        path = tmp_path / f"{name}.gguf"
        bad = np.full(64, 0.1, np.float32)
        bad[7] = value
        copy_with(source, path, tensors=[TensorSource.of_array(name, bad)])
        assert "finite thresholds of at least 0" in run(path)
        assert main(["inspect", str(path)]) == 2
        shown = capsys.readouterr().err
        assert f"{name}] expected 64 F32 values of 0 or more, got {value} for neuron 7\n" in shown
        assert shown.count("\n") == 1


def test_tensors_that_belong_to_another_function_are_refused(source: ModelFile, tmp_path: Path) -> None:
    extra = TensorSource.of_array("blk.0.ffn_sub_norm.weight", np.ones(32))
    copy_with(source, tmp_path / "m.gguf", tensors=[extra])
    assert "blk.0.ffn_sub_norm.weight" in run(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "architecture", ["gemma3", "mixtral", "turbosparse-gemma3", "turbosparse-", "Llama", ""]
)
def test_other_architectures_are_named(source: ModelFile, architecture: str, tmp_path: Path) -> None:
    written = source.architecture
    keys = {
        architecture + key.removeprefix(written) if key.startswith(written + ".") else key: value
        for key, value in source.stored_metadata().items()
    }
    keys["general.architecture"] = StoredValue("string", architecture)
    copy_with(source, tmp_path / "m.gguf", metadata=keys)
    error = run(tmp_path / "m.gguf")
    assert "general.architecture" in error
    assert architecture in error


def test_a_part_of_a_split_model_says_what_to_do(source: ModelFile, tmp_path: Path) -> None:
    keys = source.stored_metadata() | {"split.count": StoredValue("uint16", 3)}
    copy_with(source, tmp_path / "m.gguf", metadata=keys)
    assert "--merge makes one), got one part of 3" in run(tmp_path / "m.gguf")
