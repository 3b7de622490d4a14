"""A model file as a model of EleutherAI's lm-evaluation-harness, in any mode of the engine.

Registered there as ``turbosparse``. Log-likelihoods are computed request by request, in an order that lets
neighbours share the beginning of their texts, which then costs nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from turbosparse.errors import ConfigError, TokenizerError
from turbosparse.runtime.engine import Model, load
from turbosparse.runtime.sampling import SamplingConfig

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from turbosparse._native import Choose, Mode

__all__ = ["EngineHarnessModel"]

_MAX_NEW_TOKENS = 256
_LOGIT_ROWS = 128  # logits of so many tokens are in memory at a time


@register_model("turbosparse")
class EngineHarnessModel(TemplateLM):
    """A loaded model file, as lm-evaluation-harness wants it.

    Parameters
    ----------
    path : str or Model
        A GGUF file, or one that is loaded.
    mode : str, optional
        Mode of the engine; by default the model's.
    threads : int, optional
        Threads that compute; by default physical cores.
    context : int, optional
        Tokens that a request may have; longer ones lose their beginning.
    batch_size, max_batch_size, device : optional
        Ignored: the harness hands them to every model.
    advance : callable, optional
        Told how many requests are done.
    """

    choose: "Choose | None" = None
    """In mode predicted, what takes the place of predictors (see `Session.forward`); no text is made then."""

    def __init__(
        self,
        path: str | Model,
        *,
        mode: "Mode | None" = None,
        threads: int | None = None,
        context: int | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
        advance: Callable[[float], None] = lambda requests: None,
    ) -> None:
        del batch_size, max_batch_size, device
        super().__init__()
        self.model = path if isinstance(path, Model) else load(path, threads=threads, context=context)
        self.mode = mode or self.model.default_mode
        self._advance = advance
        self._session = self.model.engine.session(self.model.context)
        self._known: list[int] = []  # tokens in the session

    @property
    def eot_token_id(self) -> int:
        """End of a text."""
        tokenizer = self.model.tokenizer
        token = tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id
        if token is None:
            raise TokenizerError("[tokenizer] expected a token that ends or begins a text, got none")
        return int(token)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        tokenizer = self.model.tokenizer
        return int(self.eot_token_id if tokenizer.bos_id is None else tokenizer.bos_id)

    @property
    def tokenizer_name(self) -> str:
        """What cached requests are told apart by."""
        return str(self.model.metadata.get("general.name", self.model.info.architecture))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Tokenize a text; control tokens in it count, as in prompts that a chat template made."""
        tokenizer = self.model.tokenizer
        add = tokenizer.add_bos if add_special_tokens is None else add_special_tokens
        ids = tokenizer.encode(string, add_special=add, parse_special=True)
        doubled = add and len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id
        return ids[1:] if doubled else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation with the model's own template."""
        template = self.model.chat_template
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        longest = self.model.context + 1
        rows = [(context + continuation)[-longest:] for _, context, continuation in requests]
        for index in sorted(range(len(rows)), key=lambda i: rows[i]):
            scored = min(len(requests[index][2]), len(rows[index]) - 1)
            found[index] = self._score(rows[index], scored)
            self._advance(1)
        return [found[index] for index in range(len(rows))]

    def _score(self, ids: list[int], scored: int) -> tuple[float, bool]:
        """Log-probability of the last `scored` tokens, and whether each was the likeliest."""
        first = len(ids) - scored - 1  # the token whose logits predict the first scored one
        shared = min(_shared_prefix(self._known[: self._session.position], ids), first)
        self._session.truncate(shared)
        self._known = ids[:-1]
        if first > shared:
            self._forward(ids[shared:first], "none")
        total, greedy = 0.0, True
        for begin in range(first, len(ids) - 1, _LOGIT_ROWS):
            end = min(begin + _LOGIT_ROWS, len(ids) - 1)
            logits = self._forward(ids[begin:end], "all")
            expected = np.asarray(ids[begin + 1 : end + 1])
            chosen = logits[np.arange(end - begin), expected]
            total += float((chosen - _log_sum_exp(logits)).sum())
            greedy = greedy and bool((logits.argmax(axis=-1) == expected).all())
        return total, greedy

    def _forward(self, ids: list[int], logits: Any) -> NDArray[np.float32]:
        tokens = np.asarray(ids, dtype=np.int32)
        return self._session.forward(tokens, mode=self.mode, logits=logits, choose=self.choose)

    def loglikelihood_rolling(
        self, requests: "Iterable[Instance]", disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context that do not overlap."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.model.context,
                context_len=1,
            )
            scores = [
                self._score(context + continuation, len(continuation))
                for context, continuation in map(make_disjoint_window, windows)
            ]
            totals.append(sum(score for score, _ in scores))
            self._advance(1)
        return totals

    def generate_until(self, requests: "Iterable[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Continue texts until one of their stop texts."""
        if self.choose is not None:
            raise ConfigError("[tasks] expected tasks with given answers, got one that generates text")
        answers = []
        for request in requests:
            context, settings = request.args
            ids, limit = self.tok_encode(context), self.model.context
            new = min(int(settings.get("max_gen_toks", _MAX_NEW_TOKENS)), limit - 1)
            generation = self.model.generate(
                ids[-(limit - new) :], max_tokens=new, mode=self.mode, sampling=_sampling(settings)
            )
            answers.append("".join(generation))
            self._advance(1)
        return answers


def _shared_prefix(known: Sequence[int], ids: Sequence[int]) -> int:
    pairs = enumerate(zip(known, ids, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(known), len(ids)))


def _log_sum_exp(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    peak = logits.max(axis=-1)
    total = np.exp(logits - peak[:, None]).sum(axis=-1, dtype=np.float64)
    logs: NDArray[np.float64] = np.log(total) + peak
    return logs


def _sampling(settings: Mapping[str, Any]) -> SamplingConfig:
    """Translate a task's generation settings; tasks that do not sample are answered greedily."""
    until = settings.get("until") or []
    stop = [until] if isinstance(until, str) else [text for text in until if text]
    temperature = float(settings.get("temperature") or 0.0)
    if not settings.get("do_sample", temperature > 0):
        temperature = 0.0
    return SamplingConfig(
        temperature=temperature,
        top_k=int(settings.get("top_k") or 0),
        top_p=float(settings.get("top_p") or 1.0),
        seed=int(settings.get("seed") or 0),
        stop=stop,
    )
