"""The fit before training: what it keeps, and that the down projection solves its least squares."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_hf import make_hf_model
from turbosparse.models.activations import Activation
from turbosparse.models.gated_ffn import GatedFFN, gated_ffns
from turbosparse.models.registry import swap_activation
from turbosparse.sparsify.initial_fit import fit_swapped_ffns

IDS = torch.arange(640).reshape(20, 32) * 7 % 250


def batch() -> dict[str, Tensor]:
    return {"input_ids": IDS, "position_ids": torch.arange(32).expand(20, 32)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch(), use_cache=False).logits
    return found


class PlainFFN(nn.Module):  # type: ignore[misc, unused-ignore]
    """Two inputs, three neurons, whose energies are known."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        gate = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
        up = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 0.1]])
        if fused:
            self.gate_up_proj = nn.Linear(2, 6, bias=False)
            self.gate_up_proj.weight = nn.Parameter(torch.cat([gate, up]))
        else:
            self.gate_proj, self.up_proj = nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)
            self.gate_proj.weight, self.up_proj.weight = nn.Parameter(gate), nn.Parameter(up)
        self.down_proj = nn.Linear(3, 2, bias=False)
        self.down_proj.weight = nn.Parameter(torch.tensor([[3.0, 0.0, 0.1], [0.0, 1.0, 0.1]]))
        self.act_fn = nn.SiLU()


class OneLayer(nn.Module):  # type: ignore[misc, unused-ignore]
    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        ffn = PlainFFN(fused=fused)
        self.mlp = GatedFFN(ffn, Activation(name="drelu"), Activation(name="relu"))

    def forward(self, x: Tensor, **_: object) -> Tensor:
        y: Tensor = self.mlp(x)
        return y


def errors_of(experts: nn.Module, *inputs: Tensor) -> list[float]:
    class OnlyExperts(nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, **_: object) -> Tensor:
            y: Tensor = self.experts(*inputs)
            return y

    errors: list[float] = fit_swapped_ffns(OnlyExperts(), {})
    return errors


@pytest.mark.parametrize("fused", [False, True])
def test_the_largest_halves_are_kept(fused: bool) -> None:
    # Neuron 0 is large on both sides of up, neuron 1 on the side where the second input is negative, and
    # neuron 2 is small: both halves of 0 and the larger half of 1 stay.
    model = OneLayer(fused=fused)
    x = torch.tensor([[1.0, 1.0], [2.0, -1.5], [1.0, -2.0], [0.5, 0.7], [-1.0, 3.0]])
    before = model.mlp.down_proj(Activation(name="relu")(*model.mlp.project(x)))
    (error,) = fit_swapped_ffns(model, {"x": x}, ridge=1e-9)
    gate, up = model.mlp.project(torch.eye(2))
    assert gate.T.tolist() == [[1.0, 0.0]] * 3
    assert up.T.tolist() == [[0.0, 1.0], [0.0, -1.0], [0.0, -1.0]]
    # Nothing is lost but neuron 2 of the old layer, which the fit makes from what is left.
    assert error < 1e-6
    assert torch.allclose(model.mlp(x), before, atol=1e-3)


@pytest.mark.parametrize("activation", ["drelu", "relu", "relu2", "fatrelu:0.05"])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_errors_shrink_in_every_layer(kind: str, activation: str) -> None:
    name, _, threshold = activation.partition(":")
    swapped = make_hf_model(kind)
    original = logits(swapped)
    swap_activation(swapped, Activation(name=name, threshold=float(threshold or 0)))
    plain = float((logits(swapped) - original).square().sum())
    errors = fit_swapped_ffns(swapped, batch())
    assert len(errors) == len(gated_ffns(swapped))
    assert all(error < 0.9 for error in errors)
    fitted = float((logits(swapped) - original).square().sum())
    assert fitted < 0.8 * plain


def test_an_unchanged_activation_stays_as_it_is() -> None:
    model = make_hf_model()
    expected = logits(model)
    swap_activation(model, Activation(name="relu"))
    for ffn in gated_ffns(model).values():
        ffn.activation = ffn.original
    assert max(fit_swapped_ffns(model, batch())) < 1e-6
    assert torch.allclose(logits(model), expected, atol=1e-4)


def test_each_expert_is_fitted_on_its_own_tokens() -> None:
    model = make_hf_model("mixtral")
    original = logits(model)
    swap_activation(model, Activation(name="drelu"))
    plain = float((logits(model) - original).square().sum())
    errors = fit_swapped_ffns(model, batch())
    experts = sum(ffn.num_experts for ffn in gated_ffns(model).values())
    assert len(errors) == experts
    assert all(error < 0.9 for error in errors)
    fitted = float((logits(model) - original).square().sum())
    assert fitted < 0.8 * plain


def test_an_expert_without_tokens_stays_as_it_is() -> None:
    model = make_hf_model("mixtral")
    swap_activation(model, Activation(name="drelu"))
    (experts, *_) = gated_ffns(model).values()
    before = experts.down_proj.detach().clone()
    x = torch.randn(40, 32)
    chosen, weights = torch.zeros(40, 1, dtype=torch.int64), torch.ones(40, 1)
    (error, *others) = errors_of(experts, x, chosen, weights)
    assert error < 1
    assert all(math.isnan(other) for other in others)
    assert torch.equal(experts.down_proj[1:], before[1:])
    assert not torch.equal(experts.down_proj[0], before[0])
