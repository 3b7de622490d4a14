"""The swap on every supported model type: same weights, same function, and never silently the old one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny_hf import make_hf_model, tiny_ids
from turbosparse.errors import ConfigError, ModelFileError
from turbosparse.models.activations import Activation
from turbosparse.models.gated_ffn import gated_ffns, replace_ffns
from turbosparse.models.registry import (
    MODEL_TYPES,
    activation_of,
    activation_of_config,
    load_config,
    load_model,
    register,
    swap_activation,
)

DRELU = Activation(name="drelu")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(tiny_ids()).logits
    return result


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_replacing_the_modules_changes_nothing(model_type: str) -> None:
    model = make_hf_model(model_type)
    before = logits(model)
    names = list(model.state_dict())
    replaced = replace_ffns(model, activation_of(model), activation_of(model))
    assert replaced >= 2
    assert list(model.state_dict()) == names
    torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_swapped_model_saves_and_loads(model_type: str, tmp_path: Path) -> None:
    model = make_hf_model(model_type)
    dense = logits(model)
    swapped = swap_activation(model, DRELU)
    assert swapped is model
    assert model.config.model_type == f"turbosparse_{model_type}"
    after = logits(model)
    assert (after - dense).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["model_type"] == f"turbosparse_{model_type}"
    assert saved["turbosparse"] == {"name": "drelu", "threshold": 0.0}
    for loaded in (load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert all(ffn.activation == DRELU for ffn in gated_ffns(loaded).values())
        torch.testing.assert_close(logits(loaded), after)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "mixtral"])
@pytest.mark.parametrize("name", ["relu", "relu2"])
def test_what_transformers_can_compute_needs_no_class_of_ours(
    model_type: str, name: str, tmp_path: Path
) -> None:
    model = swap_activation(make_hf_model(model_type), Activation(name=name))
    after = logits(model)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == model_type
    assert not gated_ffns(plain)
    torch.testing.assert_close(logits(plain), after)
    assert activation_of(plain) == Activation(name=name)


def test_the_swapped_ffn_computes_drelu() -> None:
    model = swap_activation(make_hf_model(), DRELU)
    ffn = next(iter(gated_ffns(model).values()))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    weights = {name: value.detach() for name, value in ffn.named_parameters()}
    gate, up = x @ weights["gate_proj.weight"].T, x @ weights["up_proj.weight"].T
    expected = (gate.clamp(min=0) * up.clamp(min=0)) @ weights["down_proj.weight"].T
    torch.testing.assert_close(ffn(x).detach(), expected)


def test_transformers_alone_refuses_a_swapped_model(tmp_path: Path) -> None:
    swap_activation(make_hf_model(), DRELU).save_pretrained(tmp_path)
    code = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "turbosparse_llama" in result.stderr


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_experts_of_a_loaded_model_are_saved_under_the_usual_names(model_type: str, tmp_path: Path) -> None:
    make_hf_model(model_type).save_pretrained(tmp_path / "dense")
    model = swap_activation(load_model(tmp_path / "dense"), DRELU)
    after = logits(model)
    model.save_pretrained(tmp_path / "sparse")
    names = [set(load_file(tmp_path / kind / "model.safetensors")) for kind in ("dense", "sparse")]
    assert names[0] == names[1]
    torch.testing.assert_close(logits(load_model(tmp_path / "sparse")), after)


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    make_hf_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=r"got none for 1 tensors, such as model\.layers\.1\.mlp\.up"):
        load_model(tmp_path)


def test_threshold_survives(tmp_path: Path) -> None:
    swap_activation(make_hf_model(), Activation(name="fatrelu", threshold=0.01)).save_pretrained(tmp_path)
    assert activation_of(load_model(tmp_path)) == Activation(name="fatrelu", threshold=0.01)


def test_blend_goes_from_the_original_to_the_new_activation() -> None:
    model = make_hf_model()
    dense = logits(model)
    swap_activation(model, DRELU)
    sparse = logits(model)
    for blend, expected in ((0.0, dense), (1.0, sparse)):
        for ffn in gated_ffns(model).values():
            ffn.blend = blend
        torch.testing.assert_close(logits(model), expected)


def test_a_model_without_gated_ffn_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=16, n_head=2))
    with pytest.raises(ConfigError, match=r"expected a model with gated FFNs of type llama.*got 'gpt2'"):
        swap_activation(model, DRELU)
    with pytest.raises(ConfigError, match="got none"):
        replace_ffns(model, DRELU, DRELU)


def test_a_second_swap_is_refused() -> None:
    model = swap_activation(make_hf_model(), DRELU)
    with pytest.raises(ConfigError, match="not swapped yet, got drelu"):
        swap_activation(model, DRELU)


def test_register_twice_is_harmless() -> None:
    register("llama")
    register()


def test_a_configuration_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelFileError, match="expected the configuration of a model, got: "):
        load_config(tmp_path)


def test_a_gemma_whose_later_field_is_empty() -> None:
    config = AutoConfig.for_model("gemma", hidden_act="gelu_pytorch_tanh", hidden_activation=None)
    assert activation_of_config(config) == Activation(name="gelu")
