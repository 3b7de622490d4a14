"""Perplexity of a text, and how far a mode's predictions are from another's.

The method is that of llama.cpp's ``llama-perplexity``, so that numbers compare: the text is cut into windows
of ``context`` tokens that do not overlap; where the model wants a begin of sequence token, it replaces the
first token of each window; only the second half of a window is scored, where every token has at least half a
window before it. A last incomplete window is left out.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import ConfigError, TextError
from turbosparse.runtime.predictors import CandidateQuality, candidate_quality
from turbosparse.runtime.prefix_cache import active_per_layer, active_ratio
from turbosparse.sparsity.quality import cut_windows, log_softmax

if TYPE_CHECKING:
    from turbosparse._native import Choose, Mode, Model, Session

__all__ = ["ModeComparison", "PerplexityResult", "compare_modes", "perplexity", "second_half"]

logger = logging.getLogger(__name__)

_MIN_CONTEXT = 8
_CHUNK = 64  # tokens whose logits are held at once: 64 * 151,936 * 4 bytes = 39 MB for Qwen2


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """How well a mode predicts a text."""

    perplexity: float  # exp of the mean negative log-likelihood per scored token
    standard_error: float  # of the perplexity, from the spread over tokens
    tokens: int  # scored
    context: int  # tokens per window; the second half of each is scored
    mode: "Mode"
    active_ratio: float  # share of FFN neurons used, mean over layers and tokens
    active_per_layer: list[float]  # the same of each layer
    candidates: CandidateQuality | None  # of mode predicted


@dataclass(frozen=True, kw_only=True)
class ModeComparison:
    """How far a mode's predictions are from a baseline's on the same text."""

    result: PerplexityResult
    baseline: PerplexityResult
    mean_kl: float  # nats per token, KL(baseline || mode)
    kl_99_percentile: float  # nats
    max_kl: float  # nats
    same_top_1: float  # share of tokens whose likeliest successor is the same

    @property
    def perplexity_ratio(self) -> float:
        """Divide the two perplexities.

        Returns
        -------
        float
            The mode's by the baseline's.
        """
        return self.result.perplexity / self.baseline.perplexity


class _Score:
    """Negative log-likelihoods of one mode, summed."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._sum_of_squares = 0.0

    def add(self, log_probs: NDArray[np.float32], targets: NDArray[np.int32]) -> None:
        nll = -log_probs[np.arange(len(targets)), targets].astype(np.float64)
        self.count += len(nll)
        self._sum += float(nll.sum())
        self._sum_of_squares += float(np.square(nll).sum())

    def result(self, *, context: int, mode: "Mode", session: "Session", model: "Model") -> PerplexityResult:
        mean = self._sum / self.count
        variance = max(self._sum_of_squares / self.count - mean**2, 0.0)
        value = math.exp(mean) if mean < 700 else math.inf
        return PerplexityResult(
            perplexity=value,
            standard_error=value * math.sqrt(variance / max(self.count - 1, 1)),
            tokens=self.count,
            context=context,
            mode=mode,
            active_ratio=active_ratio(session.counters, model.info) or 0.0,
            active_per_layer=active_per_layer(session.counters, model.info),
            candidates=candidate_quality(session.counters, model.info),
        )


def perplexity(
    model: "Model",
    ids: Sequence[int],
    *,
    mode: "Mode" = "dense",
    context: int = 512,
    bos_id: int | None = None,
    advance: Callable[[float], None] = lambda tokens: None,
) -> PerplexityResult:
    """Measure how well a mode predicts a text.

    Parameters
    ----------
    model : turbosparse._native.Model
        The engine.
    ids : sequence of int
        The whole text.
    mode : {"dense", "exact", "threshold", "predicted"}
        How the feed-forward layers are computed.
    context : int
        Tokens per window, at least 8. A text shorter than that is one window.
    bos_id : int, optional
        Replaces the first token of each window.
    advance : callable, optional
        Told how many tokens are done, for a progress bar whose total is ``len(ids)``.

    Returns
    -------
    PerplexityResult
        Perplexity, its standard error and the active ratio.

    Raises
    ------
    ConfigError
        If the context is too small, or beyond the model's.
    TextError
        If the text is too short.
    """
    context = _window(len(ids), context)
    session, score = model.session(context), _Score()
    for window in cut_windows(ids, context, bos_id):
        for logits, targets in second_half(session, window, mode):
            score.add(log_softmax(logits), targets)
        advance(context)
    return score.result(context=context, mode=mode, session=session, model=model)


def compare_modes(
    model: "Model",
    ids: Sequence[int],
    *,
    mode: "Mode",
    against: "Mode" = "dense",
    context: int = 512,
    bos_id: int | None = None,
    advance: Callable[[float], None] = lambda tokens: None,
) -> ModeComparison:
    """Measure how far a mode's predictions are from another's, in one pass over a text.

    Parameters
    ----------
    model : turbosparse._native.Model
        The engine; both modes run on its weights.
    ids : sequence of int
        The whole text.
    mode : {"dense", "exact", "threshold", "predicted"}
        What is judged.
    against : {"dense", "exact", "threshold", "predicted"}
        The baseline.
    context : int
        Tokens per window, at least 8. A text shorter than that is one window.
    bos_id : int, optional
        Replaces the first token of each window.
    advance : callable, optional
        Told how many tokens are done, for a progress bar whose total is ``len(ids)``.

    Returns
    -------
    ModeComparison
        Both perplexities and the divergence.

    Raises
    ------
    ConfigError
        If the context is too small, or beyond the model's.
    TextError
        If the text is too short.

    Notes
    -----
    The divergence of a token is KL(p || q) = sum of p (log p - log q) over the vocabulary, with p the
    baseline; float32 terms, float64 sums. Equal predictions give exactly 0.
    """
    context = _window(len(ids), context)
    session, base_session = model.session(context), model.session(context)
    score, base_score = _Score(), _Score()
    divergences: list[NDArray[np.float64]] = []
    same = 0
    for window in cut_windows(ids, context, bos_id):
        both = zip(
            second_half(session, window, mode), second_half(base_session, window, against), strict=True
        )
        for (logits, targets), (base_logits, _) in both:
            log_q, log_p = log_softmax(logits), log_softmax(base_logits)
            score.add(log_q, targets)
            base_score.add(log_p, targets)
            divergences.append(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1, dtype=np.float64))
            same += int(np.sum(log_p.argmax(axis=-1) == log_q.argmax(axis=-1)))
        advance(context)
    kl = np.maximum(np.concatenate(divergences), 0.0)  # rounding may leave -1e-9
    return ModeComparison(
        result=score.result(context=context, mode=mode, session=session, model=model),
        baseline=base_score.result(context=context, mode=against, session=base_session, model=model),
        mean_kl=float(kl.mean()),
        kl_99_percentile=float(np.percentile(kl, 99)),
        max_kl=float(kl.max()),
        same_top_1=same / len(kl),
    )


def _window(tokens: int, context: int) -> int:
    if context < _MIN_CONTEXT:
        raise ConfigError(f"[context] expected at least {_MIN_CONTEXT} tokens, got {context}")
    if tokens < _MIN_CONTEXT:
        raise TextError(f"[text] expected at least {_MIN_CONTEXT} tokens to measure perplexity, got {tokens}")
    if tokens < context:
        logger.warning("%d tokens are fewer than a window of %d: they are one window", tokens, context)
        return tokens
    return context


def second_half(
    session: "Session",
    window: NDArray[np.int32],
    mode: "Mode",
    *,
    choose: "Choose | None" = None,
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
    """Predict the second half of a window, which is what counts.

    Parameters
    ----------
    session : turbosparse._native.Session
        Has room for the window; its cache is emptied first.
    window : int32, shape (T,)
        Token ids.
    mode : {"dense", "exact", "threshold", "predicted"}
        How the feed-forward layers are computed.
    choose : callable, optional
        In mode predicted, what takes the place of predictors: given a layer, f(gate) and g(up), each float32
        of shape (n, F), returns which neurons are computed, bool of the same shape.

    Yields
    ------
    tuple
        Logits, float32 of shape (n, V), and the tokens that follow, int32 of shape (n,), in pieces.
    """
    first = len(window) // 2
    session.truncate(0)
    session.forward(window[:first], mode=mode, logits="none", choose=choose)
    for start in range(first, len(window) - 1, _CHUNK):
        end = min(start + _CHUNK, len(window) - 1)
        logits = session.forward(window[start:end], mode=mode, logits="all", choose=choose)
        yield logits, window[start + 1 : end + 1]
