"""Choose the sign of each neuron's up projection before a swap to dReLU.

``act(gate) * up * down`` does not change when a neuron's row of up and its column of down both change sign,
but dReLU keeps only the part where up is positive. Calibration text tells on which side most of a neuron's
output lies; neurons on the wrong side are flipped.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from turbosparse.models.gated_ffn import GatedFFN, gated_ffns

__all__ = ["align_signs"]


@torch.no_grad()
def align_signs(model: nn.Module, original: nn.Module, batches: Iterable[dict[str, Tensor]]) -> float:
    """Flip the neurons of a swapped model whose energy lies where dReLU would drop it.

    Parameters
    ----------
    model : nn.Module
        The swapped model; its weights are changed in place.
    original : nn.Module
        The model before the swap, its FFNs replaced by `GatedFFN` modules that compute the original
        activation.
    batches : iterable of dict of Tensor
        Calibration text as model inputs; a few thousand tokens are enough.

    Returns
    -------
    float
        Share of neurons that were flipped.

    Notes
    -----
    The energy of a neuron on one side is the sum over tokens of (max(0, gate) * up)^2. Experts are left as
    they are.
    """
    energies: dict[str, Tensor] = {}
    sources = {name: ffn for name, ffn in gated_ffns(original).items() if isinstance(ffn, GatedFFN)}

    def _add_energy(name: str, ffn: GatedFFN, inputs: tuple[Any, ...]) -> None:
        gate, up = ffn.project(inputs[0])
        signed = torch.relu(gate).square() * up * up.abs()  # energy, with the sign of up
        energy = signed.double().flatten(0, -2).sum(0)  # [F]
        energies[name] = energies[name] + energy if name in energies else energy

    hooks = [ffn.register_forward_pre_hook(partial(_add_energy, name)) for name, ffn in sources.items()]
    try:
        for batch in batches:
            original(**batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    flipped = total = 0
    targets = gated_ffns(model)
    for name, energy in energies.items():
        ffn = targets[name]
        assert isinstance(ffn, GatedFFN)
        sign = torch.where(energy < 0, -1.0, 1.0)  # [F]
        up = ffn.gate_up_proj if ffn.fused else ffn.up_proj
        for values in [up.weight] + ([up.bias] if up.bias is not None else []):
            half = values[len(values) - len(sign) :]  # a fused projection has up in its second half
            half *= sign.to(values).reshape(-1, *[1] * (values.dim() - 1))
        ffn.down_proj.weight *= sign.to(ffn.down_proj.weight)
        flipped += int((sign < 0).sum())
        total += len(sign)
    return flipped / max(total, 1)
