"""How many of a token's active neurons its neighbours need too.

What the tokens before needed is in a cache already, so only the rest has to be read; and tokens that are
computed together need the union of their neurons.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import ConfigError, TextError

__all__ = ["UNION_SIZES", "WINDOWS", "NeuronReuse", "chance_reuse", "reuse"]

WINDOWS = tuple(range(2, 17))
"""Tokens in a window, the last one included: 2 compares a token with the one before."""
UNION_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Consecutive tokens whose neurons are united; each twice the one before."""
_HISTORY = UNION_SIZES[-1] - 1
_WORD = np.uint16
_BITS_SET = np.unpackbits(np.arange(1 << 16, dtype=_WORD).view(np.uint8).reshape(-1, 2), axis=1).sum(
    axis=1, dtype=np.uint8
)


class NeuronReuse:
    """Re-use and unions of consecutive tokens, counted while tokens stream by.

    Parameters
    ----------
    neurons : int
        F.
    groups : int
        Groups of windows to count apart, for standard errors.

    Attributes
    ----------
    active, reused : float64, shape (G, len(WINDOWS))
        Active neurons of the tokens that have a full window before them, and how many of those were active in
        the window before.
    united, positions : float64, shape (G, len(UNION_SIZES))
        Neurons in the unions, and how many unions there were.
    """

    def __init__(self, neurons: int, groups: int = 1) -> None:
        self._words = -(-neurons // 16)
        self._history = np.zeros((0, self._words), _WORD)
        self.active = np.zeros((groups, len(WINDOWS)))
        self.reused = np.zeros((groups, len(WINDOWS)))
        self.united = np.zeros((groups, len(UNION_SIZES)))
        self.positions = np.zeros((groups, len(UNION_SIZES)))

    def start(self) -> None:
        """Begin a new text: the next token has none before it."""
        self._history = self._history[:0]

    def add(self, active: NDArray[np.bool_], group: int = 0) -> None:
        """Count tokens that follow those added before.

        Parameters
        ----------
        active : bool, shape (T, F)
            Active neurons.
        group : int
            Where to count them.
        """
        packed = np.zeros((len(active), self._words * 2), np.uint8)
        bits = np.packbits(active, axis=1)
        packed[:, : bits.shape[1]] = bits
        tokens = packed.view(_WORD)  # [T, words]
        rows = np.concatenate([self._history, tokens])
        self._count_reuse(rows, tokens, group)
        self._count_unions(rows, len(tokens), group)
        self._history = rows[-_HISTORY:]

    def _count_reuse(self, rows: NDArray[_WORD], tokens: NDArray[_WORD], group: int) -> None:
        before = len(rows) - len(tokens)
        counts = _BITS_SET[tokens].sum(axis=1, dtype=np.int64)
        seen = np.zeros_like(tokens)
        for at, window in enumerate(WINDOWS):
            lag = window - 1
            first = max(0, lag - before)  # the tokens from here on have a full window
            if first >= len(tokens):
                break
            seen[first:] |= rows[before + first - lag : len(rows) - lag]
            self.active[group, at] += counts[first:].sum()
            self.reused[group, at] += _BITS_SET[seen[first:] & tokens[first:]].sum(dtype=np.int64)

    def _count_unions(self, rows: NDArray[_WORD], tokens: int, group: int) -> None:
        before = len(rows) - tokens
        union = rows  # row r is the union of rows r to r + size - 1
        for at, size in enumerate(UNION_SIZES):
            if size > 1:
                half = size // 2
                if len(union) <= half:
                    break
                union = union[half:] | union[:-half]
            ending_here = union[max(0, before - size + 1) :]
            self.united[group, at] += _BITS_SET[ending_here].sum(dtype=np.int64)
            self.positions[group, at] += len(ending_here)


def reuse(active: NDArray[np.bool_], windows: Sequence[int] = WINDOWS) -> NDArray[np.float64]:
    """Share of a token's active neurons that were active shortly before.

    Parameters
    ----------
    active : bool, shape (T, F)
        Active neurons of consecutive tokens.
    windows : sequence of int
        Tokens in a window, 2 to 16, the token itself included; at least one window.

    Returns
    -------
    float64, shape (len(windows),)
        For each window w, how many of a token's active neurons were active in at least one of the w - 1
        tokens before, over all its active neurons; tokens without w - 1 tokens before them are left out. NaN
        where no neuron is active.

    Raises
    ------
    ConfigError
        When there is no window, or one out of range.
    TextError
        When there are fewer tokens than a window has.

    Notes
    -----
    The axis "hardware affinity" of [1]_: neurons that are used again need not be read again.

    References
    ----------
    .. [1] Zhang et al., "ReLU^2 Wins", arXiv:2402.03804.

    Examples
    --------
    >>> import numpy as np
    >>> reuse(np.array([[True, True], [True, False], [False, True]]), [2, 3])
    array([0.5, 1. ])
    """
    if not len(windows) or not set(windows) <= set(WINDOWS):
        raise ConfigError(
            f"[reuse] expected at least one window, of {WINDOWS[0]} to {WINDOWS[-1]} tokens, "
            f"got {', '.join(map(str, windows)) or 'none'}"
        )
    if len(active) < max(windows):
        raise TextError(f"[reuse] expected at least {max(windows)} tokens, a window, got {len(active)}")
    counts = NeuronReuse(active.shape[1])
    counts.add(active)
    chosen = [WINDOWS.index(window) for window in windows]
    with np.errstate(invalid="ignore"):
        return np.asarray((counts.reused / counts.active)[0, chosen])


def chance_reuse(frequencies: NDArray[np.float64], windows: Sequence[int] = WINDOWS) -> NDArray[np.float64]:
    """Give the re-use that neurons of these frequencies would have if tokens were independent.

    Parameters
    ----------
    frequencies : float64, shape (F,)
        Share of tokens on which each neuron is active.
    windows : sequence of int
        Tokens in a window.

    Returns
    -------
    float64, shape (len(windows),)
        ``sum_i p_i (1 - (1 - p_i)^(w-1)) / sum_i p_i``; NaN where no neuron is active.

    Examples
    --------
    >>> import numpy as np
    >>> chance_reuse(np.array([0.5, 0.5]), [2, 3])
    array([0.5 , 0.75])
    """
    p = frequencies[:, None]
    again = 1 - (1 - p) ** (np.asarray(windows) - 1)
    with np.errstate(invalid="ignore"):
        return np.asarray((p * again).sum(axis=0) / p.sum())
