"""A conversation in the terminal: its messages, its commands, and what happens when the context is full."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from turbosparse.cli.answers import timings, write_stream
from turbosparse.errors import ContextLengthError, TurboSparseError

if TYPE_CHECKING:
    from turbosparse._native import Mode
    from turbosparse.runtime.engine import Model
    from turbosparse.runtime.sampling import SamplingConfig

__all__ = ["Conversation"]

HELP = """\
/reset         forget the conversation
/system TEXT   set the system message and forget the conversation; without TEXT: the model's own
/mode NAME     dense, exact, threshold or predicted, as the file can
/save FILE     write the conversation as JSON
/help          this list
/quit          leave (also Ctrl-D)
Ctrl-C stops an answer."""


class Conversation:
    """The messages so far and what the commands change.

    Parameters
    ----------
    model : Model
        Who answers.
    sampling : SamplingConfig
        How it chooses tokens.
    max_tokens : int
        Tokens per answer at most.
    mode : {"dense", "exact", "threshold", "predicted"} or None
        How neurons are skipped; None leaves it to the model.
    system : str
        System message; empty for the model's own.

    Raises
    ------
    TokenizerError
        If the model was not made for chat.
    """

    def __init__(
        self,
        model: "Model",
        sampling: "SamplingConfig",
        *,
        max_tokens: int,
        mode: "Mode | None",
        system: str,
    ) -> None:
        model.chat_template  # noqa: B018 -- fails here and not after the first message
        self.has_ended = False
        self._model = model
        self._cache = model.new_cache()
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._mode = mode
        self._system(system)

    def answer(self, text: str) -> None:
        """Stream an answer; a message that cannot be answered is taken back.

        Parameters
        ----------
        text : str
            The user's message.
        """
        self._messages.append({"role": "user", "content": text})
        written: list[str] = []
        try:
            self._forget_oldest()
            answer = self._model.generate(
                self._messages,
                max_tokens=self._max_tokens,
                mode=self._mode,
                sampling=self._sampling,
                cache=self._cache,
            )
            try:
                write_stream(answer, written)
            except KeyboardInterrupt:
                sys.stdout.write(" [stopped]")
        except TurboSparseError as error:
            self._messages.pop()
            sys.stderr.write(f"error: {error}\n")
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._messages.append({"role": "assistant", "content": "".join(written)})
        note = timings(answer.stats)
        sys.stderr.write(f"\x1b[2m{note}\x1b[0m\n" if sys.stderr.isatty() else f"{note}\n")

    def command(self, line: str) -> None:
        """Run a command.

        Parameters
        ----------
        line : str
            Begins with a slash.
        """
        name, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._say(HELP),
            "/reset": lambda _: self._system(self._system_text),
            "/system": self._system,
            "/mode": self._set_mode,
            "/save": self._save,
            "/quit": self._quit,
            "/exit": self._quit,
        }
        if name not in commands:
            self._say(f"unknown command {name}; /help lists them")
            return
        commands[name](rest.strip())

    def _say(self, text: str) -> None:
        sys.stderr.write(text + "\n")

    def _system(self, text: str) -> None:
        self._system_text = text
        self._messages: list[dict[str, str]] = [{"role": "system", "content": text}] if text else []

    def _set_mode(self, name: str) -> None:
        modes = self._model.info.modes
        chosen = next((mode for mode in modes if mode == name), None)
        if chosen is None:
            self._say(f"this file can run {', '.join(modes)}; now {self._mode or self._model.default_mode}")
        else:
            self._mode = chosen

    def _save(self, name: str) -> None:
        if not name:
            self._say("expected a file name: /save FILE")
            return
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                json.dump(self._messages, file, ensure_ascii=False, indent=1)
        except OSError as error:
            self._say(f"[{name}] {error.strerror}")
        else:
            self._say(f"{len(self._messages)} messages in {name}")

    def _quit(self, _: str) -> None:
        self.has_ended = True

    def _forget_oldest(self) -> None:
        """Drop whole turns from the front until a quarter of the context is free for the answer."""
        limit = self._model.context - min(self._max_tokens, self._model.context // 4)
        first = 1 if self._system_text else 0
        dropped = 0
        while len(self._model.prompt_ids(self._messages)) > limit and len(self._messages) - first > 1:
            del self._messages[first : first + 2]
            dropped += 2
        if dropped:
            self._say(f"the context is full: forgot the oldest {dropped} messages")
        tokens = len(self._model.prompt_ids(self._messages))
        if tokens > limit:
            raise ContextLengthError(f"[message] expected at most {limit} tokens, got {tokens}")
