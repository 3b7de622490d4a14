"""Whether a model file computes what it was made from: the same text through both, logits compared."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from turbosparse import _native
from turbosparse.errors import ConfigError, TextError
from turbosparse.sparsity.quality import log_softmax
from turbosparse.tokenizer import Tokenizer

__all__ = [
    "KL_LIMITS",
    "CheckResult",
    "Logits",
    "compare_logits",
    "engine_logits",
    "text_windows",
    "torch_logits",
]

Logits = Callable[[NDArray[np.int32]], NDArray[np.float32]]

# Largest mean KL, in nats, that each weight type may cause. Rounding costs a small model this much (SmolLM2
# as it is and as dReLU): F32 2e-8 and 3e-8, F16 7e-6, BF16 2e-4, Q8_0 0.004 and 0.02, Q4_0 0.3 and 0.5.
KL_LIMITS = {"F32": 1e-5, "F16": 1e-3, "BF16": 0.02, "Q8_0": 0.1, "Q4_0": 1.0}
_ROWS = 64  # positions compared at once
_FEWEST_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """How far the file's predictions are from those of the model it was made from."""

    perplexity: float
    """Of the file, in dense mode."""
    reference_perplexity: float
    """Of the model it was made from."""
    mean_kl: float
    """KL(model || file), in nats per token."""
    max_kl: float
    """The largest of a token, in nats."""
    same_top_1: float
    """Share of positions where the likeliest token is the same."""
    tokens: int
    """Positions compared."""
    limit: float
    """Largest mean KL that passes, in nats."""

    @property
    def passed(self) -> bool:
        """Whether the file may be used."""
        return self.mean_kl <= self.limit  # false for NaN, too


def text_windows(tokenizer: Tokenizer, text: str, *, tokens: int, context: int) -> list[NDArray[np.int32]]:
    """Cut a text into windows.

    Parameters
    ----------
    tokenizer : Tokenizer
        The model file's.
    text : str
        Any text.
    tokens : int
        How many tokens to use at most.
    context : int
        Tokens per window, at most.

    Returns
    -------
    list of int32 arrays
        Each begins as the model wants it.

    Raises
    ------
    TextError
        When the text has fewer than 8 tokens.
    ConfigError
        When fewer are asked for.
    """
    if tokens < _FEWEST_TOKENS:
        raise ConfigError(f"[tokens] expected at least {_FEWEST_TOKENS}, got {tokens}")
    ids = tokenizer.encode(text)[:tokens]
    if len(ids) < _FEWEST_TOKENS:
        raise TextError(f"[text] expected at least {_FEWEST_TOKENS} tokens to check with, got {len(ids)}")
    windows = [np.array(ids[begin : begin + context], np.int32) for begin in range(0, len(ids), context)]
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        for window in windows:
            window[0] = tokenizer.bos_id
    return [window for window in windows if len(window) >= _FEWEST_TOKENS]


def engine_logits(path: Path, *, threads: int) -> Logits:
    """Compute logits with the engine, dense.

    Parameters
    ----------
    path : Path
        A model file.
    threads : int
        Threads; 0: physical cores, at most 8.

    Returns
    -------
    callable
        Token ids, shape (T,), to logits, float32, shape (T, V).
    """
    model = _native.Model(str(path), threads=threads)

    def _logits(ids: NDArray[np.int32]) -> NDArray[np.float32]:
        return model.session(len(ids)).forward(ids, mode="dense", logits="all")

    return _logits


def torch_logits(directory: Path, *, threads: int) -> Logits:
    """Compute logits with transformers, in float32.

    Parameters
    ----------
    directory : Path
        A Hugging Face directory, swapped or not.
    threads : int
        Threads; 0: as torch has it.

    Returns
    -------
    callable
        Token ids, shape (T,), to logits, float32, shape (T, V).
    """
    import torch  # noqa: PLC0415 -- exporting without a check needs no torch
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    from turbosparse.models.registry import load_model  # noqa: PLC0415

    disable_progress_bar()

    if threads:
        torch.set_num_threads(threads)
    model = load_model(directory, dtype=torch.float32)

    def _logits(ids: NDArray[np.int32]) -> NDArray[np.float32]:
        with torch.no_grad():
            out = model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits
        values: NDArray[np.float32] = out[0].float().numpy()
        return values

    return _logits


def compare_logits(
    reference: Logits,
    file: Logits,
    windows: Sequence[NDArray[np.int32]],
    *,
    limit: float,
    advance: Callable[[float], None] = lambda share: None,
) -> CheckResult:
    """Compare two ways to compute the same model.

    Parameters
    ----------
    reference, file : callable
        Token ids, shape (T,), to logits, float32, shape (T, V).
    windows : sequence of int32 arrays
        What to compute them for.
    limit : float
        Largest mean KL that passes, in nats.
    advance : callable, optional
        Told which share of the work was done.

    Returns
    -------
    CheckResult
        Both perplexities, and KL(reference || file).
    """
    losses, divergences, same = np.zeros(2), [], 0
    for window in windows:
        both = reference(window), file(window)
        for begin in range(0, len(window), _ROWS):
            rows = slice(begin, begin + _ROWS)
            log_p, log_q = (log_softmax(logits[rows]) for logits in both)
            divergences.append(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1, dtype=np.float64))
            same += int(np.sum(log_p.argmax(-1) == log_q.argmax(-1)))
            targets = window[begin + 1 : begin + 1 + _ROWS]
            at = np.arange(len(targets)), targets
            losses -= [log_p[at].sum(dtype=np.float64), log_q[at].sum(dtype=np.float64)]
        advance(1 / len(windows))
    kl = np.concatenate(divergences)
    scored = len(kl) - len(windows)  # the last token of a window has no successor
    expected, got = (math.exp(min(loss / scored, 700.0)) for loss in losses)
    return CheckResult(
        perplexity=got,
        reference_perplexity=expected,
        mean_kl=float(np.mean(np.maximum(kl, 0.0))),  # rounding may leave -1e-9
        max_kl=float(kl.max()),
        same_top_1=same / len(kl),
        tokens=len(kl),
        limit=limit,
    )
