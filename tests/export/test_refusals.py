"""What cannot be exported is refused with one line that names it; no file stays."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.export.conftest import MakeDirectory
from turbosparse.errors import ConfigError, TurboSparseError
from turbosparse.export.draft import TypeChoice
from turbosparse.export.run import ExportConfig, export_model, plan_export
from turbosparse.runtime.model_file import ModelFile

CONFIG = ExportConfig(types=TypeChoice(weights="F32"), check=False)
TEXT = "A text to compare with, long enough for a window or two of tokens. " * 20


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type\] expected one of llama, .*, got 'gpt2'"),
        ({"model_type": None}, r"model_type\] expected one of llama"),
        ({"hidden_act": "gelu"}, r"hidden_act\] expected one of silu, .*, got 'gelu'"),
        ({"turbosparse": {"name": "shifted_relu", "threshold": 0.1}}, "turbosparse] expected the name of an"),
        ({"turbosparse": {"name": "drelu", "threshold": 0.1}}, "expected 0 for drelu"),
        ({"model_type": "turbosparse_llama"}, r"turbosparse\] expected the name of an activation"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"rope_type\] expected one of default, "),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters.factor\] expected a number above 0"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor\] expected 1, got '0.5'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config\] expected weights that are not"),
        ({"hidden_size": "big"}, r"hidden_size\] expected an integer above 0, got 'big'"),
        ({"num_hidden_layers": 3}, r"model.layers.2.input_layernorm.weight\] expected a tensor of shape"),
        ({"num_hidden_layers": 1}, "expected only tensors that a llama model is computed with, got 9 others"),
        ({"intermediate_size": 96}, r"mlp.gate_proj.weight\] expected shape \(96, 32\), got \(64, 32\)"),
        ({"vocab_size": 100}, r"expected shape \(100, 32\)"),
    ],
)
def test_configurations(changes: dict[str, Any], message: str, make_directory: MakeDirectory) -> None:
    directory = make_directory()
    edit(directory / "config.json", **changes)
    with pytest.raises(TurboSparseError, match=message.replace("turbosparse] ", r"turbosparse\] ")):
        plan_export(directory, ExportConfig(types=CONFIG.types, allow_untrained=True))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "config.json] expected a file, got: No such file"),
        ("config.json", b"{", "config.json] expected JSON"),
        ("config.json", b"[]", "expected a JSON object, got list"),
        (
            "tokenizer.json",
            None,
            "tokenizer.json] expected a tokenizer, got no such file; transformers makes",
        ),
        ("tokenizer.json", b"{}", "tokenizer.json] expected a tokenizer, got"),
        (
            "model.safetensors",
            None,
            "expected model.safetensors or model.safetensors.index.json, got neither",
        ),
        ("model.safetensors", b"", "expected a safetensors header within 0 bytes"),
        ("model.safetensors", b"\xff" * 100, "expected a safetensors header within 100 bytes"),
        ("model.safetensors", b"\x02" + bytes(7) + b"[]", "expected a safetensors header, got list"),
        ("model.safetensors", b"\x02" + bytes(7) + b"{]", "expected a safetensors header in JSON"),
    ],
)
def test_broken_directories(
    file: str, content: bytes | None, message: str, make_directory: MakeDirectory
) -> None:
    directory = make_directory()
    if content is None:
        (directory / file).unlink()
    else:
        (directory / file).write_bytes(content)
    with pytest.raises(TurboSparseError) as caught:
        plan_export(directory, CONFIG)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}, "expected a tensor of type F64, F32"),
        (
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
            "expected 8 bytes inside of the file, got 0 to 4",
        ),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "expected 16 bytes inside of the file"),
        ({"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}, "expected a shape and two offsets"),
        ({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "expected 0 bytes inside of the file"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "expected a shape and two offsets"),
        (7, "expected a tensor of type F64, F32, F16, BF16, got 7"),
    ],
)
def test_broken_tensors(entry: Any, message: str, make_directory: MakeDirectory) -> None:
    directory = make_directory()
    header = json.dumps({"lm_head.weight": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    (directory / "model.safetensors").write_bytes(data)
    with pytest.raises(TurboSparseError, match=message):
        plan_export(directory, CONFIG)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "expected a weight_map"),
        ({"weight_map": {"a": "../other.safetensors"}}, "expected names of files beside it"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors] expected a file, got: No such file"),
        ({"weight_map": {"a": "part.safetensors"}}, "part.safetensors] expected the tensor 'a', got no such"),
    ],
)
def test_broken_indices(index: dict[str, Any], message: str, make_directory: MakeDirectory) -> None:
    directory = make_directory()
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(TurboSparseError) as caught:
        plan_export(directory, CONFIG)
    assert message in str(caught.value)


def test_biases_nobody_computes(make_directory: MakeDirectory) -> None:
    directory = make_directory(attention_bias=True)
    with pytest.raises(TurboSparseError, match=r"self_attn.k_proj.bias\] expected only tensors that a llama"):
        plan_export(directory, CONFIG)


@pytest.mark.parametrize("activation", ["drelu", "relu"])
def test_a_swapped_model_has_to_be_trained(activation: str, make_directory: MakeDirectory) -> None:
    directory = make_directory(activation=activation, tokens=0)
    with pytest.raises(
        ConfigError, match="expected a model that was trained after its activation was swapped"
    ):
        plan_export(directory, CONFIG)
    plan = plan_export(directory, ExportConfig(types=CONFIG.types, allow_untrained=True))
    assert plan.metadata["turbosparse.activation"] == activation


def test_a_swapped_model_without_a_record_counts_as_untrained(make_directory: MakeDirectory) -> None:
    directory = make_directory(activation="drelu")
    edit(directory / "config.json", turbosparse_training=None)
    with pytest.raises(ConfigError, match="without a record of training"):
        plan_export(directory, CONFIG)
    drawn = {"a.txt": {"tokens": 3000}, "b.txt": {"tokens": 2000}}
    (directory / "data_state.json").write_text(json.dumps({"drawn": drawn}), encoding="utf-8")
    assert plan_export(directory, CONFIG).metadata["turbosparse.training.tokens"] == 5000


def test_a_file_that_computes_something_else_is_set_aside(make_directory: MakeDirectory) -> None:
    directory = make_directory()
    config = ExportConfig(types=CONFIG.types, check_tokens=100)
    plan = plan_export(directory, config)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = np.ascontiguousarray(tensors["lm_head.weight"][::-1])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    plan_again = plan_export(directory, config)
    first = next(tensor for tensor in plan.tensors if tensor.name == "token_embd.weight")
    swapped = [first if tensor.name == first.name else tensor for tensor in plan_again.tensors]
    out = directory.parent / "out.gguf"
    plan_again.tensors[:] = [t for t in swapped if t.name != "output.weight"]  # the file's output is now tied
    report = export_model(plan_again, out, TEXT, config)
    assert report.check is not None
    assert not report.check.passed
    assert report.output == directory.parent / "out.failed.gguf"
    assert ModelFile(report.output).architecture == "llama"
    assert sorted(path.name for path in directory.parent.iterdir()) == ["model", "out.failed.gguf"]


def test_an_interrupted_export_leaves_nothing(make_directory: MakeDirectory) -> None:
    directory = make_directory()

    class Interrupts:
        def __enter__(self) -> Any:
            def advance(share: float) -> None:
                raise KeyboardInterrupt

            return advance

        def __exit__(self, *error: object) -> None:
            return None

    with pytest.raises(KeyboardInterrupt):
        export_model(
            plan_export(directory, CONFIG),
            directory.parent / "out.gguf",
            TEXT,
            CONFIG,
            progress=lambda label: Interrupts(),
        )
    assert [path.name for path in directory.parent.iterdir()] == ["model"]
