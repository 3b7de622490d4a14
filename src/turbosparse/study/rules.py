"""Thresholds on the gate alone."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from turbosparse.measure.source import Source, Unit
from turbosparse.sparsity.float_histogram import FloatHistogram
from turbosparse.sparsity.selection import GateThresholds

__all__ = ["gate_thresholds"]


class _GateWatcher:
    """Distribution of the gate's magnitude in each unit."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.histograms = [FloatHistogram() for _ in units]

    def on_ffn(self, unit: int, gate: NDArray[np.float32], up: NDArray[np.float32]) -> None:
        self.histograms[unit].add(np.abs(gate))

    def on_routing(self, layer: int, chosen: NDArray[np.integer]) -> None:
        """Routing has no threshold."""


def gate_thresholds(
    source: Source, windows: Sequence[NDArray[np.int32]], shares: Sequence[float]
) -> Mapping[float, GateThresholds]:
    """Find thresholds on the gate's magnitude that keep given shares of the neurons.

    Parameters
    ----------
    source : Source
        The model.
    windows : sequence of int32 arrays
        Text to look at.
    shares : sequence of float
        Of the neurons, above 0 and below 1.

    Returns
    -------
    mapping of float to GateThresholds
        By share. Of units that no token reached there is no threshold.
    """
    watcher = _GateWatcher(source.units)
    for window in windows:
        source.capture(window, watcher)
    return {
        share: GateThresholds(
            label=f"gate, {100 * share:g} %",
            thresholds={
                unit: histogram.quantile(1 - share)
                for unit, histogram in enumerate(watcher.histograms)
                if histogram.total
            },
        )
        for share in shares
    }
