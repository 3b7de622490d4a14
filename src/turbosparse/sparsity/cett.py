"""CETT: the error that leaving out small neurons causes, and the threshold that meets a target.

Arrays in, numbers out: NumPy alone, float32, nothing about models or files. Sums over neurons are matrix
products over blocks of tokens, so a search over a layer costs a few passes of its down projection.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import CalibrationError, ConfigError

__all__ = [
    "CettThreshold",
    "DroppedError",
    "activation_ratio",
    "cett",
    "dropped_error",
    "find_cett_threshold",
    "largest_meeting",
    "neuron_output_norms",
    "typical_norm",
    "zero_share",
]

_TOKENS_PER_BLOCK = 256  # keeps the masked copy of a block in cache
_MAX_EVALUATIONS = 60


@dataclass(frozen=True, kw_only=True)
class CettThreshold:
    """What :func:`find_cett_threshold` found."""

    eps: float
    """Bound on a neuron's output norm, units of the FFN output."""
    cett: float
    """Error at ``eps``, 0 to 1 and not above the target."""
    activation_ratio: float
    """Share of neurons kept at ``eps``, 0 to 1."""


def neuron_output_norms(activations: NDArray[np.float32], down_t: NDArray[np.float32]) -> NDArray[np.float32]:
    """Norm of what each neuron adds to the FFN output.

    Parameters
    ----------
    activations : float32, shape (T, F)
        Inputs of the down projection.
    down_t : float32, shape (F, D)
        Transposed down projection, one row per neuron.

    Returns
    -------
    float32, shape (T, F)
        ``|a_i| * ||W_down[:, i]||``, units of the FFN output.

    Notes
    -----
    The neuron output n_i = a_i W_down[:, i] of [1]_; T F + F D operations.

    References
    ----------
    .. [1] Zhang et al., "ReLU^2 Wins", arXiv:2402.03804.

    Examples
    --------
    >>> import numpy as np
    >>> neuron_output_norms(np.float32([[2, -1]]), np.float32([[3, 4], [0, 1]]))
    array([[10.,  1.]], dtype=float32)
    """
    down_norms: NDArray[np.float32] = np.linalg.norm(down_t, axis=1).astype(np.float32)  # [F]
    return np.abs(activations) * down_norms


def dropped_error(
    activations: NDArray[np.float32], down_t: NDArray[np.float32], kept: NDArray[np.bool_]
) -> float:
    """Relative error of the FFN output when only the kept neurons are computed.

    Parameters
    ----------
    activations : float32, shape (T, F)
        Inputs of the down projection.
    down_t : float32, shape (F, D)
        Transposed down projection.
    kept : bool, shape (T, F)
        Neurons that are computed, per token.

    Returns
    -------
    float
        Mean over tokens of ``||sum of dropped n_i|| / ||FFN(x)||``. A token whose FFN output is zero counts
        as 0 if what was dropped sums to zero too, else as infinity.

    Raises
    ------
    ConfigError
        When shapes do not fit, or there is no token.
    CalibrationError
        When the FFN output is not finite.

    Notes
    -----
    Two products of T x F x D in float32; ratios and their mean in float64.

    Examples
    --------
    >>> import numpy as np
    >>> dropped_error(np.float32([[3, 4]]), np.eye(2, dtype=np.float32), np.array([[False, True]]))
    0.6
    """
    return DroppedError(activations, down_t)(kept)


def cett(activations: NDArray[np.float32], down_t: NDArray[np.float32], eps: float) -> float:
    """Cumulative error of tail truncation when every neuron with an output norm below ``eps`` is dropped.

    Parameters
    ----------
    activations : float32, shape (T, F)
        Inputs of the down projection.
    down_t : float32, shape (F, D)
        Transposed down projection.
    eps : float
        Bound on the neuron's output norm, at least 0. A neuron with exactly this norm is kept.

    Returns
    -------
    float
        Mean over tokens of ``||sum_{||n_i|| < eps} n_i|| / ||FFN(x)||``; see :func:`dropped_error` for zero
        outputs.

    Notes
    -----
    The dropped set grows with eps. The error nearly always grows with it, but need not: dropped vectors can
    cancel. Defined in [1]_, with one eps per layer as in [2]_.

    References
    ----------
    .. [1] Zhang et al., "ReLU^2 Wins", arXiv:2402.03804.
    .. [2] Luo et al., "Sparsing Law", arXiv:2411.02335.

    Examples
    --------
    >>> import numpy as np
    >>> cett(np.float32([[3, 4]]), np.eye(2, dtype=np.float32), 4.0)
    0.6
    """
    error = DroppedError(activations, down_t)
    return error(neuron_output_norms(activations, down_t) >= np.float32(eps))


def activation_ratio(kept: NDArray[np.bool_]) -> float:
    """Share of neurons that are computed.

    Parameters
    ----------
    kept : bool, shape (T, F)
        Neurons that are computed, per token.

    Returns
    -------
    float
        1 minus the activation sparsity, 0 to 1.

    Raises
    ------
    ConfigError
        When there is no token or no neuron.

    Examples
    --------
    >>> import numpy as np
    >>> activation_ratio(np.array([[True, False], [False, False]]))
    0.25
    """
    if not kept.size:
        raise ConfigError(
            f"[activation ratio] expected neurons (T, F) with T and F above 0, got {kept.shape}"
        )
    return float(np.count_nonzero(kept)) / kept.size


def zero_share(activations: NDArray[np.float32]) -> float:
    """Share of activations that are exactly zero.

    Parameters
    ----------
    activations : float32, shape (T, F)
        Inputs of the down projection.

    Returns
    -------
    float
        The intrinsic sparsity, 0 to 1.

    Raises
    ------
    ConfigError
        When there is no token or no neuron.

    Examples
    --------
    >>> import numpy as np
    >>> zero_share(np.float32([[0, 2], [0, -1]]))
    0.5
    """
    return 1.0 - activation_ratio(activations != 0)


def find_cett_threshold(
    activations: NDArray[np.float32], down_t: NDArray[np.float32], target: float, *, tolerance: float = 0.01
) -> CettThreshold:
    """Find the threshold on neuron output norms that meets a CETT target.

    Parameters
    ----------
    activations : float32, shape (T, F)
        Inputs of the down projection, at least one not zero.
    down_t : float32, shape (F, D)
        Transposed down projection.
    target : float
        Largest error allowed, above 0 and below 1.
    tolerance : float
        How far below the target the result may stay, relative to it. Only a jump of the error at one value of
        eps (few tokens, equal norms) leaves a wider gap.

    Returns
    -------
    CettThreshold
        The threshold with its error, which is not above the target, and the share of neurons kept.

    Raises
    ------
    ConfigError
        When shapes do not fit or the target is out of range.
    CalibrationError
        When all activations are zero or not finite.

    Notes
    -----
    About 4 evaluations of T x F x D, where the reference implementation tries 65,536 candidates.

    Examples
    --------
    >>> import numpy as np
    >>> found = find_cett_threshold(np.float32([[1, 2, 4]]), np.eye(3, dtype=np.float32), 0.25)
    >>> 1 < found.eps <= 2, round(found.activation_ratio, 2)
    (True, 0.67)
    """
    error = DroppedError(activations, down_t)
    norms = neuron_output_norms(activations, down_t)
    eps, achieved = largest_meeting(
        lambda eps: error(norms >= np.float32(eps)), target, start=typical_norm(norms), tolerance=tolerance
    )
    return CettThreshold(eps=eps, cett=achieved, activation_ratio=activation_ratio(norms >= np.float32(eps)))


def largest_meeting(
    error: Callable[[float], float], target: float, *, start: float, tolerance: float = 0.01
) -> tuple[float, float]:
    """Search the largest ``eps`` whose error is not above the target.

    Parameters
    ----------
    error : callable
        Error at an eps above 0; grows with it, from 0 to at least the target.
    target : float
        Largest error allowed, above 0 and below 1.
    start : float
        First eps to try, above 0: the nearer, the fewer evaluations.
    tolerance : float
        Accepted distance below the target, relative to it.

    Returns
    -------
    tuple of float
        ``eps`` and its error. An eps of 0 (drop nothing) has error 0.

    Raises
    ------
    ConfigError
        When the target is out of range.
    CalibrationError
        When ``start`` is 0 or not finite, or the error never reaches the target.

    Notes
    -----
    Errors follow a power of eps over wide ranges, so each step takes the line through the last two points in
    log-log coordinates; two or three suffice from a near start. Steps grow while the target is not bracketed,
    and every third one inside a bracket is a bisection. Ends at the tolerance, or when the bracket is as
    narrow as float32.
    """
    if not 0 < target < 1:
        raise ConfigError(f"[cett target] expected a number above 0 and below 1, got {target}")
    if not (math.isfinite(start) and start > 0):
        raise CalibrationError(f"[cett] expected neuron outputs finite, not all zero, got a norm of {start}")
    aim = target * (1 - tolerance / 2)
    low, low_error, high = 0.0, 0.0, math.inf
    eps, slope, last, same_side = start, 1.0, (0.0, 0.0), 0
    for step in range(_MAX_EVALUATIONS):
        value = error(eps)
        same_side = same_side + 1 if (value <= target) == (last[1] <= target) else 1
        if value <= target:
            low, low_error = eps, value
        else:
            high = eps
        if low_error >= target * (1 - tolerance) or high <= low * (1 + 2**-22):
            return low, low_error
        slope = _slope(last, (eps, value), slope)
        last = (eps, value)
        guess = eps * (aim / value) ** (1 / slope) if 0 < value < math.inf else 0.0
        least = 1.002 ** (4 ** min(same_side, 6))  # 1.008, 1.03, 1.14, 1.67, 7.7: away from a bad guess
        if high == math.inf:
            eps = min(max(guess, eps * least), eps * 16)
        elif low == 0:
            eps = max(min(guess, eps / least), eps / 16)
        else:
            inside = low < guess < high and step % 3 != 2
            eps = guess if inside else math.sqrt(low * high)
    if high == math.inf:
        raise CalibrationError(
            f"[cett] expected an error above {target} at some threshold, got {low_error:.4f}"
        )
    return low, low_error


def _slope(a: tuple[float, float], b: tuple[float, float], otherwise: float) -> float:
    """Exponent of the power law through two points (eps, error); `otherwise` where they do not tell."""
    if not (0 < a[1] < math.inf and 0 < b[1] < math.inf and a[0] > 0 and abs(math.log(b[0] / a[0])) > 1e-4):
        return otherwise
    return min(max(math.log(b[1] / a[1]) / math.log(b[0] / a[0]), 0.25), 4.0)


def typical_norm(norms: NDArray[np.float32]) -> float:
    """Where to start a search: the median of the norms above zero, from every 16th value.

    Parameters
    ----------
    norms : float32, shape (T, F)
        Neuron output norms.

    Returns
    -------
    float
        Units of the FFN output; 0 when all norms are.
    """
    sample = norms.ravel()[:: max(1, min(16, norms.size // 4096))]
    positive = sample[sample > 0]
    return float(np.median(positive)) if positive.size else float(norms.max())


class DroppedError:
    """:func:`dropped_error` of many choices on the same tokens: the whole output's norms are computed once.

    Parameters
    ----------
    activations : float32, shape (T, F)
        Inputs of the down projection.
    down_t : float32, shape (F, D)
        Transposed down projection.
    """

    def __init__(self, activations: NDArray[np.float32], down_t: NDArray[np.float32]) -> None:
        if (
            activations.ndim != 2
            or down_t.ndim != 2
            or activations.shape[1] != down_t.shape[0]
            or not activations.size
        ):
            raise ConfigError(
                "[cett] expected activations (T, F) and down_t (F, D) with T and F above 0, "
                f"got {activations.shape} and {down_t.shape}"
            )
        self._activations = activations
        self._down_t = down_t
        self._totals = self._norms(np.ones((1, 1), dtype=np.bool_))
        if not np.isfinite(self._totals).all():
            raise CalibrationError("[cett] expected finite activations, got NaN or Inf in an FFN output")

    def __call__(self, kept: NDArray[np.bool_]) -> float:
        """Mean relative error when only the kept neurons, shape (T, F), are computed."""
        return float(self.ratios(kept).mean())

    def ratios(self, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Relative error of each token.

        Parameters
        ----------
        kept : bool, shape (T, F)
            Neurons that are computed.

        Returns
        -------
        float64, shape (T,)
            What :func:`dropped_error` averages.

        Raises
        ------
        ConfigError
            When the shape does not fit.
        """
        if kept.shape != self._activations.shape:
            raise ConfigError(f"[cett] expected kept of shape {self._activations.shape}, got {kept.shape}")
        lost = self._norms(~kept)
        zero = self._totals == 0
        ratios = np.divide(lost, self._totals, out=np.zeros_like(lost), where=~zero)
        ratios[zero & (lost > 0)] = np.inf
        return ratios

    def _norms(self, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Norm of the sum of the chosen neurons' outputs, [T]."""
        chosen = np.broadcast_to(chosen, self._activations.shape)
        norms = np.empty(len(self._activations))
        for begin in range(0, len(norms), _TOKENS_PER_BLOCK):
            block = slice(begin, begin + _TOKENS_PER_BLOCK)
            norms[block] = np.linalg.norm((self._activations[block] * chosen[block]) @ self._down_t, axis=1)
        return norms
