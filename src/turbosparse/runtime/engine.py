"""A loaded model: generate, logits, perplexity. This is the library's front door.

The engine itself is native code; here stands what surrounds it: the tokenizer, the chat template, sampling,
and a cache that keeps the last conversation, so that its next turn costs only its own tokens.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from turbosparse import _native
from turbosparse.errors import ConfigError, ContextLengthError, TextError
from turbosparse.runtime import perplexity as _perplexity
from turbosparse.runtime.chat_template import ChatTemplate, Message
from turbosparse.runtime.cpus import check_threads
from turbosparse.runtime.generation import Generation
from turbosparse.runtime.prefix_cache import PrefixCache, token_array
from turbosparse.runtime.sampling import Sampler, SamplingConfig
from turbosparse.tokenizer import Tokenizer

if TYPE_CHECKING:
    from turbosparse._native import Mode, ModelInfo

__all__ = ["DEFAULT_CONTEXT", "Model", "Prompt", "default_context", "load", "preferred_mode"]

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT = 4096  # tokens, where the model was trained for as many
Prompt = str | Sequence[int] | Sequence[Message]
Transcode = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"]

_MODES_BY_PREFERENCE: tuple["Mode", ...] = ("predicted", "exact", "threshold", "dense")


def load(
    path: str | PathLike[str],
    *,
    threads: int | None = None,
    context: int | None = None,
    isa: str | None = None,
    transcode: Transcode = "Q8_0",
    memory_budget: int | None = None,
    io: str | None = None,
    kv_cache: str | None = None,
) -> "Model":
    """Open a model file.

    Parameters
    ----------
    path : str or path
        A GGUF file.
    threads : int, optional
        Threads that compute, 1 to the CPUs of this process; by default the physical cores, at most 8.
    context : int, optional
        Tokens that a prompt and its answer may have together; by default what the model was trained for, at
        most 4096.
    isa : str, optional
        Instruction set, one of `turbosparse._native.available_isas`; by default the best.
    transcode : {"F32", "F16", "BF16", "Q8_0", "Q4_0"}
        What weights become whose type has no native kernel.
    memory_budget : int, optional
        Bytes that the engine may hold, all in: weights, KV cache, scratch memory, neurons. Neurons of a file
        with bundles that do not fit are read when a token needs them. By default there is no limit. What
        Python itself takes, some 60 MB, is not counted.
    io : {"io_uring", "pread", "mmap"}, optional
        How they are read; by default the best that works here.
    kv_cache : {"f16", "q8_0", "f32"}, optional
        What keys and values of earlier tokens are kept as. q8_0 is 8-bit integers with a scale for every 32:
        half the memory, and faster at long contexts, for a small loss. By default f16, or f32 where the
        weights are F32.

    Returns
    -------
    Model
        Ready to run.

    Raises
    ------
    ModelFileError
        If the file is broken or holds something that cannot run.
    ConfigError
        If a setting is out of its range, or the budget too small.
    """
    count = check_threads(threads)
    metadata = _native.GgufFile(fspath(path)).metadata
    engine = _native.Model(
        fspath(path),
        threads=count,
        isa=isa or "",
        transcode=transcode,
        memory_budget=memory_budget or 0,
        context=context or default_context(metadata),
        io=io or "",
        kv_cache=kv_cache or "",
    )
    for source, target in engine.info.transcoded.items():
        logger.info("%s: %s has no native kernel; transcoded to %s while loading", path, source, target)
    if engine.info.memory and engine.info.memory["io_note"]:
        logger.warning("%s: %s", path, engine.info.memory["io_note"])
    return Model(engine, metadata, context=context)


def preferred_mode(modes: "Sequence[Mode]") -> "Mode":
    """Choose the mode that runs where none is asked for.

    Parameters
    ----------
    modes : sequence of {"dense", "exact", "threshold", "predicted"}
        What the file can run.

    Returns
    -------
    {"dense", "exact", "threshold", "predicted"}
        The first of predicted, exact, threshold, dense.
    """
    return next(mode for mode in _MODES_BY_PREFERENCE if mode in modes)


def default_context(metadata: Mapping[str, Any]) -> int:
    """Choose a context.

    Parameters
    ----------
    metadata : Mapping[str, Any]
        A model file's keys and values.

    Returns
    -------
    int
        Tokens that the model was trained for, at most 4096.
    """
    trained = metadata.get(f"{metadata.get('general.architecture')}.context_length", DEFAULT_CONTEXT)
    return min(trained, DEFAULT_CONTEXT) if isinstance(trained, int) else DEFAULT_CONTEXT


class Model:
    """A model that is ready to run; made by `load`.

    Parameters
    ----------
    engine : turbosparse._native.Model
        Weights and threads.
    metadata : Mapping[str, Any]
        The file's keys and values.
    context : int, optional
        Tokens that a prompt and its answer may have together.

    Raises
    ------
    ConfigError
        If the context is beyond what the model was trained for.
    """

    def __init__(
        self, engine: "_native.Model", metadata: Mapping[str, Any], *, context: int | None = None
    ) -> None:
        trained = engine.info.context_length
        self.context = min(trained, DEFAULT_CONTEXT) if context is None else context
        if not 1 <= self.context <= trained:
            raise ConfigError(
                f"[context] expected 1 to {trained} tokens, as the model was trained, got {context}"
            )
        self.engine = engine
        self.metadata = metadata

    @property
    def info(self) -> "ModelInfo":
        """Give the shape of the model.

        Returns
        -------
        turbosparse._native.ModelInfo
            Sizes, weight types and modes.
        """
        return self.engine.info

    @property
    def default_mode(self) -> "Mode":
        """Name the mode that runs where none is asked for.

        Returns
        -------
        {"dense", "exact", "threshold", "predicted"}
            predicted where the file has predictors, since it was made for that; else exact where the file
            can, which loses nothing; else threshold where the file was calibrated; else dense.
        """
        return preferred_mode(self.info.modes)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Build the file's tokenizer.

        Returns
        -------
        Tokenizer
            Built when first needed; raises TokenizerError where the file has none.
        """
        return Tokenizer.from_metadata(self.metadata)

    @property
    def has_chat_template(self) -> bool:
        """Say whether the model was tuned to answer, rather than to go on with a text.

        Returns
        -------
        bool
            Whether the file has a chat template of its own.
        """
        return "tokenizer.chat_template" in self.metadata

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Compile the file's chat template.

        Returns
        -------
        ChatTemplate
            Compiled when first needed; raises TokenizerError where the file has none.
        """
        return ChatTemplate.from_metadata(self.metadata, self.tokenizer)

    @cached_property
    def _cache(self) -> PrefixCache:
        return self.new_cache()

    def new_cache(self) -> PrefixCache:
        """Make a KV cache of its own, for a conversation beside the model's own.

        Returns
        -------
        PrefixCache
            Empty, of the model's context.
        """
        return PrefixCache(self.engine, self.context)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        mode: "Mode | None" = None,
        sampling: SamplingConfig | None = None,
        chat: bool = False,
        truncate: bool = False,
        cache: PrefixCache | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Generation:
        """Begin an answer.

        Parameters
        ----------
        prompt : str, sequence of int, or sequence of Message
            A text to continue, in which control tokens count; token ids; or a conversation to answer, each
            message with a role and a content.
        max_tokens : int
            At most so many tokens are written, 1 or more.
        mode : {"dense", "exact", "threshold", "predicted"}, optional
            How the feed-forward layers are computed; by default `default_mode`.
        sampling : SamplingConfig, optional
            How tokens are chosen; by default greedily.
        chat : bool
            Answer the text as a user's message instead of continuing it.
        truncate : bool
            Forget the oldest tokens of a prompt that is too long, instead of raising.
        cache : PrefixCache, optional
            Where the conversation lives; by default the model's own, for one generation at a time.
        should_stop : callable, optional
            Asked between tokens; True ends the answer.

        Returns
        -------
        Generation
            An iterator of text pieces with ``stats``; work begins with the first piece.

        Raises
        ------
        ContextLengthError
            If the prompt is longer than the context.
        TextError
            If the prompt is empty.
        ConfigError
            If a setting is out of its range.
        TokenizerError
            If the file has no tokenizer, or no chat template where one is needed.
        ModelFileError
            If the file cannot run in this mode; raised with the first piece.
        """
        if max_tokens < 1:
            raise ConfigError(f"[max_tokens] expected 1 or more, got {max_tokens}")
        cache = cache if cache is not None else self._cache
        ids = self._fit(self.prompt_ids(prompt, chat=chat), max_tokens, truncate=truncate)
        return Generation(
            cache,
            ids,
            tokenizer=self.tokenizer,
            sampler=Sampler(sampling or SamplingConfig()),
            mode=mode or self.default_mode,
            max_tokens=max_tokens,
            should_stop=should_stop,
        )

    def prompt_ids(self, prompt: Prompt, *, chat: bool = False) -> list[int]:
        """Turn a prompt into the tokens that the model will read.

        Parameters
        ----------
        prompt : str, sequence of int, or sequence of Message
            As for `generate`.
        chat : bool
            Take a text as a user's message.

        Returns
        -------
        list of int
            Token ids.
        """
        if isinstance(prompt, str):
            if not chat:
                return self.tokenizer.encode(prompt, parse_special=True)
            prompt = [{"role": "user", "content": prompt}]
        messages = [item for item in prompt if isinstance(item, Mapping)]
        if not messages:
            return [int(item) for item in prompt if not isinstance(item, Mapping)]
        text = self.chat_template.render(messages)
        return self.tokenizer.encode(text, add_special=False, parse_special=True)

    def logits(self, ids: Sequence[int], *, mode: "Mode | None" = None) -> NDArray[np.float32]:
        """Compute the logits of every position.

        Parameters
        ----------
        ids : sequence of int
            At least one token, at most the context.
        mode : {"dense", "exact", "threshold", "predicted"}, optional
            How the feed-forward layers are computed; by default `default_mode`.

        Returns
        -------
        ndarray of float32, shape (T, V)
            Row t predicts token t + 1.

        Raises
        ------
        ContextLengthError
            If there are more ids than the context has room for.
        ConfigError
            If there is none, or one outside the vocabulary.
        ModelFileError
            If the file cannot run in this mode.
        """
        if len(ids) > self.context:
            raise ContextLengthError(f"[ids] expected at most {self.context} tokens, got {len(ids)}")
        session = self.engine.session(max(len(ids), 1))
        return session.forward(token_array(ids), mode=mode or self.default_mode, logits="all")

    def text_ids(self, text: str) -> list[int]:
        """Turn a text to be measured into tokens: no control tokens are read in it.

        Parameters
        ----------
        text : str
            Not empty.

        Returns
        -------
        list of int
            Token ids, beginning as the model wants it.

        Raises
        ------
        TextError
            If the text is empty.
        """
        if not text.strip():
            raise TextError("[text] expected text, got nothing but white space")
        return self.tokenizer.encode(text)

    def perplexity(
        self,
        text: str,
        *,
        mode: "Mode | None" = None,
        context: int = 512,
        advance: Callable[[float], None] = lambda tokens: None,
    ) -> _perplexity.PerplexityResult:
        """Measure how well a mode predicts a text.

        Parameters
        ----------
        text : str
            A text that the model should not have been calibrated on.
        mode : {"dense", "exact", "threshold", "predicted"}, optional
            How the feed-forward layers are computed; by default `default_mode`.
        context : int
            Tokens per window; see `turbosparse.runtime.perplexity`.
        advance : callable, optional
            Told how many tokens are done.

        Returns
        -------
        PerplexityResult
            Perplexity, its standard error and the active ratio.
        """
        return _perplexity.perplexity(
            self.engine,
            self.text_ids(text),
            mode=mode or self.default_mode,
            context=context,
            bos_id=self.window_bos_id,
            advance=advance,
        )

    @property
    def window_bos_id(self) -> int | None:
        """Give the token that every window of a measured text begins with.

        Returns
        -------
        int or None
            The begin of sequence id where the file asks for one.
        """
        return self.tokenizer.bos_id if self.tokenizer.add_bos else None

    def _fit(self, ids: list[int], max_tokens: int, *, truncate: bool) -> list[int]:
        if not ids:
            raise TextError("[prompt] expected at least one token, got an empty prompt")
        if len(ids) <= self.context:
            return ids
        if not truncate:
            raise ContextLengthError(
                f"[prompt] expected at most {self.context} tokens (the context), got {len(ids)}"
            )
        room = self.context - min(max_tokens, self.context // 4)
        first = ids[:1] if self.tokenizer.add_bos and ids[0] == self.tokenizer.bos_id else []
        logger.warning("the prompt has %d tokens; only the last %d are used", len(ids), room)
        return first + ids[len(ids) - room + len(first) :]
