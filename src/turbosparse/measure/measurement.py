"""A whole measurement: sample, thresholds, one pass over the text, quality at each point."""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import TextError
from turbosparse.measure.cett_search import CettSearch, take_sample
from turbosparse.measure.config import MeasureConfig
from turbosparse.measure.counted_rule import CountedRule
from turbosparse.measure.quality_points import QualityRuns, budget_targets
from turbosparse.measure.source import Source
from turbosparse.measure.unit_statistics import HISTOGRAMS, RoutingStatistics, UnitStatistics
from turbosparse.sparsity.coactivation import CoactivationGap
from turbosparse.sparsity.jackknife import Estimate, group_of
from turbosparse.sparsity.quality import cut_windows
from turbosparse.sparsity.reuse import UNION_SIZES, WINDOWS
from turbosparse.sparsity.selection import NonZero, PositiveGate, Selection, TopK

__all__ = ["FORMAT_VERSION", "Progress", "measure", "require_window", "text_windows"]

FORMAT_VERSION = 1
Progress = Callable[[str], AbstractContextManager[Callable[[float], None]]]
"""Given a label, opens a bar of length 1 that the yielded function advances."""

logger = logging.getLogger(__name__)

_GROUPS = 10  # of windows, for standard errors
_HISTOGRAM_LAYERS = 5  # whose distributions are reported
_HOTNESS_POINTS = 101


def measure(
    source: Source,
    text: str,
    config: MeasureConfig,
    progress: Progress = lambda label: nullcontext(lambda share: None),
) -> dict[str, Any]:
    """Measure a model on a text.

    Parameters
    ----------
    source : Source
        The model, of either column.
    text : str
        Real text, as the model will read.
    config : MeasureConfig
        What to measure.
    progress : callable, optional
        Opens a progress bar per stage.

    Returns
    -------
    dict
        The record of the measurement, ready for JSON but for NaN; see docs/how-to/measure.md.

    Raises
    ------
    TextError
        When the text has fewer tokens than a window.
    CalibrationError
        When activations are not finite, or a CETT target cannot be met; names the layer.

    Notes
    -----
    Costs one dense pass over the text, a part of one for the sample, and a run over the quality tokens per
    point. Memory: samples and dense predictions within ``config.memory_bytes``; counts, 0.6 kB per neuron.
    """
    ids, windows = text_windows(source, text, config)
    with progress("sampling activations") as advance:
        search = take_sample(source, windows, config)
        advance(0.5)
        search.prepare(config.cett_targets, config.top_k)
    notes = search.notes()
    for note in notes:
        logger.warning("%s", note)
    quality_windows = windows[: max(1, config.quality_tokens // len(windows[0]))]
    runs = QualityRuns(source, quality_windows if config.quality_tokens else [], config.memory_bytes // 4)
    budgets: dict[float, float] = {}
    if config.quality_tokens:
        with progress("searching CETT targets for perplexity budgets"):
            budgets = budget_targets(search, runs, config.ppl_budgets, notes)
    targets = sorted({*config.cett_targets, *budgets.values()})
    with progress("counting active neurons") as advance:
        counts = _Counts(source, search, targets, config, windows=len(windows))
        for window in windows:
            source.capture(window, counts.next_window())
            advance(1 / len(windows))
    return {
        "format_version": FORMAT_VERSION,
        "model": source.description,
        "text": {
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "tokens": len(windows) * len(windows[0]),
            "tokens_of_the_text": len(ids),
            "windows": len(windows),
            "context": len(windows[0]),
        },
        "config": dataclasses.asdict(config),
        "cett_targets": targets,
        "windows": list(WINDOWS),
        "union_sizes": list(UNION_SIZES),
        "budgets": [{"budget": budget, "cett_target": target} for budget, target in budgets.items()],
        **counts.record(),
        "quality": _quality(source, search, runs, config, budgets, counts, progress)
        if config.quality_tokens
        else [],
        "notes": notes,
    }


def text_windows(
    source: Source, text: str, config: MeasureConfig
) -> tuple[list[int], list[NDArray[np.int32]]]:
    """Cut a text into windows of tokens.

    Parameters
    ----------
    source : Source
        Whose tokenizer and context.
    text : str
        Any text.
    config : MeasureConfig
        Its ``tokens`` and ``context``.

    Returns
    -------
    list of int, list of int32 arrays
        All tokens of the text, and the windows.

    Raises
    ------
    TextError
        When the text has fewer tokens than a window.
    """
    ids = source.text_ids(text)
    context = min(config.context, source.context_length)
    if context < config.context:
        logger.warning("windows of %d tokens, the model's context, instead of %d", context, config.context)
    require_window(text, len(ids), context)
    return ids, cut_windows(ids[: config.tokens], context, source.bos_id)


def require_window(text: str, tokens: int, context: int) -> None:
    """Refuse a text that fills no window.

    Parameters
    ----------
    text : str
        Any text.
    tokens : int
        That it has.
    context : int
        Tokens per window.

    Raises
    ------
    TextError
        When the text has fewer tokens than a window.
    """
    if not text.strip():
        raise TextError("[text] expected text, got nothing but white space")
    if tokens < context:
        raise TextError(f"[text] expected at least {context} tokens, one window, got {tokens}")


class _Counts:
    """The watcher of the pass over the whole text."""

    def __init__(
        self,
        source: Source,
        search: CettSearch,
        targets: Sequence[float],
        config: MeasureConfig,
        *,
        windows: int,
    ) -> None:
        self._source = source
        self._search = search
        self._config = config
        self._targets = list(targets)
        self._windows = windows
        self._groups = min(_GROUPS, windows)
        self._window = -1
        found = {target: search.thresholds(target) for target in targets}
        self._units = []
        for unit, description in enumerate(source.units):
            # a silent unit keeps what is not zero; of one without sample nothing is known
            without = math.nan if unit in search.unsampled else float(np.finfo(np.float32).tiny)
            eps = [found[target][unit].eps if unit in found[target] else without for target in targets]
            self._units.append(
                UnitStatistics(
                    description.name,
                    search.down_norms[unit],
                    eps,
                    active_eps=None if config.active is None else eps[self._targets.index(config.active)],
                    groups=self._groups,
                    pair_neurons=config.pair_neurons,
                    seed=config.seed,
                )
            )
        layers = {unit.layer for unit in source.units}
        self._routing = {
            layer: RoutingStatistics(source.experts(layer), self._groups)
            for layer in sorted(layers)
            if source.experts(layer)
        }

    def next_window(self) -> "_Counts":
        """Say that a new window begins."""
        self._window += 1
        for unit in self._units:
            unit.start()
        for routing in self._routing.values():
            routing.start()
        return self

    def on_ffn(self, unit: int, gate: NDArray[np.float32], up: NDArray[np.float32]) -> None:
        self._units[unit].add(gate, up, self._group)

    def on_routing(self, layer: int, chosen: NDArray[np.integer]) -> None:
        self._routing[layer].add(chosen, self._group)

    @property
    def _group(self) -> int:
        return group_of(self._window, self._windows, self._groups)

    def record(self) -> dict[str, Any]:
        estimates = [unit.estimates() for unit in self._units]
        weights = np.array(
            [
                statistics.tokens * unit.neurons
                for statistics, unit in zip(self._units, self._source.units, strict=True)
            ],
            np.float64,
        )
        self.overall = _over_units(estimates, weights)
        gaps = [unit.gap() for unit in self._units]
        units = []
        for at, (description, statistics) in enumerate(zip(self._source.units, self._units, strict=True)):
            thresholds = {target: self._search.thresholds(target).get(at) for target in self._targets}
            units.append(
                {
                    "name": description.name,
                    "layer": description.layer,
                    "expert": description.expert,
                    "neurons": description.neurons,
                    "tokens": statistics.tokens,
                    "sample_tokens": self._search.sample_tokens(at),
                    **_as_record(estimates[at]),
                    "coactivation": dataclasses.asdict(gaps[at]),
                    "thresholds": [
                        {"target": target, **dataclasses.asdict(found)}
                        for target, found in thresholds.items()
                        if found is not None
                    ],
                    "top_k": [
                        {"share": share, "cett": error, "cett_se": spread}
                        for share, (error, spread) in self._search.top_k_errors.get(at, {}).items()
                    ],
                    "hotness": _quantiles(statistics.frequencies),
                    "norm_share_of_largest": statistics.histograms["output_norm"]
                    .share_of_largest(np.linspace(0, 1, _HOTNESS_POINTS))
                    .tolist(),
                }
            )
        return {
            "overall": _as_record(self.overall) | {"coactivation": _over_gaps(gaps, weights)},
            "units": units,
            "routing": [
                {"layer": layer, **_routing_record(routing.record())}
                for layer, routing in self._routing.items()
            ],
            "histograms": self._histograms(),
        }

    def _histograms(self) -> list[dict[str, Any]]:
        reached = [at for at, unit in enumerate(self._units) if unit.tokens]
        last = len(reached) - 1
        chosen = sorted({round(last * at / (_HISTOGRAM_LAYERS - 1)) for at in range(_HISTOGRAM_LAYERS)})
        shown = []
        for at in (reached[place] for place in chosen):
            kinds = {}
            for kind in HISTOGRAMS:
                low, high, counts = self._units[at].histograms[kind].bins()
                kinds[kind] = {"low": low.tolist(), "high": high.tolist(), "counts": counts.tolist()}
            shown.append({"name": self._source.units[at].name, **kinds})
        return shown

    def sparsity(self, name: str, at: int | None = None) -> dict[str, float]:
        """A number of the whole model, by its name in the estimates."""
        estimate = self.overall[name]
        value, error = estimate.value, estimate.standard_error
        return {
            "value": float(value if at is None else value[at]),
            "standard_error": float(error if at is None else error[at]),
        }

    def cett_sparsity(self, target: float) -> dict[str, float]:
        """Share of neurons dropped at a CETT target."""
        return self.sparsity("cett_sparsity", self._targets.index(target))


def _quality(
    source: Source,
    search: CettSearch,
    runs: QualityRuns,
    config: MeasureConfig,
    budgets: dict[float, float],
    counts: _Counts,
    progress: Progress,
) -> list[dict[str, Any]]:
    points: list[tuple[str, float | None, Selection, dict[str, float]]] = [
        ("cett", target, search.selection(target), counts.cett_sparsity(target))
        for target in config.cett_targets
    ]
    for budget, target in budgets.items():
        named = dataclasses.replace(search.selection(target), label=f"CETT-PPL-{100 * budget:g}%")
        points.append(("cett_ppl", target, named, counts.cett_sparsity(target)))
    points += [
        ("top_k", share, CountedRule(TopK(share=share), gate_first=False), {}) for share in config.top_k
    ]
    points.append(("gate", None, PositiveGate(), counts.sparsity("gate_at_most_zero")))
    points.append(("zeros", None, NonZero(), counts.sparsity("exact_zeros")))
    points = [point for point in points if source.supports(point[2])]
    records = []
    with progress("perplexity and KL") as advance:
        for kind, parameter, selection, sparsity in points:
            quality = runs.run(selection, lambda share: advance(share / len(points)))
            if isinstance(selection, CountedRule):
                sparsity.update(selection.shares(gated=True)["sparsity"])
            records.append(
                {
                    "label": selection.label,
                    "kind": kind,
                    "parameter": parameter,
                    "sparsity": sparsity,
                    **dataclasses.asdict(quality),
                }
            )
    return records


def _over_units(
    estimates: Sequence[dict[str, Estimate]], weights: NDArray[np.float64]
) -> dict[str, Estimate]:
    """Means over units, weighted by their neurons and tokens; units without a number take no part."""
    overall = {}
    for name in estimates[0]:
        value = _weighted([unit[name].value for unit in estimates], weights)
        replicates = _weighted([unit[name].replicates for unit in estimates], weights)
        overall[name] = Estimate(value=value, replicates=replicates)
    return overall


def _weighted(values: Sequence[NDArray[np.float64]], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    stacked = np.stack(values)
    shaped = np.where(np.isnan(stacked), 0.0, weights.reshape(-1, *[1] * (stacked.ndim - 1)))
    total = shaped.sum(axis=0)
    summed = (np.nan_to_num(stacked) * shaped).sum(axis=0)
    return np.divide(summed, total, out=np.full_like(summed, math.nan), where=total > 0)


def _over_gaps(gaps: Sequence[CoactivationGap], weights: NDArray[np.float64]) -> dict[str, float]:
    """As `_over_units` does it, of numbers whose errors come from the sampled neurons."""
    judged = np.array([gap.neurons > 0 for gap in gaps])
    if not judged.any():
        return {"gap": math.nan, "standard_error": math.nan, "partner": math.nan, "average": math.nan}
    shares = np.where(judged, weights, 0.0) / weights[judged].sum()
    values = {
        name: np.nan_to_num([getattr(gap, name) for gap in gaps])
        for name in ("gap", "standard_error", "partner", "average")
    }
    means = {name: float(shares @ values[name]) for name in ("gap", "partner", "average")}
    return means | {"standard_error": float(np.linalg.norm(shares * values["standard_error"]))}


def _as_record(estimates: dict[str, Estimate]) -> dict[str, Any]:
    return {
        name: {"value": estimate.value.tolist(), "standard_error": estimate.standard_error.tolist()}
        for name, estimate in estimates.items()
    }


def _routing_record(record: dict[str, Any]) -> dict[str, Any]:
    estimates = record.pop("estimates")
    kept = ("reuse", "chance_reuse", "union_batch", "union_consecutive")
    return record | _as_record({name: estimates[name] for name in kept})


def _quantiles(frequencies: NDArray[np.float64]) -> list[float]:
    """Frequencies from the hottest to the coldest neuron, at 101 evenly spread ranks."""
    ranks = np.linspace(0, len(frequencies) - 1, _HOTNESS_POINTS).round().astype(int)
    return [round(float(value), 5) for value in np.sort(frequencies)[::-1][ranks]]
