"""Rules that leave out neurons, and what each of them has to compute and read."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from turbosparse.sparsity.selection import Selection

__all__ = ["CountedRule"]


@dataclass
class CountedRule:
    """A selection that counts what it keeps."""

    rule: Selection
    gate_first: bool
    """Whether the gate alone tells which rows of up are needed; else all whose gate is not zero are."""
    neurons: int = field(default=0, init=False)
    needs_up: int = field(default=0, init=False)
    computed: int = field(default=0, init=False)

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
        self.neurons += kept.size
        self.computed += int(np.count_nonzero(kept & (activations != 0)))  # a zero needs no row of down
        self.needs_up += int(np.count_nonzero(kept if self.gate_first else gate))
        return kept

    def shares(self, *, gated: bool) -> dict[str, float]:
        """Give the costs of what was run so far.

        Parameters
        ----------
        gated : bool
            Whether a neuron has a row of up beside that of the gate.

        Returns
        -------
        dict
            ``computed``: share of neurons whose row of down is read. ``ffn_bytes``: share of the FFN's rows
            that is read when the gate comes first; exact for rows of equal size.
        """
        neurons = max(self.neurons, 1)
        rows = [self.neurons, self.computed, *([self.needs_up] if gated else [])]
        return {"computed": self.computed / neurons, "ffn_bytes": sum(rows) / (len(rows) * neurons)}
