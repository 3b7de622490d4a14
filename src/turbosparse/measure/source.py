"""What a measurement needs of a model, whichever column runs it.

`turbosparse.measure.hugging_face` and `turbosparse.runtime.measured_file` are such sources; neither imports
the other's column, and all numbers are computed by the same functions on the arrays they hand over.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from turbosparse.sparsity.selection import Selection

__all__ = ["Source", "Unit", "Watcher"]


class Unit(Protocol):
    """An FFN, or one expert of a mixture."""

    @property
    def name(self) -> str:
        """What people call it: "layer 3", "layer 3 expert 5"."""

    @property
    def layer(self) -> int:
        """Index of the layer."""

    @property
    def expert(self) -> int | None:
        """Index of the expert."""

    @property
    def neurons(self) -> int:
        """F."""

    @property
    def token_share(self) -> float:
        """Share of tokens expected here: 1, or experts chosen over experts."""


class Watcher(Protocol):
    """What looks at the FFNs of a model while it runs."""

    def on_ffn(self, unit: int, gate: NDArray[np.float32], up: NDArray[np.float32]) -> None:
        """Look at tokens of one unit, in order.

        Parameters
        ----------
        unit : int
            Index into the source's units.
        gate, up : float32, shape (T, F)
            f(gate) and g(up); not to be kept or written to.
        """

    def on_routing(self, layer: int, chosen: NDArray[np.integer]) -> None:
        """Look at the experts chosen for tokens of one layer, in order.

        Parameters
        ----------
        layer : int
            Index of the layer.
        chosen : int, shape (T, k)
            Experts.
        """


class Source(Protocol):
    """A model whose FFNs can be watched and thinned out."""

    @property
    def description(self) -> dict[str, Any]:
        """Known facts: name, kind, activation, sizes."""

    @property
    def units(self) -> Sequence[Unit]:
        """All FFNs and experts, in order of depth."""

    @property
    def context_length(self) -> int:
        """How many tokens a window may have."""

    @property
    def bos_id(self) -> int | None:
        """What every window begins with, where the model asks for it."""

    def text_ids(self, text: str) -> list[int]:
        """Turn a text into tokens.

        Parameters
        ----------
        text : str
            Any text.

        Returns
        -------
        list of int
            Token ids.
        """

    def experts(self, layer: int) -> int:
        """Count the experts of a layer.

        Parameters
        ----------
        layer : int
            Index.

        Returns
        -------
        int
            0 where it has none.
        """

    def down_t(self, unit: int) -> NDArray[np.float32]:
        """Give a unit's transposed down projection.

        Parameters
        ----------
        unit : int
            Index into `units`.

        Returns
        -------
        float32, shape (F, D)
            One row per neuron.
        """

    def capture(self, window: NDArray[np.int32], watcher: Watcher) -> None:
        """Run a window densely, with an empty cache, and show its FFNs.

        Parameters
        ----------
        window : int32, shape (T,)
            Token ids.
        watcher : Watcher
            Sees them.
        """

    def supports(self, selection: Selection) -> bool:
        """Say whether `predictions` can leave out what this selection does.

        Parameters
        ----------
        selection : Selection
            Neurons to compute.

        Returns
        -------
        bool
            False where the model cannot run so.
        """

    def predictions(
        self, window: NDArray[np.int32], selection: Selection | None
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
        """Predict the second half of a window.

        Parameters
        ----------
        window : int32, shape (T,)
            Token ids.
        selection : Selection or None
            Neurons to compute; all if None.

        Yields
        ------
        tuple
            Logits, float32 of shape (n, V), and the tokens that follow, int32 of shape (n,), in pieces.
        """

    def close(self) -> None:
        """Remove what was written on the way."""
