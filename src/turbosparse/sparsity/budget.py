"""CETT-PPL-p%: the largest CETT target that keeps to a budget on how far the perplexity may rise."""

import math
from collections.abc import Callable

from turbosparse.errors import CalibrationError, ConfigError

__all__ = ["largest_cett_within"]

_FIRST, _SMALLEST, _LARGEST = 0.1, 0.002, 0.8  # CETT targets
_TOLERANCE = 0.1  # a result whose rise is this far below the budget, relative to it, is good enough
_NARROW = 1.03  # and so is one whose bracket of targets is this narrow
_MAX_TRIALS = 12


def largest_cett_within(rise: Callable[[float], float], budget: float) -> float:
    """Search the largest CETT target whose rise in perplexity keeps to a budget.

    Parameters
    ----------
    rise : callable
        Relative rise of the perplexity at a CETT target; costly. 0.01 is 1 %. A target at which it raises
        CalibrationError, since a layer cannot reach it, is too large.
    budget : float
        Largest rise allowed, above 0.

    Returns
    -------
    float
        The CETT target, 0.002 to 0.8.

    Raises
    ------
    ConfigError
        When the budget is not above 0.
    CalibrationError
        When the smallest target exceeds the budget or cannot be reached.

    Notes
    -----
    Calls ``rise`` about five times: doubles or halves the target up to a bracket, then takes false position
    in log-log coordinates, since the rise is about a power of the target. [1]_ bisects.

    References
    ----------
    .. [1] Luo et al., "Sparsing Law", arXiv:2411.02335.

    Examples
    --------
    >>> found = largest_cett_within(lambda target: target**2, 0.01)
    >>> 0.0949 < found <= 0.1
    True
    """
    if not budget > 0:
        raise ConfigError(f"[perplexity budget] expected above 0, got {budget}")
    low, low_rise, high, high_rise = 0.0, 0.0, math.inf, math.inf
    target = _FIRST
    for _ in range(_MAX_TRIALS):
        try:
            value = rise(target)
        except CalibrationError:
            if target == _SMALLEST:
                raise
            value = math.inf
        if value <= budget:
            low, low_rise = target, value
        elif target == _SMALLEST:
            raise CalibrationError(
                f"[perplexity budget] expected a rise of at most {budget:.2%}, got {value:.2%} at CETT "
                f"{target}; a wider weight type of the down projection may help"
            )
        else:
            high, high_rise = target, value
        if low_rise >= budget * (1 - _TOLERANCE) or high < low * _NARROW or low == _LARGEST:
            break
        target = _next_target(low, low_rise, high, high_rise, budget)
    return low


def _next_target(low: float, low_rise: float, high: float, high_rise: float, budget: float) -> float:
    if math.isinf(high):
        return min(low * 2, _LARGEST)
    if low == 0:
        return max(high / 2, _SMALLEST)
    share = 0.5
    if low_rise > 0 and math.isfinite(high_rise):
        share = math.log(budget * (1 - _TOLERANCE / 2) / low_rise) / math.log(high_rise / low_rise)
    return float(low * (high / low) ** min(max(share, 0.15), 0.85))
