"""Ways to choose which neurons are computed: what a study compares at equal sparsity."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["GateThresholds", "NonZero", "NormThresholds", "PositiveGate", "Selection", "TopK", "top_k_kept"]


class Selection(Protocol):
    """Chooses neurons of one FFN, or of one expert."""

    @property
    def label(self) -> str:
        """Name in reports."""

    def kept(
        self, unit: int, gate: NDArray[np.float32], activations: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Choose for some tokens.

        Parameters
        ----------
        unit : int
            Index of the FFN or expert.
        gate : float32, shape (T, F)
            f(gate).
        activations : float32, shape (T, F)
            Inputs of the down projection.

        Returns
        -------
        bool, shape (T, F)
            Neurons that are computed.
        """


@dataclass(frozen=True, kw_only=True)
class NormThresholds:
    """Neurons whose output has at least a norm: one eps per unit, as CETT has it."""

    label: str
    eps: Mapping[int, float]
    """By unit, in units of the FFN's output. Units without one are computed as a whole."""
    down_norms: Mapping[int, NDArray[np.float32]]
    """||W_down[:, i]|| by unit, each [F]."""

    def kept(
        self, unit: int, gate: NDArray[np.float32], activations: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Keep ||n_i|| >= eps."""
        if unit not in self.eps:
            return np.ones(activations.shape, np.bool_)
        return np.asarray(np.abs(activations) * self.down_norms[unit] >= np.float32(self.eps[unit]))


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The largest activations of each token."""

    share: float
    """Of the neurons, above 0 and at most 1."""

    @property
    def label(self) -> str:
        """Name with the share in percent."""
        return f"top {100 * self.share:g} %"

    def kept(
        self, unit: int, gate: NDArray[np.float32], activations: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Keep the largest |a_i|."""
        return top_k_kept(activations, self.share)


@dataclass(frozen=True, kw_only=True)
class GateThresholds:
    """Neurons whose gate has at least a magnitude, one bound per unit: known before up is computed [1]_.

    References
    ----------
    .. [1] Lee et al., "CATS", arXiv:2404.08763.
    """

    label: str
    thresholds: Mapping[int, float]
    """By unit, on abs(f(gate)). Units without one are computed as a whole."""

    def kept(
        self, unit: int, gate: NDArray[np.float32], activations: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Keep those at or above the bound that are not zero.

        Parameters
        ----------
        unit : int
            Index of the FFN or expert.
        gate, activations : float32, shape (T, F)
            As in `Selection`.

        Returns
        -------
        bool, shape (T, F)
            Neurons that are computed.
        """
        bound = np.float32(self.thresholds.get(unit, 0.0))
        return np.asarray((np.abs(gate) >= bound) & (gate != 0))


@dataclass(frozen=True, kw_only=True)
class PositiveGate:
    """Neurons whose gate is above zero. Not quality-preserving for SiLU and GELU."""

    label: str = "gate > 0"

    def kept(
        self, unit: int, gate: NDArray[np.float32], activations: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Keep f(gate) > 0, which has the sign of the gate for every activation function in use."""
        return np.asarray(gate > 0)


@dataclass(frozen=True, kw_only=True)
class NonZero:
    """Neurons that are not exactly zero: loses nothing."""

    label: str = "nonzero"

    def kept(
        self, unit: int, gate: NDArray[np.float32], activations: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Keep a_i != 0."""
        return np.asarray(activations != 0)


def top_k_kept(activations: NDArray[np.float32], share: float) -> NDArray[np.bool_]:
    """Choose the neurons with the largest activations of each token.

    Parameters
    ----------
    activations : float32, shape (T, F)
        Inputs of the down projection.
    share : float
        Of the neurons to keep, above 0 and at most 1; at least one neuron is kept.

    Returns
    -------
    bool, shape (T, F)
        True where ``|a_i|`` is at least the k-th largest; equal values are kept or dropped together.

    Notes
    -----
    The criterion of Turbo Sparse's sparsity sweep [1]_; it ignores the norms of the down projection.

    References
    ----------
    .. [1] Song et al., "Turbo Sparse", arXiv:2406.05955.

    Examples
    --------
    >>> import numpy as np
    >>> top_k_kept(np.float32([[1, -3, 2, 0]]), 0.5)
    array([[False,  True,  True, False]])
    """
    magnitudes = np.abs(activations)
    neurons = magnitudes.shape[1]
    dropped = neurons - max(1, round(share * neurons))
    least = np.partition(magnitudes, dropped, axis=1)[:, dropped, None]
    return np.asarray(magnitudes >= least)
