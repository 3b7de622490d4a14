"""Mixtures made of dense models: the same function at the start, then experts that part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.sparsify.conftest import MakeRecipe
from tests.sparsify.test_run import losses, metrics
from tests.tiny_hf import make_hf_model, make_tokenizer, tiny_ids
from turbosparse.errors import ConfigError
from turbosparse.models.activations import Activation
from turbosparse.models.registry import activation_of, load_model, swap_activation
from turbosparse.sparsify.estimate import estimate_run
from turbosparse.sparsify.fresh_model import write_start
from turbosparse.sparsify.recipe import recipe_from_dict, recipe_to_dict
from turbosparse.sparsify.run import run_recipe
from turbosparse.sparsify.upcycling import start_of, upcycle

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
DISTILLATION = {"loss": {"logits": 1.0, "router_balance": 0.01}}


def save(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3, "hidden_act": "relu"}),
        ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 16}),
        ("mistral", {"sliding_window": 5}),
    ],
)
def test_the_mixture_computes_what_the_dense_model_does(
    make_recipe: MakeRecipe, tmp_path: Path, model_type: str, settings: dict[str, Any]
) -> None:
    dense = make_hf_model(model_type, **settings)
    recipe = make_recipe(DISTILLATION, model=save(dense, tmp_path / "dense"), upcycle=EXPERTS)
    upcycle(recipe)
    mixture = AutoModelForCausalLM.from_pretrained(start_of(recipe))  # plain transformers, no class of ours
    assert mixture.config.model_type == "mixtral"
    assert (mixture.config.num_local_experts, mixture.config.num_experts_per_tok) == (4, 2)
    ids = tiny_ids(length=48)
    with torch.no_grad():
        torch.testing.assert_close(mixture(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    chosen = mixture.model.layers[0].mlp.gate(torch.randn(64, 32))[2]
    assert len(chosen.unique()) == 4  # the router sends different tokens to different experts


def test_a_start_is_written_once_and_follows_the_seed(make_recipe: MakeRecipe) -> None:
    routers: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        recipe = make_recipe(DISTILLATION, output=f"run{len(routers)}", upcycle=EXPERTS, seed=seed)
        upcycle(recipe)
        routers.append(load_model(start_of(recipe)).model.layers[1].mlp.gate.weight)
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])
    weights = Path(start_of(recipe)) / "model.safetensors"
    written = weights.stat().st_mtime_ns
    upcycle(recipe)
    assert weights.stat().st_mtime_ns == written


def test_a_start_of_other_settings_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    upcycle(make_recipe(DISTILLATION, upcycle=EXPERTS))
    other = save(make_hf_model(hidden_size=64), tmp_path / "other")
    changed: list[tuple[dict[str, Any], str]] = [
        (
            {"upcycle": EXPERTS | {"num_experts": 8}},
            r"upcycle.num_experts\] expected 4, with which .*, got 8",
        ),
        ({"upcycle": EXPERTS, "seed": 3}, r"seed\] expected 0, with which .*run/start was made, got 3"),
        ({"upcycle": EXPERTS, "model": other}, r"base_model\] expected '.*', with which .*, got '.*'"),
    ]
    for changes, message in changed:
        with pytest.raises(ConfigError, match=rf"\[{message}; give the run another output"):
            upcycle(make_recipe(DISTILLATION, **changes))
    (Path(start_of(make_recipe(DISTILLATION, upcycle=EXPERTS))) / "turbosparse_start.json").unlink()
    upcycle(make_recipe(DISTILLATION, **changed[0][0]))  # of an earlier version


def test_another_kind_of_start_is_refused(tmp_path: Path) -> None:
    assert write_start(tmp_path / "start", {"start": "fresh", "fresh.hidden_size": 32}, Path.touch)
    with pytest.raises(ConfigError, match=r"\[start\] expected 'fresh', with which .*, got 'upcycle'"):
        write_start(tmp_path / "start", {"start": "upcycle", "upcycle.num_experts": 4}, Path.touch)


def test_experts_part_while_they_learn(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(DISTILLATION | {"tokens": 32 * 4 * 20}, upcycle=EXPERTS)
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe
    result = run_recipe(recipe)
    model = load_model(result.model)
    assert activation_of(model) == Activation(name="drelu")
    down = model.model.layers[0].mlp.experts.down_proj
    assert all(not torch.equal(down[0], expert) for expert in down[1:])
    found = losses(recipe)
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    assert metrics(recipe, event="original")  # of the dense model
    assert "made 4 experts of which a token uses 2" in (result.model / "README.md").read_text(
        encoding="utf-8"
    )


def test_ffns_are_compared_with_those_of_the_mixture(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"loss": {"ffn_output": 1.0}, "tokens": 32 * 4 * 15}, upcycle=EXPERTS)
    run_recipe(recipe)
    found = losses(recipe)
    assert sum(found[10:]) < sum(found[:5])


def test_a_control_starts_from_the_same_mixture(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(DISTILLATION, upcycle=EXPERTS)
    model = load_model(run_recipe(recipe, control=True).model)
    assert (model.config.model_type, str(activation_of(model))) == ("mixtral", "silu")
    first = metrics(recipe, event="evaluation")[0]
    (original,) = metrics(recipe, event="original")
    assert first["perplexity_book"] == pytest.approx(original["perplexity_book"], rel=1e-4)


def test_the_estimate_counts_the_experts_of_a_token(make_recipe: MakeRecipe, base: Path) -> None:
    def estimate(**experts: int) -> Any:
        (found,) = estimate_run(make_recipe({"loss": {"next_token": 1.0}}, upcycle=experts), flops=1e9)
        return found

    two_of_4, two_of_8, four_of_8 = (
        estimate(num_experts=experts, num_experts_per_tok=k) for experts, k in ((4, 2), (8, 2), (8, 4))
    )
    ffn = 2 * 3 * 32 * 48  # layers, projections, D, F
    routers = 2 * 4 * 32  # of the four more experts
    assert two_of_8.flops_per_token == two_of_4.flops_per_token + 6 * routers
    assert four_of_8.flops_per_token == two_of_8.flops_per_token + 6 * 2 * ffn
    assert two_of_8.memory_gb > two_of_4.memory_gb


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"num_experts": 1}, r"\[upcycle.num_experts\] expected at least 2, got 1"),
        (
            {"num_experts": 4, "num_experts_per_tok": 5},
            r"\[upcycle.num_experts_per_tok\] expected 2 to 4, got 5",
        ),
        (
            {"num_experts": 4, "num_experts_per_tok": 1},
            r"\[upcycle.num_experts_per_tok\] expected 2 to 4, got 1",
        ),
    ],
)
def test_wrong_experts_are_named(make_recipe: MakeRecipe, experts: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe(DISTILLATION, upcycle=experts)


def test_random_weights_are_not_upcycled(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match=r"\[upcycle\] expected a trained model, got 'random weights'"):
        make_recipe({"loss": {"next_token": 1.0}}, from_scratch=True, upcycle=EXPERTS)


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("mixtral", {}, "expected a dense model of type llama or mistral, got mixtral"),
        ("qwen3", {}, "expected a dense model of type llama or mistral, got qwen3"),
        ("llama", {"attention_bias": True}, "expected a model without biases, got attention_bias"),
    ],
)
def test_wrong_models_are_named(
    make_recipe: MakeRecipe, tmp_path: Path, model_type: str, settings: dict[str, Any], message: str
) -> None:
    model = save(make_hf_model(model_type, **settings), tmp_path / "dense")
    with pytest.raises(ConfigError, match=rf"\[upcycle\] {message}"):
        run_recipe(make_recipe(DISTILLATION, model=model, upcycle=EXPERTS))


def test_a_swapped_model_is_not_upcycled(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = save(swap_activation(make_hf_model(), Activation(name="drelu")), tmp_path / "swapped")
    with pytest.raises(ConfigError, match=r"\[upcycle\] expected .* got turbosparse_llama"):
        run_recipe(make_recipe(DISTILLATION, model=model, upcycle=EXPERTS))
