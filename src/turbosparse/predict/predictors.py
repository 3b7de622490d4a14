"""Kinds of predictors: each scores the neurons for a hidden state; those above a threshold are candidates."""

from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["LowRankPredictor", "NeuronNorms", "OraclePredictor", "Predictor", "SignBitPredictor"]


class Predictor(Protocol):
    """What scores neurons."""

    kind: str

    def scores(self, x: Tensor) -> Tensor:
        """Score the neurons.

        Parameters
        ----------
        x : Tensor of shape [N, D]
            Post-norm hidden states.

        Returns
        -------
        Tensor of shape [N, F]
            Larger is more likely active.
        """

    def weights(self) -> int:
        """Return how many weights of the model's own width it reads per token (a bit counts 1/16)."""


class LowRankPredictor(nn.Module):
    """``b(relu(a(x)))`` without biases: the form that the model file stores.

    Parameters
    ----------
    hidden_size : int
        D.
    intermediate_size : int
        F.
    rank : int
        Width in between.
    """

    kind = "low_rank"

    def __init__(self, hidden_size: int, intermediate_size: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Linear(hidden_size, rank, bias=False)  # [R, D]
        self.b = nn.Linear(rank, intermediate_size, bias=False)  # [F, R]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits.

        Parameters
        ----------
        x : Tensor of shape [N, D]
            Post-norm hidden states.

        Returns
        -------
        Tensor of shape [N, F]
            Positive where a neuron is more likely active than not.
        """
        return self.b(torch.relu(self.a(x)))

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """Return logits without a graph.

        Parameters
        ----------
        x : Tensor of shape [N, D]
            Post-norm hidden states.

        Returns
        -------
        Tensor of shape [N, F]
            As `forward`.
        """
        return self(x)

    def weights(self) -> int:
        """Return the number of weights."""
        return self.a.weight.numel() + self.b.weight.numel()


class SignBitPredictor:
    """Agreement of the signs of x with those of a neuron's gate (and up) row (SparseInfer, arXiv 2411.12692).

    Parameters
    ----------
    rows : list of Tensor of shape [F, D]
        Weights of gate, or of gate and up where both have to be positive.
    """

    kind = "sign_bits"

    def __init__(self, rows: list[Tensor]) -> None:
        self._signs = [torch.where(weight > 0, 1.0, -1.0) for weight in rows]

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """Return the smaller of the agreements.

        Parameters
        ----------
        x : Tensor of shape [N, D]
            Post-norm hidden states.

        Returns
        -------
        Tensor of shape [N, F]
            From -1 to 1.
        """
        signs = torch.where(x > 0, 1.0, -1.0)
        return torch.stack([signs @ rows.T / rows.shape[1] for rows in self._signs]).amin(0)

    def weights(self) -> int:
        """Return the bits as sixteenths of weights."""
        return sum(rows.numel() for rows in self._signs) // 16


class NeuronNorms(Protocol):
    """Norm of each neuron's output for hidden states."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return ||n_i|| for x of shape [N, D], as [N, F]."""


class OraclePredictor:
    """Knows the norms of the neurons' outputs: the bound for every predictor.

    Parameters
    ----------
    norms : NeuronNorms
        Computes them from the layer's weights.
    """

    kind = "oracle"

    def __init__(self, norms: NeuronNorms) -> None:
        self._norms = norms

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """Return the norm of each neuron's output.

        Parameters
        ----------
        x : Tensor of shape [N, D]
            Post-norm hidden states.

        Returns
        -------
        Tensor of shape [N, F]
            At least 0.
        """
        return self._norms(x)

    def weights(self) -> int:
        """Return 0: nobody can build it."""
        return 0
