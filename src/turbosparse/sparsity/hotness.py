"""How often each neuron is active, and what follows from that alone."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["batch_union", "carrying_share", "hotness"]


def hotness(active: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share of tokens on which each neuron is active.

    Parameters
    ----------
    active : bool, shape (T, F)
        Active neurons.

    Returns
    -------
    float64, shape (F,)
        0 to 1.

    Examples
    --------
    >>> import numpy as np
    >>> hotness(np.array([[True, False], [True, True]]))
    array([1. , 0.5])
    """
    return np.asarray(active.mean(axis=0, dtype=np.float64))


def carrying_share(counts: NDArray[np.generic], share: float = 0.8) -> float:
    """Share of neurons that carry a share of all activations.

    Parameters
    ----------
    counts : numbers, shape (F,)
        How often each neuron was active; frequencies do as well.
    share : float
        What the hottest neurons have to carry, above 0 and at most 1.

    Returns
    -------
    float
        Fewest neurons, hottest first, that were active in ``share`` of all cases, over F. Near ``share``
        where all are equally hot; small where few do most of the work. NaN where no neuron was ever active.

    Notes
    -----
    PowerInfer's measure of locality [1]_.

    References
    ----------
    .. [1] Song et al., "PowerInfer", arXiv:2312.12456.

    Examples
    --------
    >>> import numpy as np
    >>> carrying_share(np.array([8, 1, 1, 0])), carrying_share(np.ones(10))
    (0.25, 0.8)
    """
    hottest_first = np.sort(np.asarray(counts, np.float64))[::-1]
    carried = np.cumsum(hottest_first)
    if not carried[-1] > 0:
        return float("nan")
    needed = np.searchsorted(carried, share * carried[-1] * (1 - 1e-12)) + 1
    return float(needed / len(carried))


def batch_union(counts: NDArray[np.generic], tokens: float, sizes: Sequence[int]) -> NDArray[np.float64]:
    """Share of neurons that at least one of B unrelated tokens needs.

    Parameters
    ----------
    counts : numbers, shape (F,)
        On how many tokens each neuron was active.
    tokens : float
        How many tokens there were.
    sizes : sequence of int
        Batch sizes B.

    Returns
    -------
    float64, shape (len(sizes),)
        Mean over all batches of B different tokens; NaN where B is above ``tokens``.

    Notes
    -----
    Nothing is sampled: of all batches, a share C(T - c_i, B) / C(T, B) lacks neuron i, which is the product
    of (T - c_i - j) / (T - j) over j < B.

    Examples
    --------
    >>> import numpy as np
    >>> batch_union(np.array([1, 0]), 2, [1, 2, 4])
    array([0.25, 0.5 ,  nan])
    """
    active_on = np.asarray(counts, np.float64)
    missing = np.ones_like(active_on)
    unions = {}
    for drawn in range(int(min(max(sizes), tokens))):
        missing = missing * np.maximum(tokens - active_on - drawn, 0) / (tokens - drawn)
        unions[drawn + 1] = 1 - float(missing.mean())
    return np.array([unions.get(size, np.nan) for size in sizes])
