"""Before training: make what a swap leaves of each FFN compute the original's output as well as it can.

A neuron ``act(gate) * up * down`` has two halves, one for each sign of ``up``, and dReLU keeps one of them.
Either can be kept: the neuron with its row of up and its column of down negated computes the same as before.
So a layer of F neurons has 2F halves to choose F from, and the norms of their outputs differ widely: the F
largest lose far less than one of each neuron. Then the down projection is refitted by least squares to the
original outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from turbosparse.models.activations import Activation
from turbosparse.models.gated_ffn import GatedExperts, GatedFFN, gated_ffns

__all__ = ["fit_swapped_ffns"]

_CHUNK = 2048  # tokens whose intermediate states are held at a time


@torch.no_grad()
def fit_swapped_ffns(model: nn.Module, batch: Mapping[str, Tensor], *, ridge: float = 1e-2) -> list[float]:
    """Choose the halves of neurons that a swap to dReLU keeps, and refit the down projections of any swap.

    Parameters
    ----------
    model : nn.Module
        A swapped model that was not trained yet; its weights are changed in place.
    batch : mapping of str to Tensor
        Calibration text as model inputs, all of it in one batch: a few times as many tokens as a layer has
        neurons, or more; for experts, as many per expert.
    ridge : float, default 1e-2
        Pull of each column of the down projection towards what it was, relative to the mean energy of a
        neuron; above 0.

    Returns
    -------
    list of float
        Squared error of each FFN's output on its own input, relative to the original output; each expert is
        an FFN. NaN for an expert that no token was sent to; it is left as it is.

    Notes
    -----
    One forward pass: each FFN is fitted when its input arrives, so that the layers after it see the new
    output.
    """
    errors: list[float] = []

    def _fit(ffn: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(ffn, GatedFFN | GatedExperts)
        x = inputs[0].flatten(0, -2)
        if isinstance(ffn, GatedFFN):
            errors.append(_fit_ffn(_projections(ffn), ffn.original, ffn.activation, x, ridge))
            return
        for expert in range(ffn.num_experts):
            tokens = torch.where(inputs[1] == expert)[0]
            gate, up = ffn.gate_up_proj[expert].chunk(2)
            projections = _Projections(gate=gate, up=up, down=ffn.down_proj[expert])
            errors.append(_fit_ffn(projections, ffn.original, ffn.activation, x[tokens], ridge))

    hooks = [ffn.register_forward_pre_hook(_fit) for ffn in gated_ffns(model).values()]
    try:
        model(**batch, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return errors


@dataclass(frozen=True)
class _Projections:
    """The weights of one FFN, as views of the model's."""

    gate: Tensor  # [F, D]
    up: Tensor  # [F, D]
    down: Tensor  # [D, F]
    gate_bias: Tensor | None = None  # [F]
    up_bias: Tensor | None = None  # [F]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.linear(x, self.gate, self.gate_bias), functional.linear(x, self.up, self.up_bias)

    def keep_halves(self, halves: Tensor) -> None:
        """Make neuron i what half ``halves[i]`` was: i is up's positive side, F + i its negative."""
        size = len(halves)
        neuron = halves % size
        sign = torch.where(halves < size, 1.0, -1.0).to(self.down)  # [F]
        self.gate.copy_(self.gate[neuron])
        self.up.copy_(self.up[neuron] * sign[:, None])
        self.down.copy_(self.down[:, neuron] * sign)
        if self.gate_bias is not None:
            self.gate_bias.copy_(self.gate_bias[neuron])
        if self.up_bias is not None:
            self.up_bias.copy_(self.up_bias[neuron] * sign)


def _projections(ffn: GatedFFN) -> _Projections:
    if ffn.fused:
        gate, up = ffn.gate_up_proj.weight.chunk(2)
        bias = ffn.gate_up_proj.bias
        biases = (None, None) if bias is None else bias.chunk(2)
    else:
        gate, up = ffn.gate_proj.weight, ffn.up_proj.weight
        biases = ffn.gate_proj.bias, ffn.up_proj.bias
    return _Projections(gate, up, ffn.down_proj.weight, *biases)


def _fit_ffn(
    ffn: _Projections, original: Activation, activation: Activation, x: Tensor, ridge: float
) -> float:
    """Fit one FFN to inputs [N, D]; a bias of the down projection stays what it is."""
    if not len(x):
        return float("nan")
    down = ffn.down
    size = down.shape[1]
    chunks = x.split(_CHUNK)
    expected: list[Tensor] = []  # [n, D] each
    energies = torch.zeros(2, size, dtype=torch.float64, device=x.device)  # of the halves, up > 0 and up < 0
    for chunk in chunks:
        gate, up = ffn(chunk)
        expected.append(functional.linear(original(gate, up), down))
        signed = torch.relu(gate).square() * up * up.abs()  # energy, with the sign of up
        energies[0] += signed.clamp(min=0).sum(0)
        energies[1] -= signed.clamp(max=0).sum(0)
    if activation.name == "drelu":
        energies *= down.square().sum(0)
        ffn.keep_halves(energies.flatten().topk(size).indices.sort().values)
    gram = torch.zeros(size, size, dtype=torch.float64, device=x.device)  # [F, F]
    moment = torch.zeros(size, down.shape[0], dtype=torch.float64, device=x.device)  # [F, D]
    for chunk, target in zip(chunks, expected, strict=True):
        h = activation(*ffn(chunk))  # [n, F]
        gram += h.T @ h
        moment += h.T @ target
    pull = ridge * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    regular = gram + pull * torch.eye(size, dtype=gram.dtype, device=x.device)
    fitted = torch.linalg.solve(regular, moment + pull * down.T)  # [F, D]
    down.copy_(fitted.T)
    energy = sum(float(target.double().square().sum()) for target in expected)
    error = energy + float((fitted * (gram @ fitted - 2 * moment)).sum())
    return max(error, 0.0) / max(energy, 1e-30)
