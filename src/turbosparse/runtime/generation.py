"""One answer while it is written: an iterator of text pieces, with its ids and its statistics."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from turbosparse.errors import EngineError
from turbosparse.runtime.prefix_cache import PrefixCache
from turbosparse.runtime.sampling import Sampler
from turbosparse.tokenizer import Tokenizer

if TYPE_CHECKING:
    from turbosparse._native import Mode

__all__ = ["FinishReason", "Generation", "GenerationStats", "StopMatcher"]

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(kw_only=True)
class GenerationStats:
    """What an answer cost; complete when the iterator has ended."""

    mode: "Mode"
    prompt_tokens: int = 0  # tokens of the prompt, reused ones included
    reused_tokens: int = 0  # tokens whose keys and values were still in the cache
    prompt_s: float = 0.0  # seconds until the first logits
    tokens: int = 0  # tokens written, the one that ended the answer not included
    decode_steps: int = 0  # tokens computed one at a time: the first comes from the prompt's logits
    decode_s: float = 0.0  # seconds of these steps, sampling included, the caller's own time not
    active_ratio: float | None = None  # share of FFN neurons used by the decode steps; None without any
    bytes_per_token: float | None = None  # weights and KV cache read per decode step
    finish_reason: FinishReason | None = None  # None while it runs
    ids: list[int] = field(default_factory=list)  # tokens written

    @property
    def prompt_tok_per_s(self) -> float | None:
        """Give the speed of the prompt.

        Returns
        -------
        float or None
            Computed tokens per second.
        """
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_s if self.prompt_s else None

    @property
    def decode_tok_per_s(self) -> float | None:
        """Give the speed of the answer.

        Returns
        -------
        float or None
            Tokens per second; None for an answer of one token.
        """
        return self.decode_steps / self.decode_s if self.decode_steps and self.decode_s else None


class StopMatcher:
    """Cuts a stream of text at the first stop string, which may arrive in parts.

    Parameters
    ----------
    stops : sequence of str
        Texts that end the stream; none may be empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Take text and hold back what may become a stop string.

        Parameters
        ----------
        text : str
            The next piece.

        Returns
        -------
        str
            Text that is certainly before any stop string.
        """
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.matched = True
            ready, self._held = self._held[: min(found)], ""
            return ready
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready

    def finish(self) -> str:
        """End the stream.

        Returns
        -------
        str
            What was held back.
        """
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text with which `stop` begins."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class Generation:
    """An answer being written: iterate over it for pieces of text, or call `read` for all of it.

    Closing it, or leaving the loop and dropping it, stops the work. Ctrl-C raises KeyboardInterrupt out of
    the loop; the model can be used again at once.

    Parameters
    ----------
    cache : PrefixCache
        Where the tokens live.
    ids : sequence of int
        The prompt.
    tokenizer : Tokenizer
        For the text and the tokens that end an answer.
    sampler : Sampler
        Chooses the tokens.
    mode : {"dense", "exact", "threshold", "predicted"}
        How the feed-forward layers are computed.
    max_tokens : int
        At most so many tokens are written.
    should_stop : callable, optional
        Asked before each token and between chunks of a long prompt; True ends the answer.
    """

    def __init__(
        self,
        cache: PrefixCache,
        ids: Sequence[int],
        *,
        tokenizer: Tokenizer,
        sampler: Sampler,
        mode: "Mode",
        max_tokens: int,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        self.stats = GenerationStats(mode=mode, prompt_tokens=len(ids))
        self._cache = cache
        self._prompt = list(ids)
        self._tokenizer = tokenizer
        self._sampler = sampler
        self._max_tokens = max_tokens
        self._should_stop = should_stop
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def read(self) -> str:
        """Write the whole answer.

        Returns
        -------
        str
            What is left of it.
        """
        return "".join(self)

    def close(self) -> None:
        """Stop writing."""
        self._pieces.close()

    def _run(self) -> Generator[str, None, None]:
        stats, cache = self.stats, self._cache
        stream, stops = self._tokenizer.stream(), StopMatcher(self._sampler.config.stop)
        try:
            began = time.perf_counter()
            cache.owner = self
            try:
                logits, stats.reused_tokens = cache.start(
                    self._prompt, mode=stats.mode, should_stop=self._should_stop
                )
            except EngineError:
                if self._should_stop is not None and self._should_stop():
                    return  # that is what interrupted the prompt
                raise
            stats.prompt_s = time.perf_counter() - began
            cache.reset_usage()
            while True:
                began = time.perf_counter()
                # A vocabulary is often padded beyond the last token that has a text.
                token = self._sampler.sample(logits[: self._tokenizer.vocab_size], self._prompt + stats.ids)
                stats.decode_s += time.perf_counter() - began
                if token in self._tokenizer.stop_ids:
                    stats.finish_reason = "stop"
                    break
                stats.ids.append(token)
                stats.tokens += 1
                if piece := stops.push(stream.push(token)):
                    yield piece
                if reason := self._reason_to_stop(stops):
                    stats.finish_reason = reason
                    break
                if cache.owner is not self:
                    raise EngineError(
                        "[generate] expected one answer at a time, got a second one on the same cache; "
                        "give it its own (Model.new_cache)"
                    )
                began = time.perf_counter()
                logits = cache.step(token)
                stats.decode_s += time.perf_counter() - began
                stats.decode_steps += 1
            if not stops.matched and (tail := stops.push(stream.finish()) + stops.finish()):
                yield tail
        finally:
            stats.finish_reason = stats.finish_reason or "interrupted"
            if cache.owner is self and stats.decode_steps:
                stats.active_ratio, stats.bytes_per_token = cache.usage()

    def _reason_to_stop(self, stops: StopMatcher) -> FinishReason | None:
        if stops.matched:
            return "stop"
        if self.stats.tokens >= self._max_tokens or self._cache.is_full:
            return "length"
        if self._should_stop is not None and self._should_stop():
            return "interrupted"
        return None
