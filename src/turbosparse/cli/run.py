"""Answer one prompt: the text is written as it comes, timings follow on stderr.

The prompt is an option, a file, or what is piped in. A model with a chat template answers it as a user's
message; --raw lets any model continue the text instead. Greedy by default: the same text every time.

  turbosparse run model.gguf -p "Why is the sky blue?"
  turbosparse run model.gguf --raw -p "def fibonacci(n):" -n 64
  turbosparse run model.gguf -f question.txt --temp 0.8 --top-p 0.95 --seed 1
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from turbosparse.cli.answers import stats_record, timings, write_stream
from turbosparse.cli.console import add_json_option, print_json
from turbosparse.cli.model_options import (
    add_model_options,
    add_sampling_options,
    check_modes,
    describe,
    open_model,
    read_text,
    sampling_config,
)
from turbosparse.errors import ConfigError, ContextLengthError, TextError

if TYPE_CHECKING:
    from turbosparse.runtime.engine import Model, Prompt

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
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; default: standard input")
    source.add_argument("-f", "--file", type=Path, metavar="FILE", help="read the prompt from a file")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--chat", action="store_true", help="answer the prompt as a user's message")
    kind.add_argument("--raw", action="store_true", help="continue the prompt as plain text")
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    parser.add_argument(
        "-n", "--max-tokens", type=int, default=256, metavar="N", help="tokens at most (default: 256)"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of prompt and answer (default: at most 4096)"
    )
    parser.add_argument("--truncate", action="store_true", help="drop the oldest tokens of too long a prompt")
    add_sampling_options(parser, SamplingConfig())
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Answer one prompt.

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
    if args.raw and args.system:
        raise ConfigError("[--system] expected a chat, got --raw beside it")
    text = _prompt(args)
    check_modes(args.model, args.mode)
    began = time.perf_counter()
    model = open_model(args, context=args.context)
    cache = model.new_cache()  # takes its share of a memory budget, which `describe` tells
    load_s = time.perf_counter() - began
    sys.stderr.write(describe(model, args.mode) + "\n")
    try:
        answer = model.generate(
            _as_asked(model, text, args),
            max_tokens=args.max_tokens,
            mode=args.mode,
            sampling=sampling,
            truncate=args.truncate,
            cache=cache,
        )
    except ContextLengthError as error:
        trained = model.info.context_length
        more = f"; --context N makes room, up to {trained}" if model.context < trained else ""
        raise ContextLengthError(f"{error}; --truncate drops the oldest{more}") from None
    written: list[str] = []
    status = 0
    try:
        write_stream(answer, written)
    except KeyboardInterrupt:  # what was written still has its timings
        status = 130
    sys.stdout.write("\n")
    sys.stdout.flush()
    sys.stderr.write(f"load {load_s:.2f} s | {timings(answer.stats)}\n")
    if args.json:
        print_json({"text": "".join(written), "load_s": load_s, **stats_record(answer.stats)})
    return status


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        text: str = args.prompt
    elif args.file is not None:
        text = read_text(args.file).removesuffix("\n")  # which editors and echo add
    else:
        if sys.stdin.isatty():
            sys.stderr.write("type the prompt, then Ctrl-D\n")
        text = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    if not text.strip():
        raise TextError("[prompt] expected text, got none (give -p TEXT, -f FILE or pipe it in)")
    return text


def _as_asked(model: "Model", text: str, args: argparse.Namespace) -> "Prompt":
    if args.raw or not (args.chat or args.system or model.has_chat_template):
        return text
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [*system, {"role": "user", "content": text}]
