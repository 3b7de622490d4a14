"""What is read from a model file, and that writing keeps it."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.real_models import SMOLLM2, real_model
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.errors import ModelFileError
from turbosparse.runtime.model_file import KEY_CETT_TARGET, ModelFile, StoredValue
from turbosparse.runtime.model_file_copy import copy_with, transposed_down, with_activation
from turbosparse.runtime.model_file_writer import TensorSource, check_output, write_model_file

ALL_KINDS = {
    "general.architecture": StoredValue("string", "llama"),
    "kind.uint8": StoredValue("uint8", 255),
    "kind.int8": StoredValue("int8", -128),
    "kind.uint16": StoredValue("uint16", 65535),
    "kind.int16": StoredValue("int16", -32768),
    "kind.uint32": StoredValue("uint32", 2**32 - 1),
    "kind.int32": StoredValue("int32", -(2**31)),
    "kind.float32": StoredValue("float32", 0.5),
    "kind.bool": StoredValue("bool", True),
    "kind.string": StoredValue("string", "Grüße 世界 \N{SLIGHTLY SMILING FACE}"),
    "kind.empty": StoredValue("string", ""),
    "kind.uint64": StoredValue("uint64", 2**64 - 1),
    "kind.int64": StoredValue("int64", -(2**63)),
    "kind.float64": StoredValue("float64", 0.1),
    "list.uint8": StoredValue("uint8[]", [0, 255]),
    "list.int32": StoredValue("int32[]", [-1, 7]),
    "list.float32": StoredValue("float32[]", [0.25, -2.0]),
    "list.bool": StoredValue("bool[]", [True, False, True]),
    "list.string": StoredValue("string[]", ["a", "", "ä"]),
    "list.float64": StoredValue("float64[]", [0.1]),
}


@pytest.fixture
def tiny(tmp_path: Path) -> ModelFile:
    make_tiny_model(tmp_path / "tiny.gguf")
    return ModelFile(tmp_path / "tiny.gguf")


def test_tensors_agree_with_the_gguf_package(tmp_path: Path) -> None:
    stored = make_tiny_model(tmp_path / "m.gguf", TinyModel(weight_type="Q8_0"))
    file = ModelFile(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = file.tensor(tensor.name)
        assert ours.shape == tuple(int(n) for n in reversed(tensor.shape.tolist()))
        assert (ours.type, ours.offset, ours.nbytes) == (
            tensor.tensor_type,
            tensor.data_offset,
            tensor.n_bytes,
        )
        np.testing.assert_array_equal(file.tensor_bytes(tensor.name), tensor.data.reshape(-1).view(np.uint8))
        np.testing.assert_array_equal(file.dequantised(tensor.name), stored[tensor.name])


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_every_type_reads_back_as_the_gguf_package_wrote_it(tmp_path: Path, type_name: str) -> None:
    values = np.random.default_rng(0).standard_normal((3, 2, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[type_name]
    expected = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind).reshape(values.shape)
    metadata = {"general.architecture": "llama"}
    write_model_file(tmp_path / "m.gguf", metadata, [TensorSource.of_array("x", values, type_name)])
    np.testing.assert_array_equal(ModelFile(tmp_path / "m.gguf").dequantised("x"), expected)


def test_views_outlive_the_file_object_and_cannot_be_written(tmp_path: Path) -> None:
    stored = make_tiny_model(tmp_path / "m.gguf")
    values = ModelFile(tmp_path / "m.gguf").dequantised("output_norm.weight")
    np.testing.assert_array_equal(values, stored["output_norm.weight"])
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1


def test_all_metadata_kinds_survive(tmp_path: Path) -> None:
    write_model_file(tmp_path / "a.gguf", ALL_KINDS, [])
    read = ModelFile(tmp_path / "a.gguf").stored_metadata()
    assert read == ALL_KINDS
    assert list(read) == list(ALL_KINDS)
    assert ModelFile(tmp_path / "a.gguf").metadata == {key: kept.value for key, kept in ALL_KINDS.items()}


def test_plain_values_get_kinds(tmp_path: Path) -> None:
    plain = {
        "general.architecture": "llama",
        "a": True,
        "b": 3,
        "c": -3,
        "d": 2**40,
        "e": -(2**40),
        "f": 1.5,
        "g": "text",
        "h": [1, -1],
        "i": [0.5, 1.5],
        "j": ["x"],
    }
    write_model_file(tmp_path / "a.gguf", plain, [])
    kinds = {key: kept.kind for key, kept in ModelFile(tmp_path / "a.gguf").stored_metadata().items()}
    assert "".join(f"{key}:{kind} " for key, kind in kinds.items() if len(key) == 1) == (
        "a:bool b:uint32 c:int32 d:uint64 e:int64 f:float32 g:string h:int32[] i:float32[] j:string[] "
    )


@pytest.mark.parametrize("value", [None, object(), [1, "a"], [[1]], 2**64, -(2**63) - 1, {"a": 1}])
def test_values_without_a_kind_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ModelFileError, match="expected"):
        write_model_file(tmp_path / "a.gguf", {"general.architecture": "llama", "key": value}, [])
    assert list(tmp_path.iterdir()) == []


def test_empty_arrays_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_model_file(tmp_path / "a.gguf", {"general.architecture": "llama", "nothing": []}, [])
    assert "nothing" not in ModelFile(tmp_path / "a.gguf").metadata
    assert "nothing left out" in caplog.text


def test_write_read_write_gives_equal_bytes(tmp_path: Path, tiny: ModelFile) -> None:
    copy_with(tiny, tmp_path / "first.gguf")
    copy_with(ModelFile(tmp_path / "first.gguf"), tmp_path / "second.gguf")
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "second.gguf").read_bytes()
    assert (tmp_path / "first.gguf").read_bytes() == Path(tiny.path).read_bytes()


def test_alignment_is_kept(tmp_path: Path) -> None:
    metadata = {"general.architecture": "llama", "general.alignment": 256}
    sources = [TensorSource.of_array(name, np.ones(3, np.float32)) for name in "ab"]
    write_model_file(tmp_path / "a.gguf", metadata, sources)
    file = ModelFile(tmp_path / "a.gguf")
    assert [tensor.offset % 256 for tensor in file.tensors.values()] == [0, 0]
    assert file.tensor("b").offset - file.tensor("a").offset == 256
    copy_with(file, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_copy_replaces_drops_and_adds_beside_the_block(tmp_path: Path, tiny: ModelFile) -> None:
    changed = [transposed_down(tiny, layer, "Q8_0") for layer in range(2)]
    changed += [TensorSource.of_array(f"blk.{n}.ffn_threshold", np.full(160, 0.1)) for n in range(2)]
    changed += [TensorSource.of_array("output_norm.weight", np.zeros(64))]
    drop = [f"blk.{layer}.ffn_down.weight" for layer in range(2)]
    keys = tiny.stored_metadata() | {KEY_CETT_TARGET: 0.2}
    assert tiny.modes == ["dense"]
    copy_with(tiny, tmp_path / "out.gguf", metadata=keys, tensors=changed, drop=drop)

    made = ModelFile(tmp_path / "out.gguf")
    names = list(made.tensors)
    assert names.index("blk.0.ffn_down_t.weight") < names.index("blk.1.attn_norm.weight")
    assert names.index("output_norm.weight") == len(names) - 1
    assert not set(drop) & set(names)
    assert made.modes == ["dense", "threshold"]
    assert made.calibration() == {"cett_target": pytest.approx(0.2)}
    assert np.all(made.dequantised("output_norm.weight") == 0)
    down = tiny.dequantised("blk.1.ffn_down.weight")
    np.testing.assert_allclose(
        made.dequantised("blk.1.ffn_down_t.weight"), down.T, atol=np.abs(down).max() / 127
    )
    thresholds = made.threshold_values("blk.1.ffn_threshold", made.intermediate_size)
    assert thresholds is not None
    assert np.all(thresholds == np.float32(0.1))
    assert made.threshold_values("blk.1.ffn_gate_threshold", made.intermediate_size) is None
    np.testing.assert_array_equal(
        made.tensor_bytes("blk.1.ffn_up.weight"), tiny.tensor_bytes("blk.1.ffn_up.weight")
    )


def test_a_file_may_be_replaced_while_it_is_read(tmp_path: Path, tiny: ModelFile) -> None:
    with pytest.raises(ModelFileError, match="expected a new file"):
        copy_with(tiny, tiny.path)
    copy_with(tiny, tiny.path, metadata=tiny.stored_metadata() | {"note": "new"}, overwrite=True)
    assert ModelFile(tiny.path).metadata["note"] == "new"
    assert "note" not in tiny.metadata
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("activation", ["gelu", "relu", "relu2", "drelu"])
def test_another_activation_hides_the_file_from_plain_readers(tiny: ModelFile, activation: str) -> None:
    keys = with_activation(tiny.stored_metadata(), activation)
    assert keys["general.architecture"] == "turbosparse-llama"
    assert not [key for key in keys if key.startswith("llama.")]
    assert keys["turbosparse-llama.block_count"] == StoredValue("uint32", 2)
    assert (keys["turbosparse.activation"], keys["turbosparse.version"]) == (activation, 1)
    back = with_activation(keys, "silu")
    assert back["general.architecture"] == "llama"
    assert back["llama.block_count"] == StoredValue("uint32", 2)
    assert with_activation(keys, activation) == keys


def test_fatrelu_needs_its_threshold_and_nothing_else_has_one(tiny: ModelFile) -> None:
    keys = with_activation(tiny.stored_metadata(), "fatrelu", parameter=0.01)
    assert keys["turbosparse.activation_param"] == 0.01
    assert "turbosparse.activation_param" not in with_activation(keys, "relu")
    for activation, parameter in (("fatrelu", None), ("relu", 0.1), ("swish", None)):
        with pytest.raises(ModelFileError, match="expected"):
            with_activation(tiny.stored_metadata(), activation, parameter=parameter)


@pytest.mark.parametrize(
    ("model", "modes"),
    [
        (TinyModel(), ["dense"]),
        (TinyModel(activation="relu"), ["dense"]),
        (TinyModel(activation="drelu", down_t=True), ["dense", "exact"]),
        (TinyModel(down_t=True), ["dense"]),
        (TinyModel(down_t=True, threshold=0.1), ["dense", "threshold"]),
        (TinyModel(activation="relu2", down_t=True, threshold=0.1), ["dense", "exact", "threshold"]),
        (TinyModel(threshold=0.1), ["dense"]),
    ],
)
def test_modes(tmp_path: Path, model: TinyModel, modes: list[str]) -> None:
    make_tiny_model(tmp_path / "m.gguf", model)
    file = ModelFile(tmp_path / "m.gguf")
    assert file.modes == modes
    assert file.activation == model.activation
    assert (file.hidden_size, file.intermediate_size, file.num_hidden_layers) == (64, 160, 2)
    assert file.gated


def test_missing_tensors_and_mistyped_keys_are_named(tiny: ModelFile) -> None:
    with pytest.raises(ModelFileError, match="expected a tensor 'nope'"):
        tiny.dequantised("nope")
    with pytest.raises(ModelFileError, match=r"'general.architecture'.*expected an integer, got 'llama'"):
        tiny.integer("general.architecture")
    with pytest.raises(ModelFileError, match=r"'llama.block_count'.*expected a string, got 2"):
        tiny.string("llama.block_count")
    with pytest.raises(ModelFileError, match="got no such key"):
        tiny.integer("nope")


def test_a_type_that_does_not_fit_is_refused_before_writing(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "m.gguf", TinyModel(hidden_size=48))
    with pytest.raises(ModelFileError, match="expected rows of a multiple of 32 for Q8_0, got 48"):
        transposed_down(ModelFile(tmp_path / "m.gguf"), 0, "Q8_0")


def test_outputs_are_checked_before_work_begins(tmp_path: Path, tiny: ModelFile) -> None:
    check_output(tmp_path / "new.gguf")
    check_output(tiny.path, overwrite=True)
    for path in (tiny.path, tmp_path, tmp_path / "no" / "folder.gguf", Path("/dev/null")):
        with pytest.raises(ModelFileError, match="expected"):
            check_output(path)


def test_names_are_checked(tmp_path: Path) -> None:
    metadata = {"general.architecture": "llama"}
    for names in (["a", "a"], [""], ["x" * 65]):
        sources = [TensorSource.of_array(name, np.ones(1, np.float32)) for name in names]
        with pytest.raises(ModelFileError, match="expected"):
            write_model_file(tmp_path / "a.gguf", metadata, sources)
    with pytest.raises(ModelFileError, match="no such key"):
        write_model_file(tmp_path / "a.gguf", {}, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_copy_of_a_real_file_is_equal(tmp_path: Path) -> None:
    """Keys of every kind, 150,000 strings, tensors of three types: written by others, copied bit by bit."""
    source = ModelFile(real_model(SMOLLM2))
    copy_with(source, tmp_path / "copy.gguf")
    copy = ModelFile(tmp_path / "copy.gguf")
    assert copy.stored_metadata() == source.stored_metadata()
    assert list(copy.tensors) == list(source.tensors)
    for name in source.tensors:
        np.testing.assert_array_equal(copy.tensor_bytes(name), source.tensor_bytes(name))
