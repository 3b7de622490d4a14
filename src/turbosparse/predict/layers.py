"""What a predictor is for: one dense FFN or one expert, as weights and the bytes that its rows take."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from turbosparse.errors import ConfigError
from turbosparse.models.activations import Activation
from turbosparse.models.gated_ffn import GatedExperts, GatedFFN, PlainFFN, gated_ffns

__all__ = ["BYTES_PER_WEIGHT", "FFNLayer", "Neurons", "RowBytes", "layers_of"]

BYTES_PER_WEIGHT = {"F32": 4.0, "F16": 2.0, "BF16": 2.0, "Q8_0": 34 / 32, "Q4_0": 18 / 32}
"""By the weight types that the engine reads."""


class RowBytes(NamedTuple):
    """What one neuron's rows take, in bytes."""

    gate: float
    up: float
    down: float


class Neurons(NamedTuple):
    """What the neurons of a layer do for N tokens."""

    passed: Tensor
    """bool [N, F]: those whose row of up is needed."""
    activations: Tensor
    """[N, F]: inputs of the down projection, 0 where the neuron is skipped anyway."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FFNLayer:
    """The weights of one dense FFN or one expert, in float32."""

    gate: Tensor
    """[F, D]; of a plain FFN its only projection."""
    up: Tensor | None
    """[F, D]; None in a plain FFN."""
    down: Tensor
    """[D, F]"""
    activation: Activation
    row_bytes: RowBytes
    thresholds: tuple[Tensor, Tensor] | None = None
    """On abs(f(gate)) and abs(f(gate) g(up)), each [F]: what is below is skipped."""

    @torch.no_grad()
    def neurons(self, x: Tensor) -> Neurons:
        """Compute what the neurons do without a predictor.

        Parameters
        ----------
        x : Tensor of shape [N, D]
            Inputs of the FFN.

        Returns
        -------
        Neurons
            Whose up is needed, and the activations.
        """
        gate = functional.linear(x, self.gate)
        up = torch.ones_like(gate) if self.up is None else functional.linear(x, self.up)
        f, g = self.activation.factors(gate, up)
        activations = f * g
        if self.thresholds is not None:
            passed = (f != 0) & (f.abs() >= self.thresholds[0])
            return Neurons(passed, activations * (passed & (activations.abs() >= self.thresholds[1])))
        passed = f != 0 if self.activation.is_sparse else torch.ones_like(f, dtype=torch.bool)
        return Neurons(passed, activations)

    @property
    def dense_bytes(self) -> float:
        """All rows, in bytes."""
        return len(self.gate) * sum(self.row_bytes)


def layers_of(model: Any, weight_type: str) -> dict[str, FFNLayer]:
    """Take the FFNs of a model apart.

    Parameters
    ----------
    model : PreTrainedModel
        A model with `GatedFFN` or `GatedExperts` modules.
    weight_type : str
        One of `BYTES_PER_WEIGHT`: what the rows will be in the model file.

    Returns
    -------
    dict of str to FFNLayer
        By the module's name; experts have their number behind it, as in ``model.layers.0.mlp.experts.3``.

    Raises
    ------
    ConfigError
        If the model has no gated FFN, or one with biases.
    """
    layers: dict[str, FFNLayer] = {}
    for name, ffn in gated_ffns(model).items():
        if any(part.endswith("bias") for part, _ in ffn.named_parameters()):
            raise ConfigError(f"[{name}] expected an FFN without biases, got one with")
        if isinstance(ffn, GatedExperts):
            for expert in range(ffn.num_experts):
                gate, up = ffn.gate_up_proj[expert].chunk(2)
                layers[f"{name}.{expert}"] = _layer(ffn, gate, up, ffn.down_proj[expert], weight_type)
        else:
            layers[name] = _layer(ffn, *_gate_and_up(ffn), ffn.down_proj.weight, weight_type)
    if not layers:
        raise ConfigError(f"[{type(model).__name__}] expected a model with FFNs, got none")
    return layers


def _gate_and_up(ffn: GatedFFN) -> tuple[Tensor, Tensor | None]:
    if isinstance(ffn, PlainFFN):
        return ffn.up_proj.weight, None
    if ffn.fused:
        gate, up = ffn.gate_up_proj.weight.chunk(2)
        return gate, up
    return ffn.gate_proj.weight, ffn.up_proj.weight


def _layer(
    ffn: GatedFFN | GatedExperts, gate: Tensor, up: Tensor | None, down: Tensor, weight_type: str
) -> FFNLayer:
    row = gate.shape[1] * BYTES_PER_WEIGHT[weight_type]
    return FFNLayer(
        gate=gate.detach().float(),
        up=None if up is None else up.detach().float(),
        down=down.detach().float(),
        activation=ffn.activation,
        row_bytes=RowBytes(row, 0.0 if up is None else row, row),
    )
