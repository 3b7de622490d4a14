"""The program ``turbosparse``: finds the verb, imports its module, turns errors into one line and a status.

Each verb is a module with ``add_arguments(parser)`` and ``run(args) -> int``; its docstring is its help text.
Only the one that is called is imported, so that ``turbosparse --help`` is instant. Status: 0 done, 1 a
check failed, 2 wrong input or usage, 130 Ctrl-C.
"""

import argparse
import difflib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol, cast

from turbosparse import __version__
from turbosparse.cli.console import set_up_logging
from turbosparse.errors import ConfigError, TextError, TurboSparseError

__all__ = ["VERBS", "main"]

PROGRAM = "turbosparse"

# Packages that the base install lacks, and the extra that brings them.
EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "accelerate", "datasets", "safetensors"), "train"),
    **dict.fromkeys(("tensorboard", "huggingface_hub", "tomli"), "train"),
    "lm_eval": "eval",
    "matplotlib": "report",
}

# What `turbosparse --help` lists: the verb, its module, one line of help.
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("turbosparse.cli.demo", "watch a small model run dense and sparse, side by side"),
    "run": ("turbosparse.cli.run", "answer one prompt"),
    "chat": ("turbosparse.cli.chat", "talk to a model in the terminal"),
    "sparsify": (
        "turbosparse.cli.sparsify",
        "replace the FFN activation and train the model back to quality",
    ),
    "train-control": (
        "turbosparse.cli.train_control",
        "train the unswapped model on the same tokens",
    ),
    "fit-predictor": (
        "turbosparse.cli.fit_predictor",
        "fit predictors of active neurons and score them",
    ),
    "export": ("turbosparse.cli.export", "turn a Hugging Face model into a model file"),
    "inspect": ("turbosparse.cli.inspect", "show what is in a model file"),
    "calibrate": (
        "turbosparse.cli.calibrate",
        "find the thresholds that meet an error target; write a sparse file",
    ),
    "measure": (
        "turbosparse.cli.measure",
        "measure sparsity of every kind and what it costs; write a report",
    ),
    "study": (
        "turbosparse.cli.study",
        "compare rules, activations, scales or swaps by one recipe; write a report",
    ),
    "perplexity": ("turbosparse.cli.perplexity", "measure how well a model predicts a text"),
    "eval": ("turbosparse.cli.eval", "ask it the questions of lm-evaluation-harness"),
    "bench": ("turbosparse.cli.bench", "measure speed: tokens, bytes and bandwidth per mode"),
}


class _Verb(Protocol):
    """What a verb's module offers."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> int: ...


class _Parser(argparse.ArgumentParser):
    """Wrong usage is one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see: {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write help; argparse would ignore that nobody reads it."""
        (file or sys.stderr).write(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default those of the process.

    Returns
    -------
    int
        Exit status: 0 done, 1 a check failed, 2 wrong input or usage, 130 interrupted, 141 the reader of our
        output went away.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    try:
        try:
            status = _dispatch(arguments)
        except SystemExit:  # of --help and --version
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        _abandon_stdout()
        return 141
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        return 130
    except (TurboSparseError, OSError, UnicodeDecodeError, MemoryError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and _package(error) not in EXTRAS:
            raise
        if debug:
            traceback.print_exc()
        print(f"{PROGRAM}: error: {_one_line(error)}", file=sys.stderr)  # noqa: T201 -- this is the edge
        try:
            sys.stdout.flush()
        except OSError:  # that was the error
            _abandon_stdout()
        return 2
    return status


def _abandon_stdout() -> None:
    """Let what is still buffered go nowhere: the interpreter flushes once more when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _terminate(signum: int, frame: object) -> NoReturn:
    """Leave through the `finally` blocks, so that half-written files are removed."""
    del frame
    sys.exit(128 + signum)


def _dispatch(arguments: list[str]) -> int:
    split = next((i for i, text in enumerate(arguments) if not text.startswith("-")), len(arguments))
    top = _top_parser()
    options = top.parse_args(arguments[:split])
    if split == len(arguments):
        top.print_help()
        return 0
    name = arguments[split]
    if name not in VERBS:
        raise ConfigError(_unknown_verb(name))
    module_name, summary = VERBS[name]
    verb = cast("_Verb", importlib.import_module(module_name))
    parser = _Parser(prog=f"{PROGRAM} {name}", description=verb.__doc__ or summary, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.add_arguments(parser)
    _add_common(parser)
    args = parser.parse_args(arguments[split + 1 :])
    args.verbose += options.verbose
    set_up_logging(args.verbose)
    return verb.run(args)


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    lines = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in VERBS.items())
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [-h] [--version] [-v] [--debug] VERB ...",
        description="Make a model's feed-forward layers sparse, measure what that cost, run it faster.",
        epilog=f"verbs:\n{lines}\n\n`{PROGRAM} VERB --help` explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    _add_common(parser)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="tell more on stderr; twice for all"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _unknown_verb(name: str) -> str:
    near = difflib.get_close_matches(name, VERBS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(VERBS)}"
    return f"expected a verb, got {name!r}; {hint}"


def _package(error: ModuleNotFoundError) -> str:
    return (error.name or "").partition(".")[0]


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = f"[{error.filename}] {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, UnicodeDecodeError):
        got = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        text = str(TextError(f"[text] expected UTF-8, got {got}"))
    elif isinstance(error, ModuleNotFoundError):
        package = _package(error)
        text = f"[{package}] expected this package, got none: pip install 'turbosparse[{EXTRAS[package]}]'"
    elif isinstance(error, MemoryError):
        text = "[memory] expected room for the model and its cache, got none: it does not fit this machine"
    elif isinstance(error, OSError) and "huggingface.co" in str(error):
        text = (
            "[model] expected a directory here, or an id on the Hugging Face hub and the hub in reach, "
            f"got neither ({str(error).splitlines()[0]})"
        )
    else:
        text = str(error)
    # Paths may hold anything; what cannot be printed must not steer the terminal.
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.replace("\n", " "))
