"""Before training: make what a swap leaves of each FFN compute the original's output as well as it can.

A neuron ``act(gate) * up * down`` has two halves, one for each sign of ``up``, and dReLU keeps one of them.
Either can be kept: the neuron with its row of up and its column of down negated computes the same as before.
So a layer of F neurons has 2F halves to choose F from, and the norms of their outputs differ widely: the F
largest lose far less than one of each neuron. Then the down projection is refitted by least squares to the
original outputs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from turbosparse.models.gated_ffn import GatedFFN, gated_ffns

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
        neurons, or more.
    ridge : float, default 1e-2
        Pull of each column of the down projection towards what it was, relative to the mean energy of a
        neuron; above 0.

    Returns
    -------
    list of float
        Squared error of each layer's output on its own input, relative to the original output.

    Notes
    -----
    One forward pass: each FFN is fitted when its input arrives, so that the layers after it see the new
    output. Experts are left as they are.
    """
    errors: list[float] = []

    def _fit(ffn: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(ffn, GatedFFN)
        errors.append(_fit_ffn(ffn, inputs[0].flatten(0, -2), ridge))

    ffns = [ffn for ffn in gated_ffns(model).values() if isinstance(ffn, GatedFFN)]
    hooks = [ffn.register_forward_pre_hook(_fit) for ffn in ffns]
    try:
        model(**batch, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return errors


def _fit_ffn(ffn: GatedFFN, x: Tensor, ridge: float) -> float:
    """Fit one FFN to inputs [N, D]."""
    down = ffn.down_proj.weight
    size = down.shape[1]
    bias = 0.0 if ffn.down_proj.bias is None else ffn.down_proj.bias
    chunks = x.split(_CHUNK)
    expected: list[Tensor] = []  # [n, D] each, without the bias
    energies = torch.zeros(2, size, dtype=torch.float64, device=x.device)  # of the halves, up > 0 and up < 0
    for chunk in chunks:
        gate, up = ffn.project(chunk)
        expected.append(ffn.down_proj(ffn.original(gate, up)) - bias)
        signed = torch.relu(gate).square() * up * up.abs()  # energy, with the sign of up
        energies[0] += signed.clamp(min=0).sum(0)
        energies[1] -= signed.clamp(max=0).sum(0)
    if ffn.activation.name == "drelu":
        energies *= down.square().sum(0)
        _keep_halves(ffn, energies.flatten().topk(size).indices.sort().values)
    gram = torch.zeros(size, size, dtype=torch.float64, device=x.device)  # [F, F]
    moment = torch.zeros(size, down.shape[0], dtype=torch.float64, device=x.device)  # [F, D]
    for chunk, target in zip(chunks, expected, strict=True):
        h = ffn.activation(*ffn.project(chunk))  # [n, F]
        gram += h.T @ h
        moment += h.T @ target
    pull = ridge * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    regular = gram + pull * torch.eye(size, dtype=gram.dtype, device=x.device)
    fitted = torch.linalg.solve(regular, moment + pull * down.T)  # [F, D]
    down.copy_(fitted.T)
    energy = sum(float(target.double().square().sum()) for target in expected)
    error = energy + float((fitted * (gram @ fitted - 2 * moment)).sum())
    return max(error, 0.0) / max(energy, 1e-30)


def _keep_halves(ffn: GatedFFN, halves: Tensor) -> None:
    """Make neuron i of the FFN what half ``halves[i]`` was: i is up's positive side, F + i its negative."""
    down = ffn.down_proj.weight
    size = len(halves)
    neuron = halves % size
    sign = torch.where(halves < size, 1.0, -1.0).to(down)  # [F]
    gate, up = (ffn.gate_up_proj,) * 2 if ffn.fused else (ffn.gate_proj, ffn.up_proj)
    for projection, is_up in ((gate, False), (up, True)):
        for values in (projection.weight, projection.bias):
            if values is None:
                continue
            rows = values[len(values) - size :] if is_up else values[:size]  # fused: up is the second half
            kept = rows[neuron]
            rows.copy_(kept * sign.reshape(-1, *[1] * (values.dim() - 1)) if is_up else kept)
    down.copy_(down[:, neuron] * sign)
