"""FFN activations of a text, layer by layer, within a memory budget."""

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from turbosparse import _native

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
    """f(gate) and g(up) of every layer on the same tokens.

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
    """

    def __init__(
        self, model: _native.Model, windows: Sequence[NDArray[np.int32]], *, memory_bytes: int
    ) -> None:
        info = model.info
        self._windows = list(windows)
        self._session = model.session(max(map(len, self._windows)))
        self._layers = info.num_hidden_layers
        self._shape = (sum(map(len, self._windows)), info.intermediate_size)  # [T, F]
        per_layer = 2 * 4 * self._shape[0] * self._shape[1]
        self._group = max(1, min(self._layers, memory_bytes // per_layer))
        self._kept: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []

    @property
    def passes(self) -> int:
        """Dense passes over the tokens that one iteration costs, when nothing is kept yet."""
        return -(-self._layers // self._group)

    def layers(
        self, progress: Callable[[float], None] = lambda amount: None
    ) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
        """Go through the layers in order.

        Parameters
        ----------
        progress : callable
            Called with shares of one iteration's captures, 1 in all.

        Yields
        ------
        tuple
            Index of the layer, f(gate) and g(up), each float32 of shape (T, F). Not to be written to.
        """
        for first in range(0, self._layers, self._group):
            group = list(range(first, min(first + self._group, self._layers)))
            arrays = self._kept or self._capture(group, progress)
            if self._group == self._layers:
                self._kept = arrays
            while group:
                layer = group.pop(0)
                yield layer, *(arrays[layer] if self._kept else arrays.pop(0))

    def _capture(
        self, group: list[int], progress: Callable[[float], None]
    ) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        arrays = [(np.empty(self._shape, np.float32), np.empty(self._shape, np.float32)) for _ in group]
        begin = 0
        for window in self._windows:
            self._session.truncate(0)
            end = begin + len(window)
            for (gate, up), captured in zip(arrays, self._session.capture(window, group), strict=True):
                gate[begin:end], up[begin:end] = captured[0], captured[1]
            begin = end
            progress(len(window) / self._shape[0] / self.passes)
        return arrays
