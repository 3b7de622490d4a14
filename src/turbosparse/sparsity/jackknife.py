"""Standard errors of anything that is computed from totals: the delete-a-group jackknife.

Tokens that stand together are alike, so their spread says too little about what other text would give.
Totals are therefore kept per group of neighbouring windows, and a statistic is computed once more without
each group.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "group_of", "jackknife"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A statistic, and the same statistic without each group."""

    value: NDArray[np.float64]
    """Any shape."""
    replicates: NDArray[np.float64]
    """The shape of ``value`` behind an axis of groups."""

    @property
    def standard_error(self) -> NDArray[np.float64]:
        """Compute the jackknife's standard error.

        Returns
        -------
        float64, the shape of ``value``
            NaN where there are fewer than two groups.
        """
        groups = len(self.replicates)
        if groups < 2:
            return np.full(self.value.shape, math.nan)
        spread = self.replicates - self.replicates.mean(axis=0)
        return np.asarray(np.sqrt((groups - 1) / groups * np.square(spread).sum(axis=0)))


def jackknife(
    totals: Sequence[NDArray[np.generic]], statistic: Callable[..., NDArray[np.float64] | float]
) -> Estimate:
    """Compute a statistic of totals with its standard error.

    Parameters
    ----------
    totals : sequence of arrays, shape (G, ...)
        Sums over the tokens of each of G groups.
    statistic : callable
        Takes the totals summed over groups, one argument per array.

    Returns
    -------
    Estimate
        The statistic of all groups, and without each of them.

    Notes
    -----
    The standard error is ``sqrt((G - 1) / G * sum_g (s_g - mean s)^2)`` with s_g the statistic without group
    g [1]_; for a mean over groups of equal size it is the usual one.

    References
    ----------
    .. [1] Efron and Stein, "The jackknife estimate of variance", Annals of Statistics 9, 1981.

    Examples
    --------
    >>> import numpy as np
    >>> found = jackknife([np.array([1.0, 2.0, 3.0]), np.ones(3)], lambda total, count: total / count)
    >>> float(found.value), round(float(found.standard_error), 4)
    (2.0, 0.5774)
    """
    whole = [array.sum(axis=0, dtype=np.float64) for array in totals]
    replicates = [
        statistic(*(total - array[group] for total, array in zip(whole, totals, strict=True)))
        for group in range(len(totals[0]))
    ]
    return Estimate(value=np.asarray(statistic(*whole)), replicates=np.asarray(replicates))


def group_of(window: int, windows: int, groups: int) -> int:
    """Say to which group a window belongs.

    Parameters
    ----------
    window, windows : int
        Index of the window, and how many there are.
    groups : int
        Number of groups, at most ``windows``.

    Returns
    -------
    int
        Groups are runs of neighbouring windows, as even as can be.
    """
    return window * groups // windows
