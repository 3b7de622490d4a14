"""How gate, up and predictor of a synthetic FFN are related, so that sparsity and recall come out as stated.

Every neuron has, for a token, three numbers that depend on the state: a score z, which the predictor sees,
and the pre-activations of gate and up, which share that score and differ from it by noise,

    gate = r z + sqrt(1 - r^2) e1 - gate_shift,    up = r z + sqrt(1 - r^2) e2 - up_shift,

with z, e1, e2 standard normal and independent. A neuron is active where gate > 0 and up > 0, and a candidate
where z >= threshold.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

__all__ = ["UP_GIVEN_GATE", "GateStatistics", "solve_gate_statistics"]

UP_GIVEN_GATE = 0.65
"""P(up > 0 | gate > 0), as measured in SmolLM2-135M trained to dReLU (0.236 / 0.362, means over layers)."""

_NORMAL = NormalDist()
_Z = np.linspace(-8.0, 8.0, 1601)
_STEP = float(_Z[1] - _Z[0])
_WEIGHT = np.exp(-0.5 * _Z**2) / math.sqrt(2 * math.pi) * _STEP
_BISECTIONS = 40


@dataclass(frozen=True, kw_only=True)
class GateStatistics:
    """The solution."""

    correlation: float
    """r, 0 to 1."""
    gate_shift: float
    up_shift: float
    threshold: float
    """Of the score."""
    mean_square: float
    """E[(relu(gate) relu(up))^2]."""


def solve_gate_statistics(*, sparsity: float, recall: float, precision: float) -> GateStatistics:
    """Find correlation, shifts and threshold for a sparsity and a predictor of stated quality.

    Parameters
    ----------
    sparsity : float
        Share of neurons that are not active, at least 0.5.
    recall : float
        Share of the active neurons that are candidates.
    precision : float
        Share of the candidates that are active, above 1 - sparsity.

    Returns
    -------
    GateStatistics
        So that the shares hold in expectation, with P(up > 0 | gate > 0) = `UP_GIVEN_GATE`.

    Notes
    -----
    Two nested bisections: recall grows with the correlation, and the share of active neurons falls with the
    shift of up. Integrals over z are sums on a grid.
    """
    active = 1 - sparsity
    gate_shift = _NORMAL.inv_cdf(1 - active / UP_GIVEN_GATE)
    threshold = _NORMAL.inv_cdf(1 - active * recall / precision)
    candidates = _WEIGHT * np.clip((_Z - threshold) / _STEP + 0.5, 0.0, 1.0)  # whole cells and a part of one
    low, high = 0.0, 1 - 1e-6
    for _ in range(_BISECTIONS):
        correlation = (low + high) / 2
        up_shift = _up_shift(correlation, gate_shift, active)
        both = _positive(correlation, gate_shift) * _positive(correlation, up_shift)
        if float(both @ candidates) < recall * active:
            low = correlation
        else:
            high = correlation
    squares = _mean_square(correlation, gate_shift) * _mean_square(correlation, up_shift)
    return GateStatistics(
        correlation=correlation,
        gate_shift=gate_shift,
        up_shift=up_shift,
        threshold=threshold,
        mean_square=float(squares @ _WEIGHT),
    )


def _up_shift(correlation: float, gate_shift: float, active: float) -> float:
    gate = _positive(correlation, gate_shift) * _WEIGHT
    low, high = -8.0, 8.0
    for _ in range(_BISECTIONS):
        shift = (low + high) / 2
        if float(_positive(correlation, shift) @ gate) > active:
            low = shift
        else:
            high = shift
    return shift


def _positive(correlation: float, shift: float) -> NDArray[np.float64]:
    """P(r z + noise > shift) for each z of the grid."""
    x = (correlation * _Z - shift) / math.sqrt(1 - correlation**2)
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])


def _mean_square(correlation: float, shift: float) -> NDArray[np.float64]:
    """E[relu(r z + noise - shift)^2] for each z of the grid."""
    mean, sd = correlation * _Z - shift, math.sqrt(1 - correlation**2)
    density = np.exp(-0.5 * (mean / sd) ** 2) / math.sqrt(2 * math.pi)
    return (mean**2 + sd**2) * _positive(correlation, shift) + mean * sd * density
