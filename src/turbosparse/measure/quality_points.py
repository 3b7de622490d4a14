"""Perplexity and KL of a model with neurons left out, against the same model computed whole."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import CalibrationError
from turbosparse.measure.cett_search import CettSearch
from turbosparse.measure.counted_rule import CountedRule
from turbosparse.measure.source import Source
from turbosparse.sparsity.budget import largest_cett_within
from turbosparse.sparsity.quality import Quality, QualitySums, log_softmax
from turbosparse.sparsity.selection import Selection

__all__ = ["QualityRuns", "budget_targets"]

_Pieces = list[tuple[NDArray[np.float32], NDArray[np.int32]]]


class QualityRuns:
    """Runs selections over the same windows. Dense predictions are kept while memory lasts.

    Parameters
    ----------
    source : Source
        The model.
    windows : sequence of int32 arrays
        Text to predict.
    memory_bytes : int
        Budget for dense predictions; those of other windows are computed again.
    """

    def __init__(self, source: Source, windows: Sequence[NDArray[np.int32]], memory_bytes: int) -> None:
        self._source = source
        self._windows = windows
        self._room = memory_bytes
        self._dense: dict[int, _Pieces] = {}

    def run(self, selection: Selection, advance: Callable[[float], None] = lambda share: None) -> Quality:
        """Predict the text with what a selection keeps.

        Parameters
        ----------
        selection : Selection
            Neurons to compute.
        advance : callable, optional
            Told shares of the work, 1 in all.

        Returns
        -------
        Quality
            Against the dense model.

        Raises
        ------
        CalibrationError
            When predictions are not finite; names the window.
        """
        sums = QualitySums()
        for at, window in enumerate(self._windows):
            sparse = self._source.predictions(window, selection)
            try:
                for (log_p, targets), (logits, _) in zip(self._dense_pieces(at), sparse, strict=True):
                    sums.add(log_softmax(logits), log_p, targets)
            except CalibrationError as error:
                raise CalibrationError(f"[window {at}] {error}") from error
            if isinstance(selection, CountedRule):
                selection.end_window()
            advance(1 / len(self._windows))
        return sums.result()

    def _dense_pieces(self, at: int) -> _Pieces:
        if at in self._dense:
            return self._dense[at]
        pieces = [
            (log_softmax(logits), targets)
            for logits, targets in self._source.predictions(self._windows[at], None)
        ]
        size = sum(log_p.nbytes for log_p, _ in pieces)
        if size <= self._room:
            self._room -= size
            self._dense[at] = pieces
        return pieces


def budget_targets(
    search: CettSearch, runs: QualityRuns, budgets: Sequence[float], notes: list[str]
) -> dict[float, float]:
    """Find the CETT targets of CETT-PPL-p%.

    Parameters
    ----------
    search : CettSearch
        Thresholds at any target.
    runs : QualityRuns
        Perplexity at any selection.
    budgets : sequence of float
        Relative rises of the perplexity allowed.
    notes : list of str
        Budgets that cannot be met are told here.

    Returns
    -------
    dict of float to float
        CETT target by budget.

    Raises
    ------
    CalibrationError
        When the model could not be run at any target.
    """
    tried: dict[float, Quality] = {}

    def _rise(target: float) -> float:
        target = _rounded(target)
        if target not in tried:
            tried[target] = runs.run(search.selection(target))
        return tried[target].perplexity_rise

    found: dict[float, float] = {}
    for budget in sorted(budgets):
        name = f"CETT-PPL-{100 * budget:g}%"
        try:
            found[budget] = _rounded(largest_cett_within(_rise, budget))
        except CalibrationError as error:
            if not tried:
                raise
            notes.append(f"{name}: {error}")  # no reason to lose the rest
            continue
        error_of_rise = tried[found[budget]].perplexity_rise_se
        if error_of_rise > budget / 4:
            notes.append(
                f"{name}: the rise is known within {100 * error_of_rise:.1g} % only; give more quality tokens"
            )
    return found


def _rounded(target: float) -> float:
    return float(f"{target:.3g}")
