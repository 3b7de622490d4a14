"""From logits to the next token.

The order is fixed, and it is llama.cpp's: logit bias, repetition penalty, top-k, top-p, min-p, temperature,
draw. The filters therefore read the model's own distribution, and the temperature only shifts weight among
survivors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import ConfigError, EngineError

__all__ = ["Sampler", "SamplingConfig"]

_FIRST_GUESS = 1024  # candidates looked at for top-p before the whole vocabulary is sorted


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen; the default is greedy and so the same every time.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    temperature: float = 0.0  # >= 0; 0 takes the likeliest token and ignores the filters
    top_k: int = 0  # >= 0 tokens kept; 0 keeps all
    top_p: float = 1.0  # (0, 1]: keep the fewest likeliest tokens whose probabilities sum to this
    min_p: float = 0.0  # [0, 1]: keep tokens at least this likely relative to the likeliest
    repetition_penalty: float = (
        1.0  # > 0: divides positive logits of recent tokens and multiplies negative ones
    )
    repetition_window: int = 64  # >= 0 tokens, prompt included, that count as recent
    seed: int | None = None  # >= 0; None draws one from the operating system
    stop: Sequence[str] = ()  # texts that end the generation and are not part of it
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))  # added; -inf bans

    def __post_init__(self) -> None:
        checks: list[tuple[str, bool, str]] = [
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("repetition_window", self.repetition_window >= 0, "0 or more"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
            (
                "stop",
                not isinstance(self.stop, str) and all(self.stop),
                "a sequence of texts that are not empty",
            ),
            (
                "logit_bias",
                all(bias < math.inf for bias in self.logit_bias.values()),
                "token ids to finite numbers",
            ),
        ]
        for name, is_valid, range_text in checks:
            if not is_valid:
                raise ConfigError(f"[sampling.{name}] expected {range_text}, got {getattr(self, name)!r}")
        object.__setattr__(self, "stop", tuple(self.stop))


class Sampler:
    """Chooses tokens; holds its random state and nothing else.

    Parameters
    ----------
    config : SamplingConfig
        What to do.
    rng : numpy.random.Generator, optional
        Where the draws come from; by default one seeded with ``config.seed``.
    """

    def __init__(self, config: SamplingConfig, rng: np.random.Generator | None = None) -> None:
        self.config = config
        self._rng = rng if rng is not None else np.random.default_rng(config.seed)

    def sample(self, logits: NDArray[np.float32], recent: Sequence[int] = ()) -> int:
        """Choose the next token.

        Parameters
        ----------
        logits : ndarray of float32, shape (V,)
            Unnormalised log probabilities; left as they are.
        recent : sequence of int
            Ids so far, the newest last, for the repetition penalty.

        Returns
        -------
        int
            An id below V; of equals the lowest.

        Raises
        ------
        ConfigError
            If the logit bias names an id outside the vocabulary.
        EngineError
            If no token has a finite logit.
        """
        config = self.config
        logits = self._adjusted(logits, recent)
        best = int(np.argmax(logits))
        if not np.isfinite(logits[best]):
            raise EngineError("[sampling] expected a token with a finite logit, got none")
        if config.temperature == 0:
            return best
        ids, kept = _likeliest(logits, config)
        if config.min_p > 0:
            floor = kept[0] + math.log(config.min_p)
            count = int(np.searchsorted(-kept, -floor, side="right"))
            ids, kept = ids[:count], kept[:count]
        weights = np.exp((kept - kept[0]) / config.temperature)
        cumulative = np.cumsum(weights)
        drawn = int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right"))
        return int(ids[min(drawn, len(ids) - 1)])

    def _adjusted(self, logits: NDArray[np.float32], recent: Sequence[int]) -> NDArray[np.float32]:
        config = self.config
        penalty, window = config.repetition_penalty, config.repetition_window
        if not config.logit_bias and (penalty == 1 or not window):
            return logits
        logits = logits.copy()
        for token, bias in config.logit_bias.items():
            if not 0 <= token < len(logits):
                raise ConfigError(f"[sampling.logit_bias] expected ids below {len(logits)}, got {token}")
            logits[token] += bias
        if penalty != 1 and window:
            seen = np.unique(np.asarray(recent[-window:], dtype=np.int64))
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        return logits


def _likeliest(
    logits: NDArray[np.float32], config: SamplingConfig
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids and logits that survive top-k and top-p, likeliest first, lower id first among equals."""
    if config.top_k:
        ids = _top(logits, config.top_k)
        total = np.exp(logits[ids].astype(np.float64) - logits[ids[0]]).sum()
    elif config.top_p < 1:
        total = np.exp(logits.astype(np.float64) - logits.max()).sum()
        ids = _top(logits, _FIRST_GUESS)
        if np.exp(logits[ids].astype(np.float64) - logits[ids[0]]).sum() < config.top_p * total:
            ids = _top(logits, len(logits))
    else:
        ids = _top(logits, len(logits))
        total = math.inf
    kept = logits[ids].astype(np.float64)
    if config.top_p < 1:
        cumulative = np.cumsum(np.exp(kept - kept[0]))
        count = int(np.searchsorted(cumulative, config.top_p * total)) + 1
        ids, kept = ids[:count], kept[:count]
    return ids, kept


def _top(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    if count >= len(logits):
        candidates = np.arange(len(logits))
    else:
        smallest = np.partition(logits, len(logits) - count)[len(logits) - count]
        candidates = np.flatnonzero(logits >= smallest)
    return candidates[np.argsort(-logits[candidates], kind="stable")][:count]
