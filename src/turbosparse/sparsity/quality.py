"""How well next tokens are predicted, and how far two sets of predictions are apart: sums over tokens.

Text is cut as llama.cpp's ``llama-perplexity`` does it, so that numbers compare: windows do not overlap, and
only the second half of each is scored, where every token has at least half a window before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import CalibrationError
from turbosparse.sparsity.float_histogram import FloatHistogram

__all__ = ["Quality", "QualitySums", "cut_windows", "log_softmax"]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What leaving out neurons does to the predictions of the same model, computed whole."""

    tokens: int
    """Scored."""
    perplexity: float
    """exp of the mean negative log-likelihood."""
    perplexity_se: float
    dense_perplexity: float
    dense_perplexity_se: float
    perplexity_rise: float
    """Over the dense perplexity, less 1."""
    perplexity_rise_se: float
    """From the differences token by token, which vary far less than the likelihoods."""
    mean_kl: float
    """KL(dense || sparse) per token, nats."""
    mean_kl_se: float
    kl_99_percentile: float
    """Within 6 %."""
    max_kl: float
    same_top_1: float
    """Share of tokens whose likeliest successor is the same."""
    same_top_1_se: float


class _Mean:
    """Mean and standard error of numbers that stream by."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = 0.0
        self._squares = 0.0  # sum of squared distances from the mean

    def add(self, values: NDArray[np.float64]) -> None:
        """Take more numbers (Chan's update, which does not cancel)."""
        count, mean = len(values), float(values.mean())
        together = self._count + count
        apart = mean - self._mean
        self._squares += float(np.square(values - mean).sum()) + apart**2 * self._count * count / together
        self._mean += apart * count / together
        self._count = together

    @property
    def count(self) -> int:
        return self._count

    @property
    def mean(self) -> float:
        return self._mean

    @property
    def standard_error(self) -> float:
        return math.sqrt(self._squares / self._count / max(self._count - 1, 1))


class QualitySums:
    """Compares predictions with those of the dense model while tokens stream by."""

    def __init__(self) -> None:
        self._loss, self._dense_loss, self._rise = _Mean(), _Mean(), _Mean()
        self._kl, self._same = _Mean(), _Mean()
        self._kl_histogram = FloatHistogram()
        self._max_kl = 0.0

    def add(
        self, log_q: NDArray[np.float32], log_p: NDArray[np.float32], targets: NDArray[np.integer]
    ) -> None:
        """Score tokens.

        Parameters
        ----------
        log_q, log_p : float32, shape (T, V)
            Log-probabilities of the sparse and of the dense model.
        targets : int, shape (T,)
            The tokens that follow.

        Raises
        ------
        CalibrationError
            When a loss is NaN or infinite; says of which model, and at which of the scored tokens.
        """
        rows = np.arange(len(targets))
        loss = -log_q[rows, targets].astype(np.float64)
        dense_loss = -log_p[rows, targets].astype(np.float64)
        for model, losses in (("dense", dense_loss), ("sparse", loss)):
            self._require_finite(model, losses)
        kl = np.maximum(np.sum(np.exp(log_p) * (log_p - log_q), axis=1, dtype=np.float64), 0.0)
        self._loss.add(loss)
        self._dense_loss.add(dense_loss)
        self._rise.add(loss - dense_loss)
        self._kl.add(kl)
        self._kl_histogram.add(kl.astype(np.float32))
        self._max_kl = max(self._max_kl, float(kl.max()))
        self._same.add((log_q.argmax(axis=1) == log_p.argmax(axis=1)).astype(np.float64))

    def _require_finite(self, model: str, losses: NDArray[np.float64]) -> None:
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            raise CalibrationError(
                f"[quality] expected finite losses, got {losses[bad[0]]} of the {model} model "
                f"at scored token {self._loss.count + bad[0]}"
            )

    def result(self) -> Quality:
        """Give the means.

        Returns
        -------
        Quality
            Over all tokens added, at least one.
        """
        perplexity, dense = _exp(self._loss.mean), _exp(self._dense_loss.mean)
        ratio = _exp(self._rise.mean)
        return Quality(
            tokens=self._loss.count,
            perplexity=perplexity,
            perplexity_se=perplexity * self._loss.standard_error,
            dense_perplexity=dense,
            dense_perplexity_se=dense * self._dense_loss.standard_error,
            perplexity_rise=ratio - 1,
            perplexity_rise_se=ratio * self._rise.standard_error,
            mean_kl=self._kl.mean,
            mean_kl_se=self._kl.standard_error,
            kl_99_percentile=self._kl_histogram.quantile(0.99),
            max_kl=self._max_kl,
            same_top_1=self._same.mean,
            same_top_1_se=self._same.standard_error,
        )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn logits into log-probabilities.

    Parameters
    ----------
    logits : float32, shape (T, V)
        Any scale.

    Returns
    -------
    float32, shape (T, V)
        ``x - log(sum(exp(x)))`` with the sum in float64.
    """
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    return np.asarray(shifted - np.log(total), np.float32)


def cut_windows(ids: Sequence[int], context: int, bos_id: int | None) -> list[NDArray[np.int32]]:
    """Cut a text into windows that do not overlap.

    Parameters
    ----------
    ids : sequence of int
        Tokens of the text.
    context : int
        Tokens per window; what remains at the end is left out.
    bos_id : int or None
        Replaces the first token of each window.

    Returns
    -------
    list of int32 arrays, each of shape (context,)
        In order.

    Examples
    --------
    >>> [window.tolist() for window in cut_windows([5, 6, 7, 8, 9], 2, 0)]
    [[0, 6], [0, 8]]
    """
    windows = []
    for begin in range(0, len(ids) - context + 1, context):
        window = np.array(ids[begin : begin + context], np.int32)
        if bos_id is not None:
            window[0] = bos_id
        windows.append(window)
    return windows
