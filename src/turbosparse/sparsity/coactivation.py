"""Which neurons are active together: a neuron's most frequent partner against the average pair."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CoactivationGap", "PairCounts", "coactivation_gap"]

_BLOCK_TOKENS = 64
_FEWEST_ACTIVE = 8  # tokens of a half; a neuron active on fewer says nothing about its partners


@dataclass(frozen=True, kw_only=True)
class CoactivationGap:
    """How much more often a neuron's best partner is active with it than the average neuron."""

    gap: float
    """``partner - average``, mean over the sampled neurons; -1 to 1, NaN where none could be judged."""
    standard_error: float
    """Of the gap, from the spread over the sampled neurons."""
    partner: float
    """Mean share of a neuron's tokens on which its most frequent partner is active too."""
    average: float
    """The same for the mean over all other neurons."""
    neurons: int
    """Neurons that the means are over."""


class PairCounts:
    """Counts of sampled neurons with all others, in two halves of the tokens.

    The partner is chosen on one half and judged on the other: the largest of thousands of noisy counts would
    else look more frequent than it is.

    Parameters
    ----------
    neurons : int
        F.
    sample : int
        Neurons whose partners are counted; all where there are fewer.
    seed : int
        Of the sample.
    """

    def __init__(self, neurons: int, sample: int = 64, seed: int = 0) -> None:
        self.chosen = np.sort(
            np.random.default_rng(seed).choice(neurons, size=min(sample, neurons), replace=False)
        )
        self._together = np.zeros((2, len(self.chosen), neurons), np.uint32)  # [half, S, F]
        self._tokens = 0

    def add(self, active: NDArray[np.bool_]) -> None:
        """Count tokens; blocks of 64 go to either half in turn.

        Parameters
        ----------
        active : bool, shape (T, F)
            Active neurons of the tokens that follow those added before.
        """
        begin = 0
        while begin < len(active):
            block, inside = divmod(self._tokens, _BLOCK_TOKENS)
            rows = active[begin : begin + _BLOCK_TOKENS - inside].astype(np.float32)
            self._together[block % 2] += (rows[:, self.chosen].T @ rows).astype(np.uint32)
            self._tokens += len(rows)
            begin += len(rows)

    def gap(self) -> CoactivationGap:
        """Judge what was counted.

        Returns
        -------
        CoactivationGap
            Over the sampled neurons that were active on at least 8 tokens of both halves.
        """
        own = self._together[:, np.arange(len(self.chosen)), self.chosen]  # [half, S]
        judged = (own >= _FEWEST_ACTIVE).all(axis=0)
        neurons = int(judged.sum())
        if neurons == 0 or self._together.shape[2] < 2:
            return CoactivationGap(
                gap=math.nan, standard_error=math.nan, partner=math.nan, average=math.nan, neurons=0
            )
        shares = self._together[:, judged] / own[:, judged, None]  # [half, S, F]
        row = np.arange(neurons)
        shares[:, row, self.chosen[judged]] = -1.0
        best = shares.argmax(axis=2)  # [half, S]
        partner = (shares[0, row, best[1]] + shares[1, row, best[0]]) / 2
        average = (shares.sum(axis=2) + 1.0).mean(axis=0) / (shares.shape[2] - 1)
        gaps = partner - average
        error = gaps.std(ddof=1) / math.sqrt(neurons) if neurons > 1 else math.nan
        return CoactivationGap(
            gap=float(gaps.mean()),
            standard_error=float(error),
            partner=float(partner.mean()),
            average=float(average.mean()),
            neurons=neurons,
        )


def coactivation_gap(active: NDArray[np.bool_], *, sample: int = 64, seed: int = 0) -> CoactivationGap:
    """Gap between a neuron's most frequent partner and its average one.

    Parameters
    ----------
    active : bool, shape (T, F)
        Active neurons.
    sample : int
        Neurons whose partners are counted, each against all F.
    seed : int
        Of the sample.

    Returns
    -------
    CoactivationGap
        The gap with its standard error over the sampled neurons.

    Notes
    -----
    After [1]_, where a large gap means that a neuron's weights can be stored next to its partner's. P(j | i)
    is the share of the tokens with i active on which j is active too; the gap is P(j* | i) less the mean
    over j. Here j* is chosen on one half of the tokens (blocks of 64 in turn) and P(j* | i) read off the
    other, since the largest of F noisy shares is too large. S F T operations for S sampled neurons.

    References
    ----------
    .. [1] Zhang et al., "ReLU^2 Wins", arXiv:2402.03804.

    Examples
    --------
    >>> import numpy as np
    >>> pairs = np.repeat(np.random.default_rng(0).random((256, 8)) < 0.25, 2, axis=1)
    >>> found = coactivation_gap(pairs)
    >>> found.partner, 0.6 < found.gap < 0.8
    (1.0, True)
    """
    counts = PairCounts(active.shape[1], sample, seed)
    counts.add(active)
    return counts.gap()
