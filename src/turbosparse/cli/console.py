"""What the verbs share on the terminal: one console, progress bars, JSON lines, logging."""

import argparse
import json
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from turbosparse.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = [
    "add_json_option",
    "bytes_text",
    "console",
    "count_text",
    "plain_text",
    "print_json",
    "progress",
    "set_up_logging",
    "share_of",
    "thread_count",
]

SHOW_AFTER_S = 2.0
PIPE_WIDTH = 10_000  # columns: nothing is cut or wrapped


def console(*, stderr: bool = False, wide: bool = False) -> "Console":
    """Give a rich console on standard output, or on standard error.

    Parameters
    ----------
    stderr : bool, optional
        Where to write.
    wide : bool, optional
        Whether lines may be longer than the terminal is wide, as in a pipe.

    Returns
    -------
    rich.console.Console
        Colours only where the stream is a terminal; in a pipe, lines are never cut or wrapped.
    """
    from rich.console import Console

    class PipedConsole(Console):
        """Leaves it to `main` what a closed pipe means."""

        def on_broken_pipe(self) -> None:
            """Pass the error on, where rich would exit with status 1, which means a failed check."""
            raise  # noqa: PLE0704 -- rich calls this while it handles the error

    stream = sys.stderr if stderr else sys.stdout
    fits = stream.isatty() and not wide
    return PipedConsole(stderr=stderr, highlight=False, width=None if fits else PIPE_WIDTH)


@contextmanager
def progress(total: float | None, label: str) -> Iterator[Callable[[float], None]]:
    """Show a progress bar on standard error while the block runs, if that takes more than two seconds.

    Nothing is shown where standard error is not a terminal.

    Parameters
    ----------
    total : float or None
        Amount of work in any unit; None where it is not known beforehand.
    label : str
        What is being done.

    Yields
    ------
    callable
        ``advance(amount)``, to be called as work gets done.
    """
    terminal = console(stderr=True)
    if not terminal.is_interactive:
        yield lambda amount: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=terminal, transient=True)
    task = bar.add_task(label, total=total)
    timer = threading.Timer(SHOW_AFTER_S, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda amount: bar.advance(task, amount)
    finally:
        timer.cancel()
        timer.join()  # so that a bar which is just being shown is also taken away
        bar.stop()


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``, the same in every verb that has it.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser; the flag becomes ``args.json``.
    """
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line of stdout"
    )


def print_json(record: Mapping[str, Any]) -> None:
    """Print a record as one line of JSON on standard output.

    Parameters
    ----------
    record : mapping
        Plain values, NumPy scalars and arrays; numbers that are not finite become null, since JSON has none.
    """
    sys.stdout.write(json.dumps(_plain(record), allow_nan=False) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy, without importing it
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def bytes_text(count: float) -> str:
    """Write a number of bytes for people.

    Parameters
    ----------
    count : float
        Number of bytes.

    Returns
    -------
    str
        In decimal units, as disks and bandwidths are stated: ``"98.4 MB"``.
    """
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def count_text(count: int) -> str:
    """Write a number of parameters for people.

    Parameters
    ----------
    count : int
        The number.

    Returns
    -------
    str
        Such as ``"134.5 M"``.
    """
    if count < 1_000_000:
        return f"{count:,}"
    return f"{count / 1e6:.1f} M" if count < 1_000_000_000 else f"{count / 1e9:.2f} B"


def share_of(option: str, text: str) -> float:
    """Read a share that people may write in percent.

    Parameters
    ----------
    option : str
        Name of the option, for the message.
    text : str
        Such as ``"1%"`` or ``"0.01"``.

    Returns
    -------
    float
        Such as 0.01.

    Raises
    ------
    ConfigError
        If it is no number.
    """
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ConfigError(f"[{option}] expected a share as in 1% or 0.01, got {text!r}") from None


def thread_count(text: str) -> int:
    """Read what ``--threads`` was given.

    Parameters
    ----------
    text : str
        As it was typed.

    Returns
    -------
    int
        1 to the CPUs of this process.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is no number, or out of that range.
    """
    from turbosparse.runtime.cpus import check_threads

    try:
        return check_threads(int(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def plain_text(text: str) -> "Text":
    """Show text from a file as it is: neither our markup nor the terminal's escapes mean anything in it.

    Parameters
    ----------
    text : str
        Any text.

    Returns
    -------
    rich.text.Text
        Without styles; characters that cannot be printed are replaced.
    """
    from rich.text import Text

    return Text("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text))


def set_up_logging(verbose: int) -> None:
    """Send log records to standard error: warnings; with ``-v`` what is being done, twice for everything.

    Parameters
    ----------
    verbose : int
        How many times ``-v`` was given.
    """
    logger = logging.getLogger("turbosparse")
    logger.handlers[:] = [_StderrHandler()]
    logger.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG))


class _StderrHandler(logging.Handler):
    """Looks up standard error for each record: a progress bar stands in for it while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"turbosparse: {record.levelname.lower()}: {record.getMessage()}\n")
