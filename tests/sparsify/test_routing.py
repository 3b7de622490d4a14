"""Routing of mixtures while they train: the balance loss, what it changes, and who may ask for it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sparsify.conftest import MakeRecipe
from tests.sparsify.test_run import losses, metrics
from tests.tiny_hf import make_hf_model, make_tokenizer
from turbosparse.errors import ConfigError
from turbosparse.sparsify.routing import balance_loss, load_entropy
from turbosparse.sparsify.run import run_recipe


def slow_balance(logits: Tensor, k: int) -> float:
    """The same by its definition, token by token."""
    tokens, experts = logits.shape
    total = 0.0
    for expert in range(experts):
        sent = sum(expert in sorted(range(experts), key=lambda e: -float(row[e]))[:k] for row in logits)
        probability = sum(float(torch.softmax(row, 0)[expert]) for row in logits) / tokens
        total += experts * sent / (tokens * k) * probability
    return total


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (4, 2), (7, 3), (3, 3)])
def test_the_balance_loss_is_its_definition(experts: int, k: int) -> None:
    layers = torch.randn(2, 11, experts, generator=torch.Generator().manual_seed(0))
    expected = sum(slow_balance(logits, k) for logits in layers) / 2
    assert float(balance_loss(list(layers), experts_per_token=k)) == pytest.approx(expected, rel=1e-5)


def test_the_balance_loss_evens_out_a_router() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator) + 1  # a common direction: some experts get most tokens
    router = torch.randn(4, 8, generator=generator).requires_grad_()
    before = float(balance_loss([x @ router.detach().T], experts_per_token=2))
    optimizer = torch.optim.Adam([router], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        balance_loss([x @ router.T], experts_per_token=2).backward()
        optimizer.step()
    after = float(balance_loss([x @ router.detach().T], experts_per_token=2))
    assert before > 1.2
    assert after == pytest.approx(1, abs=0.05)


def test_the_entropy_of_the_load() -> None:
    assert load_entropy(torch.tensor([3, 3, 3])) == pytest.approx(1)
    assert load_entropy(torch.tensor([9, 0, 0])) == 0
    assert load_entropy(torch.tensor([9])) == 0


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_a_run_with_the_loss_is_better_balanced(
    make_recipe: MakeRecipe, tmp_path: Any, model_type: str
) -> None:
    make_hf_model(model_type).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    found = {}
    for weight in (0.0, 1.0):
        stage = {
            "loss": {"next_token": 1.0, "router_balance": weight},
            "tokens": 32 * 4 * 20,
            "gradient_checkpointing": model_type == "mixtral",  # router logits are captured inside of it
        }
        recipe = make_recipe(stage, model=str(tmp_path / "model"), output=f"run{weight}")
        run_recipe(recipe)
        found[weight] = metrics(recipe)[-1]["routing_entropy"]
        line = metrics(recipe, event="evaluation")[-1]
        assert len(line["routing_entropy_per_layer"]) == 2
        assert all(0 < entropy <= 1 for entropy in line["routing_entropy_per_layer"])
        assert ("loss_router_balance" in metrics(recipe)[-1]) == (weight > 0)
    assert found[1.0] > found[0.0]
    assert (
        losses(recipe)[-1] > metrics(recipe)[-1]["loss_next_token"] + 0.99
    )  # it is part of what is minimised


def test_a_dense_model_has_no_router(make_recipe: MakeRecipe) -> None:
    with pytest.raises(
        ConfigError, match=r"router_balance\] expected a mixture of experts, got .* of type \w*llama"
    ):
        run_recipe(make_recipe({"loss": {"next_token": 1.0, "router_balance": 0.01}}))


@pytest.mark.parametrize(
    "stage",
    [
        {"loss": {"ffn_output": 1.0, "router_balance": 0.01}},
        {"loss": {"next_token": 1.0, "router_balance": 0.01}, "trainable": "ffn"},
    ],
)
def test_fixed_routers_cannot_be_balanced(make_recipe: MakeRecipe, stage: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"router_balance\] expected 0 where only FFNs are trained"):
        make_recipe(stage)


def test_balance_alone_teaches_nothing(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match=r"\[loss\] expected at least one weight above 0, got"):
        make_recipe({"loss": {"router_balance": 0.01}})
