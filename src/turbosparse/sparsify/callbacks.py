"""When to checkpoint, evaluate and stop: by time, by tokens and by signals."""

import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from turbosparse.sparsify.recipe import Recipe

__all__ = ["EndReachedError", "RunCallback"]

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class EndReachedError(Exception):
    """Everything is loaded from a checkpoint at the end of its stage; the Trainer would do one step more."""


class RunCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Decides at the end of each step what follows; all processes decide alike.

    Parameters
    ----------
    recipe : Recipe
        Intervals.
    step_tokens : int
        Tokens per optimizer step.
    evaluate : callable
        Called without arguments to evaluate.
    failed : callable
        Whether something other than the training failed, so that the run stops like at a signal.
    """

    def __init__(
        self, recipe: Recipe, step_tokens: int, *, evaluate: Callable[[], None], failed: Callable[[], bool]
    ) -> None:
        self.interrupted = False
        self._recipe = recipe
        self._step_tokens = step_tokens
        self._evaluate = evaluate
        self._failed = failed
        self._saved = time.monotonic()
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and take the signals over, unless there is nothing to train."""
        if state.global_step >= state.max_steps:
            raise EndReachedError
        self._saved = time.monotonic()
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        if state.global_step == 0:
            self._evaluate()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted and "TORCHELASTIC_RUN_ID" in os.environ:
            return  # torchrun passes on what the scheduler sent to every process
        if self.interrupted:  # a second one does not wait for the step
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.interrupted = True
        name = signal.Signals(number).name
        said = f"{name}: a checkpoint follows at the end of this step, then the run stops\n"
        with suppress(OSError):  # not by logging: the signal may have come amid a line of the log
            os.write(2, said.encode())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask the Trainer for a checkpoint or an end."""
        due = time.monotonic() - self._saved > self._recipe.checkpoint_minutes * 60
        self.interrupted, due = _any_process(self.interrupted or self._failed(), due)
        finished = state.global_step >= state.max_steps
        if due or finished or self.interrupted:
            control.should_save = True
            self._saved = time.monotonic()
        if self.interrupted:
            control.should_training_stop = True
        if finished or self._evaluation_due(state.global_step):
            self._evaluate()
        return control

    def _evaluation_due(self, step: int) -> bool:
        """Whether this step passed a multiple of the interval, however often the run was stopped."""
        interval = self._recipe.evaluate_tokens
        before, now = ((step - 1) * self._step_tokens, step * self._step_tokens)
        return interval > 0 and now // interval > before // interval

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signals back."""
        self.release()

    def release(self) -> None:
        """Give the signals back; harmless when called again."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write a line of progress."""
        logs: dict[str, float] = kwargs.get("logs") or {}
        if not state.is_world_process_zero or "loss" not in logs:
            return
        line = f"step {state.global_step}/{state.max_steps} loss {logs['loss']:.4f}"
        line += f" lr {logs['learning_rate']:.2e}"
        if "perplexity" in logs:
            line += f" perplexity {logs['perplexity']:.2f}"
        if "zeros" in logs:
            line += f" zeros {logs['zeros']:.1%}"
        speed = logs.get("tokens_per_second")
        if speed:
            seconds = (state.max_steps - state.global_step) * self._step_tokens / speed
            line += f" {speed:.0f} tok/s, {seconds / 3600:.1f} h left"
        _LOG.info("%s", line)


def _any_process(*flags: bool) -> tuple[bool, ...]:
    """Combine each flag over all processes by or."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flags
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    values = torch.tensor([int(flag) for flag in flags], device=device)
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return tuple(bool(value) for value in values.tolist())
