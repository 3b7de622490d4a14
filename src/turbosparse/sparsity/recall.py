"""How many active neurons a predictor finds for how many it names."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["recall_curve"]


def recall_curve(
    scores: NDArray[np.float32], active: NDArray[np.bool_], sparsities: Sequence[float]
) -> NDArray[np.float64]:
    """Recall of a predictor at given predicted sparsities.

    Parameters
    ----------
    scores : float32, shape (T, F)
        What the predictor thinks of each neuron; larger is more likely active.
    active : bool, shape (T, F)
        What should be found.
    sparsities : sequence of float
        Shares of all neurons that are not named, 0 to 1.

    Returns
    -------
    float64, shape (len(sparsities),)
        Share of active neurons among those with the highest scores of all tokens together, as one threshold
        per layer has it. Where scores tie at the threshold, the tied ones count by their share. NaN where no
        neuron is active.

    Examples
    --------
    >>> import numpy as np
    >>> recall_curve(np.float32([[3, 2, 1, 0]]), np.array([[True, False, True, False]]), [0, 0.5, 0.75])
    array([1. , 0.5, 0.5])
    """
    flat = scores.ravel()
    order = np.argsort(-flat, kind="stable")
    hits = active.ravel()[order].astype(np.float64)
    ends = np.append(np.flatnonzero(np.diff(flat[order])) + 1, flat.size)  # behind each run of equal scores
    found = np.concatenate([[0.0], np.cumsum(hits)[ends - 1]])
    named = np.concatenate([[0.0], ends])
    wanted = (1 - np.asarray(sparsities, np.float64)) * flat.size
    with np.errstate(invalid="ignore"):
        return np.asarray(np.interp(wanted, named, found) / found[-1])
