"""Thresholds of every unit that meet CETT targets, on a sample of tokens spread over the text."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import CalibrationError
from turbosparse.measure.config import MeasureConfig
from turbosparse.measure.source import Source, Unit
from turbosparse.sparsity.cett import (
    DroppedError,
    activation_ratio,
    largest_meeting,
    neuron_output_norms,
    typical_norm,
)
from turbosparse.sparsity.selection import NormThresholds, top_k_kept

__all__ = ["CettSearch", "UnitThreshold", "take_sample"]

logger = logging.getLogger(__name__)

_CHECKED = 5  # every fifth token of the sample checks what the other four found
_TOP_K_TOKENS = 256  # of the sample, for the error of the top-k rule
_WINDOWS_OVER_SAMPLE = 2  # the windows that are sampled have twice as many tokens


@dataclass(frozen=True, kw_only=True)
class UnitThreshold:
    """A threshold of one unit, and what it does."""

    eps: float
    """Bound on a neuron's output norm."""
    cett: float
    """Error on the tokens it was found on."""
    checked_cett: float
    """Error on other tokens; NaN where the sample is too small to have any."""
    checked_cett_se: float
    activation_ratio: float
    """On the tokens it was found on."""


@dataclass
class _UnitSample:
    """Activations of some tokens of one unit."""

    most: int
    stride: int
    seen: int = 0
    taken: int = 0
    rows: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, activations: NDArray[np.float32]) -> None:
        chosen = activations[-self.seen % self.stride :: self.stride][: self.most - self.taken]
        self.seen += len(activations)
        self.taken += len(chosen)
        self.rows.append(chosen.copy())

    def activations(self) -> NDArray[np.float32]:
        """All rows as one array, [n, F]."""
        self.rows = [np.concatenate(self.rows)] if self.rows else self.rows
        return self.rows[0]


class _SampleWatcher:
    """Keeps the activations of some tokens of each unit."""

    def __init__(self, units: Sequence[Unit], *, rows: int, tokens: int) -> None:
        self.samples = [
            _UnitSample(most=rows, stride=max(1, int(tokens * unit.token_share) // rows)) for unit in units
        ]

    def on_ffn(self, unit: int, gate: NDArray[np.float32], up: NDArray[np.float32]) -> None:
        self.samples[unit].add(gate * up)

    def on_routing(self, layer: int, chosen: NDArray[np.integer]) -> None:
        """Routing has no threshold."""


def take_sample(source: Source, windows: Sequence[NDArray[np.int32]], config: MeasureConfig) -> "CettSearch":
    """Run some windows, evenly spread, and keep what thresholds are found on.

    Parameters
    ----------
    source : Source
        The model.
    windows : sequence of int32 arrays
        All windows of the text.
    config : MeasureConfig
        Size of the sample; it shrinks to half the memory budget.

    Returns
    -------
    CettSearch
        Ready to search.
    """
    neurons = sum(unit.neurons for unit in source.units)
    wanted = config.sample_tokens * _CHECKED // (_CHECKED - 1)
    rows = max(_CHECKED, min(wanted, config.memory_bytes // 2 // (4 * neurons)))
    if rows < wanted:
        logger.warning("the memory budget has room for %d of %d sample tokens", rows, wanted)
    count = min(len(windows), max(1, math.ceil(_WINDOWS_OVER_SAMPLE * rows / len(windows[0]))))
    spread = [windows[(2 * at + 1) * len(windows) // (2 * count)] for at in range(count)]
    watcher = _SampleWatcher(source.units, rows=rows, tokens=sum(map(len, spread)))
    for window in spread:
        source.capture(window, watcher)
    return CettSearch(source, watcher.samples)


class CettSearch:
    """Finds thresholds on a sample; later targets start from earlier ones.

    Parameters
    ----------
    source : Source
        The model.
    samples : sequence of _UnitSample
        Activations by unit.

    Attributes
    ----------
    down_norms : dict of int to float32 arrays of shape (F,)
        ||W_down[:, i]|| by unit.
    silent : list of int
        Units whose neurons all have an output of zero on the sample: CETT is undefined there.
    unsampled : list of int
        Units that no token of the sample reached.
    """

    def __init__(self, source: Source, samples: Sequence[_UnitSample]) -> None:
        self._source = source
        self._samples = samples
        self._known: dict[int, dict[float, UnitThreshold]] = {unit: {} for unit in range(len(samples))}
        self.down_norms: dict[int, NDArray[np.float32]] = {}
        self.top_k_errors: dict[int, dict[float, tuple[float, float]]] = {}
        self.unsampled = [unit for unit, sample in enumerate(samples) if not sample.taken]
        self.silent: list[int] = []  # known when `prepare` has seen the down projections

    def notes(self) -> list[str]:
        """Say which units have no thresholds, and why.

        Returns
        -------
        list of str
            A sentence each.
        """
        units = self._source.units
        return [
            f"{units[unit].name}: no neuron is active on the sample, so CETT is undefined there"
            for unit in self.silent
        ] + [
            f"{units[unit].name}: no token of the sample reached it, so it has no threshold"
            for unit in self.unsampled
        ]

    def sample_tokens(self, unit: int) -> int:
        """Count the tokens that a unit's thresholds are found on.

        Parameters
        ----------
        unit : int
            Index.

        Returns
        -------
        int
            Without those that check them.
        """
        return len(_split(self._samples[unit].activations())[0]) if self._samples[unit].taken else 0

    def prepare(self, targets: Sequence[float], top_k: Sequence[float]) -> None:
        """Go through the units once: norms, thresholds of all targets, errors of the top-k rule.

        Parameters
        ----------
        targets : sequence of float
            CETT targets.
        top_k : sequence of float
            Shares of neurons kept.

        Raises
        ------
        CalibrationError
            When activations are not finite or a target cannot be met; names the unit.
        """
        for unit in range(len(self._samples)):
            down_t = self._source.down_t(unit)
            self.down_norms[unit] = np.linalg.norm(down_t, axis=1).astype(np.float32)
            if unit in self.unsampled:
                continue
            if not neuron_output_norms(_split(self._samples[unit].activations())[0], down_t).any():
                self.silent.append(unit)
                continue
            self._find(unit, targets, down_t)
            errors = self.top_k_errors.setdefault(unit, {})
            activations = self._samples[unit].activations()
            activations = activations[:: -(-len(activations) // _TOP_K_TOKENS)]
            error = DroppedError(activations, down_t)
            for share in top_k:
                errors[share] = _mean(error.ratios(top_k_kept(activations, share)))

    def thresholds(self, target: float) -> dict[int, UnitThreshold]:
        """Find the thresholds of one target.

        Parameters
        ----------
        target : float
            CETT target.

        Returns
        -------
        dict of int to UnitThreshold
            By unit, without those that are silent or not sampled.
        """
        for unit, known in self._known.items():
            if not self._undefined(unit) and target not in known:
                self._find(unit, [target], self._source.down_t(unit))
        return {unit: known[target] for unit, known in self._known.items() if not self._undefined(unit)}

    def selection(self, target: float) -> NormThresholds:
        """Make a selection that meets a target.

        Parameters
        ----------
        target : float
            CETT target.

        Returns
        -------
        NormThresholds
            To run the model with.
        """
        return NormThresholds(
            label=f"CETT {target:g}",
            eps={unit: found.eps for unit, found in self.thresholds(target).items()},
            down_norms=self.down_norms,
        )

    def _undefined(self, unit: int) -> bool:
        return unit in self.silent or unit in self.unsampled

    def _find(self, unit: int, targets: Sequence[float], down_t: NDArray[np.float32]) -> None:
        name = self._source.units[unit].name
        search, check = _split(self._samples[unit].activations())
        known = self._known[unit]
        try:
            error = DroppedError(search, down_t)
            norms = neuron_output_norms(search, down_t)
            checked = DroppedError(check, down_t) if len(check) else None
            check_norms = neuron_output_norms(check, down_t)
            for target in sorted(targets):
                eps, achieved = largest_meeting(
                    lambda eps: error(norms >= np.float32(eps)),
                    target,
                    start=_start(known, target) or typical_norm(norms),
                )
                bound = np.float32(eps)
                mean, spread = (
                    _mean(checked.ratios(check_norms >= bound)) if checked else (math.nan, math.nan)
                )
                known[target] = UnitThreshold(
                    eps=eps,
                    cett=achieved,
                    checked_cett=mean,
                    checked_cett_se=spread,
                    activation_ratio=activation_ratio(norms >= bound),
                )
        except CalibrationError as failure:
            raise CalibrationError(f"[{name}] {failure}") from failure


def _split(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rows to search on, and rows to check with."""
    checking = np.arange(len(rows)) % _CHECKED == _CHECKED - 1
    return rows[~checking], rows[checking]


def _start(known: dict[float, UnitThreshold], target: float) -> float | None:
    """An eps near that of a target: along the power law through the nearest known ones."""
    points = sorted((math.log(at), math.log(found.eps)) for at, found in known.items() if found.eps > 0)
    if not points:
        return None
    targets, bounds = zip(*points, strict=True)
    nearest = float(np.interp(math.log(target), targets, bounds))
    beyond = math.log(target) - min(max(math.log(target), targets[0]), targets[-1])
    return math.exp(nearest + beyond)


def _mean(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and its standard error."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)
