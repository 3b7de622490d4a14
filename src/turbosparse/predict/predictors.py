"""Kinds of predictors: each scores the neurons for a state; those at or above a threshold are candidates."""

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from turbosparse.predict.layers import BYTES_PER_WEIGHT, FFNLayer

__all__ = [
    "RIVALS",
    "LowRankPredictor",
    "Predictor",
    "SignBitPredictor",
    "WeightCopyPredictor",
]

_GROUP = 32  # weights that share a scale
# Step of the best uniform quantiser of a Gaussian, in standard deviations (Max, 1960).
_STEP = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335}


class Predictor(Protocol):
    """What scores neurons."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return scores [N, F] of the neurons for states [N, D]; larger is more likely active."""

    def read_bytes(self, weight_type: str) -> float:
        """Return the bytes it reads per token.

        Parameters
        ----------
        weight_type : str
            Of weights that are its own, one of `turbosparse.predict.layers.BYTES_PER_WEIGHT`.

        Returns
        -------
        float
            Bytes.
        """


class LowRankPredictor(nn.Module):
    """``b(relu(a(x)))`` without biases: the form that the model file stores (Deja Vu, arXiv 2310.17157).

    Parameters
    ----------
    hidden_size : int
        D.
    intermediate_size : int
        F.
    rank : int
        Width in between.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Linear(hidden_size, rank, bias=False)  # [R, D]
        self.b = nn.Linear(rank, intermediate_size, bias=False)  # [F, R]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits: positive where a neuron is more likely active than not.

        Parameters
        ----------
        x : Tensor of shape [N, D]
            States.

        Returns
        -------
        Tensor of shape [N, F]
            Logits.
        """
        return self.b(torch.relu(self.a(x)))

    def read_bytes(self, weight_type: str) -> float:
        """Return the bytes of both matrices.

        Parameters
        ----------
        weight_type : str
            What they are stored as.

        Returns
        -------
        float
            Bytes.
        """
        return (self.a.weight.numel() + self.b.weight.numel()) * BYTES_PER_WEIGHT[weight_type]


class SignBitPredictor:
    """Agreement of the signs of x with those of a neuron's gate row, and its up row where both have to be
    positive (SparseInfer, arXiv 2411.12692).

    Parameters
    ----------
    layer : FFNLayer
        Whose weights to take the signs of.
    """

    def __init__(self, layer: FFNLayer) -> None:
        both = layer.up is not None and layer.activation.name == "drelu"
        matrices = [matrix for matrix in (layer.gate, layer.up if both else None) if matrix is not None]
        self._signs = [torch.where(matrix > 0, 1.0, -1.0) for matrix in matrices]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the smaller of the agreements, -1 to 1."""
        signs = torch.where(x > 0, 1.0, -1.0)
        return torch.stack([signs @ rows.T / rows.shape[1] for rows in self._signs]).amin(0)

    def read_bytes(self, weight_type: str) -> float:
        """Return one bit per weight, whatever the type.

        Parameters
        ----------
        weight_type : str
            Not used: there are no weights of its own.

        Returns
        -------
        float
            Bytes.
        """
        return sum(rows.numel() for rows in self._signs) / 8


class WeightCopyPredictor:
    """Gate and up computed from copies of few bits, one float16 scale per 32 weights.

    Parameters
    ----------
    layer : FFNLayer
        What to copy.
    bits : int or None
        1 to 4 per weight; None computes with the weights themselves and costs nothing: the oracle, which
        bounds every predictor.
    """

    def __init__(self, layer: FFNLayer, bits: int | None) -> None:
        self._bits = bits
        self._activation = layer.activation
        self._norms = layer.down.norm(dim=0)
        self._copies = [
            weight if bits is None else _quantised(weight, bits)
            for weight in (layer.gate, layer.up)
            if weight is not None
        ]
        self._group = math.gcd(layer.gate.shape[1], _GROUP)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of each neuron's output; below 0, how far a silent neuron is from firing."""
        gate, *rest = (functional.linear(x, weight) for weight in self._copies)
        up = rest[0] if rest else torch.ones_like(gate)
        f, g = self._activation.factors(gate, up)
        size = (f * g).abs()
        if self._activation.is_sparse:
            least = torch.minimum(gate, up) if self._activation.name == "drelu" else gate
            size = torch.where(size > 0, size, (least - self._activation.threshold).clamp(max=0))
        return size * self._norms

    def read_bytes(self, weight_type: str) -> float:
        """Return the bytes of the copies, whatever the type; 0 for the oracle.

        Parameters
        ----------
        weight_type : str
            Not used: the bits decide.

        Returns
        -------
        float
            Bytes.
        """
        if self._bits is None:
            return 0
        return sum(copy.numel() for copy in self._copies) * (self._bits + 16 / self._group) / 8


def _quantised(weight: Tensor, bits: int) -> Tensor:
    """Round to 2^bits levels at odd multiples of half a step, one step per group."""
    groups = weight.unflatten(1, (-1, math.gcd(weight.shape[1], _GROUP)))  # [F, D / group, group]
    step = (_STEP[bits] * groups.square().mean(-1, keepdim=True).sqrt()).clamp(min=1e-30)
    most = 2 ** (bits - 1)
    return ((groups / step).floor().clamp(-most, most - 1).add(0.5) * step).flatten(1)


RIVALS: Mapping[str, Callable[[FFNLayer], Predictor]] = {
    "sign_bits": SignBitPredictor,
    "low_bit_1": lambda layer: WeightCopyPredictor(layer, 1),
    "low_bit_2": lambda layer: WeightCopyPredictor(layer, 2),
    "oracle": lambda layer: WeightCopyPredictor(layer, None),
}
"""Kinds that need no fit, by the names that reports use."""
