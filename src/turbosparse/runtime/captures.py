"""FFN activations of a text, layer by layer, within a memory budget."""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from turbosparse import _native
from turbosparse.runtime.ffns import FFN, FFNTokens, ffns_of, tokens_of_ffns

__all__ = ["Captures", "default_memory_bytes"]


def default_memory_bytes() -> int:
    """Say how much memory captures may take unless told otherwise.

    Returns
    -------
    int
        A quarter of the machine's memory, in bytes.
    """
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


class Captures:
    """f(gate) and g(up) of every FFN on the same tokens.

    Layers are captured in groups that fit the budget; each group costs one dense pass over the tokens. What
    fits as a whole is kept, so that going through the layers again costs nothing.

    Parameters
    ----------
    model : _native.Model
        The model, run densely.
    windows : sequence of int32 arrays
        Token ids; every window starts with an empty cache.
    memory_bytes : int
        Budget for the arrays; at least one layer is held, whatever it takes.

    Attributes
    ----------
    tokens : int
        Tokens of all windows.
    """

    def __init__(
        self, model: _native.Model, windows: Sequence[NDArray[np.int32]], *, memory_bytes: int
    ) -> None:
        info = model.info
        self._windows = list(windows)
        self.tokens = sum(map(len, self._windows))
        longest = max(map(len, self._windows))
        self._session = model.session(longest)
        self._ffns = [list(group) for _, group in groupby(ffns_of(info), key=lambda ffn: ffn.layer)]
        # All experts of a window are there before those that tokens did not reach are left out.
        passing = longest * info.layer_neurons if info.num_experts else 0
        per_layer = 2 * 4 * (self.tokens * info.token_neurons + passing)
        self._group = max(1, min(len(self._ffns), memory_bytes // per_layer))
        self._kept: list[list[FFNTokens]] = []

    @property
    def passes(self) -> int:
        """Dense passes over the tokens that one iteration costs, when nothing is kept yet."""
        return -(-len(self._ffns) // self._group)

    def layers(self, progress: Callable[[float], None] = lambda amount: None) -> Iterator[list[FFNTokens]]:
        """Go through the layers in order.

        Parameters
        ----------
        progress : callable
            Called with shares of one iteration's captures, 1 in all.

        Yields
        ------
        list of FFNTokens
            The FFNs of the layer. Arrays are not to be written to.
        """
        for first in range(0, len(self._ffns), self._group):
            layers = list(range(first, min(first + self._group, len(self._ffns))))
            captured = self._kept or self._capture(layers, progress)
            if self._group == len(self._ffns):
                self._kept = captured
                yield from captured
                continue
            while captured:
                yield captured.pop(0)

    def _capture(self, layers: list[int], progress: Callable[[float], None]) -> list[list[FFNTokens]]:
        pieces: list[list[list[FFNTokens]]] = [[[] for _ in self._ffns[layer]] for layer in layers]
        begin = 0
        for window in self._windows:
            self._session.truncate(0)
            arrays = self._session.capture(window, layers)
            for layer, of_layer in zip(layers, pieces, strict=True):
                gate, up, _, _, chosen = arrays.pop(0)
                found = tokens_of_ffns(self._ffns[layer], gate, up, chosen)
                for piece, of_ffn in zip(found, of_layer, strict=True):
                    of_ffn.append(piece._replace(tokens=begin + piece.tokens))
            begin += len(window)
            progress(len(window) / self.tokens / self.passes)
        return [[_joined(of_ffn) for of_ffn in of_layer] for of_layer in pieces]


def _joined(pieces: list[FFNTokens]) -> FFNTokens:
    """One FFN's windows one after the other; the pieces are gone afterwards."""
    ffn: FFN = pieces[0].ffn
    joined = FFNTokens(
        ffn,
        np.concatenate([piece.tokens for piece in pieces]),
        np.concatenate([piece.gate for piece in pieces]),
        np.concatenate([piece.up for piece in pieces]),
    )
    pieces.clear()
    return joined
