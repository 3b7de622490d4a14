"""Talk to a model in the terminal. /help lists the commands.

Ctrl-C stops an answer and not the program; Ctrl-D or /quit leaves. Where standard input is not a terminal,
each line is a message.

  turbosparse chat model.gguf
  turbosparse chat model.gguf --system "Answer in one sentence." --temp 0
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from turbosparse.cli.conversation import Conversation
from turbosparse.cli.model_options import (
    add_model_options,
    add_sampling_options,
    check_modes,
    describe,
    open_model,
    sampling_config,
)
from turbosparse.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Where they go.
    """
    from turbosparse.runtime.sampling import SamplingConfig

    add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "-n", "--max-tokens", type=int, default=1024, metavar="N", help="per answer (default: 1024)"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of the conversation (default: at most 4096)"
    )
    add_sampling_options(parser, SamplingConfig(temperature=0.7, top_k=40, top_p=0.95, min_p=0.05))


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed arguments.

    Returns
    -------
    int
        Exit status.
    """
    sampling = sampling_config(args)
    if args.max_tokens < 1:
        raise ConfigError(f"[max_tokens] expected 1 or more, got {args.max_tokens}")
    check_modes(args.model, args.mode)
    model = open_model(args, context=args.context)
    conversation = Conversation(
        model, sampling, max_tokens=args.max_tokens, mode=args.mode, system=args.system or ""
    )
    sys.stderr.write(describe(model, args.mode) + "\n/help lists the commands\n")
    read_line = _line_reader()
    while not conversation.has_ended:
        try:
            line = read_line()
        except EOFError:
            break
        if line.startswith("/"):
            conversation.command(line)
        elif line.strip():
            conversation.answer(line)
    return 0


def _line_reader() -> Callable[[], str]:
    """Line editing with history on a terminal, plain lines elsewhere; EOFError at the end."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _read_plain_line
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "turbosparse"
    history: History = InMemoryHistory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "chat_history").touch(mode=0o600)
        history = FileHistory(str(folder / "chat_history"))
    except OSError:
        sys.stderr.write(f"{folder} cannot be written: the history lasts until you leave\n")
    session: PromptSession[str] = PromptSession(history=history)

    def read() -> str:
        try:
            return session.prompt("> ")
        except KeyboardInterrupt:
            sys.stderr.write("Ctrl-D or /quit leaves\n")
            return ""

    return read


def _read_plain_line() -> str:
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode("utf-8").rstrip("\r\n")
