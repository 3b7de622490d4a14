"""Which predictors and thresholds a model gets: by what the engine pays, within a budget of perplexity.

Bytes and loss of every threshold are known per layer from held-out activations; a common price per byte
makes the layers' choices one curve (`turbosparse.predict.allocation`); perplexity with all predictors on is
measured at some points of it, and the cheapest within the budget is kept.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from turbosparse.predict.allocation import (
    EXACT,
    Allocation,
    Choice,
    Menu,
    allocate,
    only,
    within_bytes,
    within_loss,
)
from turbosparse.predict.config import PredictorConfig
from turbosparse.predict.end_to_end import PlacedPredictor
from turbosparse.predict.layer_fit import LayerFit, family_of
from turbosparse.predict.report import CurvePoint, LayerReport, PredictorReport
from turbosparse.predict.score import PredictorScore
from turbosparse.predict.source import PredictorSource, TextPart

__all__ = ["Selection"]

_LOG = logging.getLogger(__name__)
_SHARES_OF_EXACT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_REFINEMENTS = 3
_PROBED_LOSS = 0.02  # share of a layer's energy at which its weight is measured


class Selection:
    """The choice of predictors and thresholds for all layers of a model.

    Parameters
    ----------
    source : PredictorSource
        The model.
    fits : mapping of str to LayerFit
        What each FFN or expert can choose from.
    config : PredictorConfig
        Ranks and budget.
    """

    def __init__(
        self, source: PredictorSource, fits: Mapping[str, LayerFit], config: PredictorConfig
    ) -> None:
        self._source = source
        self._fits = fits
        self._config = config
        self._usable = [f"low_rank_{rank}" for rank in config.ranks]
        self._dense_bytes = sum(fit.menu.share * fit.layer.dense_bytes for fit in fits.values())
        weights = self._weights()
        _LOG.info("weighed %d layers", len(weights))
        self._menus = {name: replace(fit.menu, weight=weights[name]) for name, fit in fits.items()}
        tried, last = self._walk(only(self._menus, self._usable))
        self._best = tried[last][0]
        self._beyond = tried[min(last + 1, len(tried) - 1)][0]
        self._curve = tuple(point for _, point in tried)

    @property
    def to_train(self) -> dict[str, PlacedPredictor]:
        """What fine-tuning shall bring within the budget: the next point beyond the choice, by layer."""
        return self._place(self._beyond.choices)

    @property
    def price(self) -> float:
        """KL divergence that a byte per token is worth there, in nats."""
        return self._beyond.price

    def _place(self, choices: Mapping[str, Choice]) -> dict[str, PlacedPredictor]:
        placed = {name: self._fits[name].place(choice) for name, choice in choices.items()}
        return {name: predictor for name, predictor in placed.items() if predictor is not None}

    def _weights(self) -> dict[str, float]:
        """KL divergence that losing a little in one layer causes, per share lost; its experts share one."""
        groups: dict[str, dict[str, Choice]] = {}
        for name, fit in self._fits.items():
            curve = fit.menu.curves.get(self._usable[0])
            if curve is not None:
                at = int(np.abs(curve.lost - _PROBED_LOSS).argmin())
                groups.setdefault(_module(name), {})[name] = curve.choice(self._usable[0], at)
        found = self._source.evaluate([self._place(choices) for choices in groups.values()], "probe")
        weights = {}
        for (module, choices), evaluation in zip(groups.items(), found, strict=True):
            lost = sum(choice.lost * self._fits[name].menu.share for name, choice in choices.items())
            weights[module] = evaluation.kl_divergence / max(lost, 1e-6)
        mean = sum(weights.values()) / max(len(weights), 1) or 1.0
        return {name: max(weights.get(_module(name), mean), 1e-3 * mean) for name in self._fits}

    def _points(self, allocations: Sequence[Allocation], part: TextPart) -> list[CurvePoint]:
        found = self._source.evaluate([self._place(each.choices) for each in allocations], part)
        return [
            CurvePoint(bytes_ratio=each.read_bytes / self._dense_bytes, lost=each.lost, evaluation=evaluation)
            for each, evaluation in zip(allocations, found, strict=True)
        ]

    def _walk(self, menus: Mapping[str, Menu]) -> tuple[list[tuple[Allocation, CurvePoint]], int]:
        """Measure from the exact mode to few bytes, then halve the step in which the budget is spent.

        Returns what was tried, by falling bytes, and the index of the cheapest within the budget.
        """
        exact = allocate(menus, 0.0)
        found = [exact, *(within_bytes(menus, share * exact.read_bytes) for share in _SHARES_OF_EXACT)]
        tried: list[tuple[Allocation, CurvePoint]] = []
        last = 0
        for _ in range(1 + _REFINEMENTS):
            known = {each.read_bytes for each, _ in tried}
            new = list({each.read_bytes: each for each in found if each.read_bytes not in known}.values())
            for each in new:
                (point,) = self._points([each], "choose")
                tried.append((each, point))
                _LOG.info(
                    "tried %.1f%% of the bytes: perplexity %.3f, KL %.4f",
                    100 * point.bytes_ratio,
                    point.evaluation.perplexity,
                    point.evaluation.kl_divergence,
                )
            tried.sort(key=lambda pair: -pair[0].read_bytes)
            perplexities = [point.evaluation.perplexity for _, point in tried]
            limit = perplexities[0] * (1 + self._config.ppl_budget)
            last = max(at for at, perplexity in enumerate(perplexities) if perplexity <= limit)
            if not new or last == len(tried) - 1:
                break
            found = [within_bytes(menus, (tried[last][0].read_bytes + tried[last + 1][0].read_bytes) / 2)]
        return tried, last

    def report(self) -> PredictorReport:
        """Describe the choice and its rivals.

        Returns
        -------
        PredictorReport
            With everything measured on the reporting half of the held-out text, except for the curve.
        """
        best, exact = self._best, allocate(only(self._menus, ()), 0.0)
        reference, chosen = self._points([exact, best], "report")
        rivals: dict[str, CurvePoint] = {}
        scores: dict[str, dict[str, PredictorScore]] = {name: {} for name in self._fits}
        families: dict[str, list[str]] = {}
        for kind in dict.fromkeys(kind for menu in self._menus.values() for kind in menu.curves):
            families.setdefault(family_of(kind), []).append(kind)
        families.pop("low_rank", None)
        for family, kinds in families.items():
            rival = within_loss(only(self._menus, kinds), best.lost)
            (rivals[family],) = self._points([rival], "report")
            for name, choice in rival.choices.items():
                scores[name][family] = self._fits[name].score(choice)
        return PredictorReport(
            perplexity=reference.evaluation.perplexity,
            ppl_rise=chosen.evaluation.perplexity / reference.evaluation.perplexity - 1,
            chosen=chosen,
            exact_bytes_ratio=exact.read_bytes / self._dense_bytes,
            cheaper="predicted" if best.read_bytes < exact.read_bytes else EXACT,
            curve=self._curve,
            rivals=rivals,
            config=self._config,
            layers={name: self._layer(name, choice, scores[name]) for name, choice in best.choices.items()},
        )

    def _layer(self, name: str, choice: Choice, rivals: Mapping[str, PredictorScore]) -> LayerReport:
        fit, menu = self._fits[name], self._menus[name]
        return LayerReport(
            kind=choice.kind,
            threshold=choice.threshold,
            tokens=fit.tokens,
            weight=menu.weight,
            exact_bytes_ratio=menu.exact_bytes / fit.layer.dense_bytes,
            score=fit.score(choice),
            rivals=rivals,
        )


def _module(name: str) -> str:
    """Drop an expert's number."""
    return re.sub(r"\.\d+$", "", name)
