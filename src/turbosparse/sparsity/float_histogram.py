"""Histograms of float32 values whose bins are known before the first value is seen."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["FloatHistogram"]

_MANTISSA_BITS = 4  # 16 bins per octave: a bin is at most 6 % wide
_SHIFT = 23 - _MANTISSA_BITS
_POSITIVE = 1 << (31 - _SHIFT)  # bins of one sign


class FloatHistogram:
    """Counts of values by sign, exponent and leading bits of the mantissa.

    Bins do not depend on the data, so histograms of parts add up exactly, and those of different models have
    the same bins. The relative width of a bin is 1/16 to 1/31.

    Examples
    --------
    >>> import numpy as np
    >>> histogram = FloatHistogram()
    >>> histogram.add(np.float32([0, 1, 1.01, -3]))
    >>> histogram.total, histogram.quantile(0.0) < -2.9
    (4, True)
    """

    def __init__(self) -> None:
        self._counts = np.zeros(2 * _POSITIVE, np.int64)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count values.

        Parameters
        ----------
        values : float32, any shape
            NaN and infinities are counted in bins beyond all others.
        """
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32) >> np.uint32(_SHIFT)
        self._counts += np.bincount(bits.ravel(), minlength=2 * _POSITIVE)

    @property
    def total(self) -> int:
        """Count the values.

        Returns
        -------
        int
            All that were added.
        """
        return int(self._counts.sum())

    def bins(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """List the bins that are not empty.

        Returns
        -------
        low, high : float64, shape (N,)
            Edges in ascending order. Zeros and values too small to matter have a bin of width 0 at 0.
        counts : int64, shape (N,)
            Values in each.
        """
        index = np.flatnonzero(self._counts)
        magnitude = (index % _POSITIVE).astype(np.uint32)
        near = (magnitude << np.uint32(_SHIFT)).view(np.float32).astype(np.float64)
        far = ((magnitude + 1).astype(np.uint32) << np.uint32(_SHIFT)).view(np.float32).astype(np.float64)
        far[magnitude == 0] = 0.0
        negative = index >= _POSITIVE
        low, high = np.where(negative, -far, near), np.where(negative, -near, far)
        order = np.argsort(low + high, kind="stable")
        return low[order], high[order], self._counts[index][order]

    def quantile(self, share: float) -> float:
        """Find the value below which a share of the values lies.

        Parameters
        ----------
        share : float
            0 to 1.

        Returns
        -------
        float
            Interpolated inside its bin, so off by at most 6 %; NaN where nothing was added.
        """
        low, high, counts = self.bins()
        if not len(counts):
            return float("nan")
        below = np.cumsum(counts)
        at = min(int(np.searchsorted(below, share * below[-1])), len(counts) - 1)
        inside = (share * below[-1] - (below[at] - counts[at])) / counts[at]
        return float(low[at] + (high[at] - low[at]) * inside)

    def share_of_largest(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Say how much of the sum the largest values have.

        Parameters
        ----------
        shares : float64, shape (N,)
            Shares of the values, the largest ones; 0 to 1. All values must be at least 0.

        Returns
        -------
        float64, shape (N,)
            Their sum over that of all values, with each value taken as the middle of its bin.
        """
        low, high, counts = (array[::-1] for array in self.bins())
        taken = np.concatenate([[0.0], np.cumsum(counts)])
        summed = np.concatenate([[0.0], np.cumsum(counts * (low + high) / 2)])
        return np.asarray(np.interp(shares, taken / max(taken[-1], 1.0), summed / max(summed[-1], 1e-300)))
