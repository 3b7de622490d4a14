"""Hugging Face directories of every supported type: the file computes what transformers computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.conftest import MakeDirectory
from tests.tiny_hf import tiny_ids
from turbosparse import load
from turbosparse.export.draft import TypeChoice
from turbosparse.export.hf_config import MODEL_TYPES
from turbosparse.export.run import ExportConfig, export_model, plan_export
from turbosparse.models.registry import load_model
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.texts import HELD_OUT, read_text
from turbosparse.sparsify.recipe import recipe_from_dict
from turbosparse.sparsify.upcycling import start_of, upcycle

TEXT = read_text(HELD_OUT)[:2000]
F32 = TypeChoice(weights="F32")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def export(directory: Path, config: ExportConfig) -> Path:
    out = directory.parent / "out.gguf"
    export_model(plan_export(directory, config), out, TEXT, config, overwrite=True)
    return out


def unchecked(types: TypeChoice = F32, **settings: Any) -> ExportConfig:
    return ExportConfig(types=types, check=False, **settings)


def assert_same_function(directory: Path, file: Path) -> None:
    theirs, ours = load_model(directory, dtype=torch.float32), load(file, threads=1)
    ids = tiny_ids(rows=1, length=48)
    with torch.no_grad():
        expected = theirs(ids).logits[0].numpy()
        tokens = theirs.generate(ids[:, :16], max_new_tokens=24, do_sample=False, eos_token_id=None)
    got = ours.logits(ids[0].tolist(), mode="dense")
    assert np.linalg.norm(got - expected) < 1e-4 * np.linalg.norm(expected)
    session = ours.engine.session(64)
    logits, greedy = session.forward(ids[0, :16].numpy().astype(np.int32)), []
    for _ in range(24):
        greedy.append(int(logits[-1].argmax()))
        logits = session.forward(np.array(greedy[-1:], np.int32))
    assert greedy == tokens[0, 16:].tolist()


def test_an_upcycled_mixture_runs_as_the_dense_model(make_directory: MakeDirectory, tmp_path: Path) -> None:
    dense = make_directory(tie_word_embeddings=True)
    recipe = recipe_from_dict(
        {
            "model": str(dense),
            "output": str(tmp_path / "run"),
            "upcycle": {"num_experts": 4},
            "data": {"sources": [{"path": "text.txt"}]},
            "stages": [{"name": "one", "tokens": 1, "loss": {"logits": 1.0}, "learning_rate": 1e-3}],
        }
    )
    upcycle(recipe)
    file = export(Path(start_of(recipe)), unchecked())
    assert "blk.0.ffn_gate_exps.weight" in ModelFile(file).tensors
    assert_same_function(dense, file)


@pytest.mark.parametrize("activation", [None, "drelu"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_model_type(model_type: str, activation: str | None, make_directory: MakeDirectory) -> None:
    directory = make_directory(model_type, activation=activation)
    file = export(directory, unchecked())
    assert ModelFile(file).architecture.startswith("turbosparse-") == (activation is not None)
    assert_same_function(directory, file)


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": True},
        {"head_dim": 16},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope_parameters": LLAMA3},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "relu"},
        {"rms_norm_eps": 1e-3},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_every_setting(settings: dict[str, Any], make_directory: MakeDirectory) -> None:
    directory = make_directory(**settings)
    assert_same_function(directory, export(directory, unchecked()))


def test_windows_limit_the_context(make_directory: MakeDirectory) -> None:
    file = export(make_directory("mistral", sliding_window=24), unchecked())
    assert load(file).info.context_length == 24


@pytest.mark.parametrize("activation", ["relu", "relu2", "fatrelu:0.05", "drelu"])
def test_exact_mode_of_sparse_activations(activation: str, make_directory: MakeDirectory) -> None:
    directory = make_directory(activation=activation)
    file = export(directory, unchecked())
    assert_same_function(directory, file)
    ours = load(file, threads=1)
    assert ours.info.modes == ["dense", "exact"]
    ids = tiny_ids()[0].tolist()
    np.testing.assert_array_equal(ours.logits(ids, mode="exact"), ours.logits(ids, mode="dense"))


@pytest.mark.parametrize("weights", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("activation", [None, "drelu"])
def test_every_weight_type(weights: str, activation: str | None, make_directory: MakeDirectory) -> None:
    config = ExportConfig(types=TypeChoice(weights=weights), check_tokens=200, threads=1)
    directory = make_directory(activation=activation, hidden_size=64, head_dim=16)
    report = export_model(plan_export(directory, config), directory.parent / "o.gguf", TEXT, config)
    assert report.check is not None
    assert report.check.passed
    assert report.check.tokens == 200
    file = ModelFile(report.output)
    wide = "Q8_0" if weights == "Q4_0" else weights
    types = {name: tensor.type_name for name, tensor in file.tensors.items()}
    assert types["blk.0.attn_q.weight"] == types["blk.1.ffn_up.weight"] == weights
    assert types["token_embd.weight"] == types["output.weight"] == wide
    assert types["blk.0.attn_norm.weight"] == "F32"
    if activation is None:
        assert types["blk.1.ffn_down.weight"] == weights
    else:
        assert types["blk.1.ffn_down_t.weight"] == wide


def test_types_of_parts(make_directory: MakeDirectory) -> None:
    types = TypeChoice(weights="F16", down="Q4_0", embedding="F32")
    file = ModelFile(export(make_directory(activation="relu"), unchecked(types)))
    found = {name: tensor.type_name for name, tensor in file.tensors.items()}
    assert found["blk.0.ffn_down_t.weight"] == "Q4_0"
    assert found["token_embd.weight"] == found["output.weight"] == "F32"
    assert found["blk.0.ffn_gate.weight"] == "F16"


def test_shards_give_the_same_file(make_directory: MakeDirectory) -> None:
    whole = export(make_directory(), unchecked()).read_bytes()
    sharded = make_directory(shards="20KB")
    (sharded / "model.safetensors").unlink()
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert export(sharded, unchecked()).read_bytes() == whole


def test_what_people_want_to_know(make_directory: MakeDirectory) -> None:
    directory = make_directory(activation="drelu", tokens=5000)
    card = "---\nlicense: apache-2.0\nbase_model: org/Base-1B\nmodel_name: Sparse One\n---\n# A model\n"
    (directory / "README.md").write_text(card, encoding="utf-8")
    keys = ModelFile(export(directory, unchecked())).metadata
    assert keys["general.name"] == "Sparse One"
    assert keys["general.license"] == "apache-2.0"
    assert keys["general.base_model.0.name"] == "Base-1B"
    assert keys["general.base_model.0.repo_url"] == "https://huggingface.co/org/Base-1B"
    assert (keys["turbosparse.training.tokens"], keys["turbosparse.training.stage"]) == (5000, "distillation")
    assert keys["general.file_type"] == 0
    (directory / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")
    keys = ModelFile(export(directory, unchecked(name="Mine"))).metadata
    assert keys["general.name"] == "Mine"
    assert "general.license" not in keys
    ours = "---\ntags: [turbosparse]\nbase_model: org/Base-1B\n---\n\n# Base-1B with drelu\n"
    (directory / "README.md").write_text(ours, encoding="utf-8")
    assert ModelFile(export(directory, unchecked())).metadata["general.name"] == "Base-1B with drelu"
