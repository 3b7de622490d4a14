"""Rules that leave out neurons, and what each of them has to compute and read."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from turbosparse.sparsity.jackknife import jackknife
from turbosparse.sparsity.selection import Selection

__all__ = ["CountedRule"]


@dataclass
class CountedRule:
    """A selection that counts what it keeps."""

    rule: Selection
    gate_first: bool
    """Whether the gate alone tells which rows of up are needed; else all whose gate is not zero are."""
    _counts: list[list[int]] = field(default_factory=lambda: [[0, 0, 0]], init=False)
    """Of each window: neurons, rows of down, rows of up."""

    @property
    def label(self) -> str:
        """Name in reports."""
        return self.rule.label

    def kept(
        self, unit: int, gate: NDArray[np.float32], activations: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Choose as the rule does.

        Parameters
        ----------
        unit : int
            Index of the FFN or expert.
        gate, activations : float32, shape (T, F)
            As in `turbosparse.sparsity.selection.Selection`.

        Returns
        -------
        bool, shape (T, F)
            Neurons that are computed.
        """
        kept = self.rule.kept(unit, gate, activations)
        counts = self._counts[-1]
        counts[0] += kept.size
        counts[1] += int(np.count_nonzero(kept & (activations != 0)))  # a zero needs no row of down
        counts[2] += int(np.count_nonzero(kept if self.gate_first else gate))
        return kept

    def end_window(self) -> None:
        """Say that a new window begins: standard errors come from the spread over windows."""
        self._counts.append([0, 0, 0])

    def shares(self, *, gated: bool) -> dict[str, dict[str, float]]:
        """Give the costs of what was run so far.

        Parameters
        ----------
        gated : bool
            Whether a neuron has a row of up beside that of the gate.

        Returns
        -------
        dict
            ``computed``: share of neurons whose row of down is read. ``sparsity``: the rest of them.
            ``ffn_bytes``: share of the FFN's rows that is read when the gate comes first; exact for rows of
            equal size. Each with ``value`` and ``standard_error``, NaN where there is one window.
        """
        counts = np.array([window for window in self._counts if window[0]] or [[0, 0, 0]], np.int64)
        rows = [counts[:, 0], counts[:, 1], *([counts[:, 2]] if gated else [])]
        costs: dict[str, Callable[..., float]] = {
            "computed": lambda neurons, computed, *up: computed / max(neurons, 1),
            "sparsity": lambda neurons, computed, *up: 1 - computed / max(neurons, 1),
            "ffn_bytes": lambda neurons, *others: (
                (neurons + sum(others)) / ((1 + len(others)) * max(neurons, 1))
            ),
        }
        found = {name: jackknife(rows, cost) for name, cost in costs.items()}
        return {
            name: {"value": float(cost.value), "standard_error": float(cost.standard_error)}
            for name, cost in found.items()
        }
