"""An answer on the terminal: written while it comes, then what it cost in one line."""

import sys
from typing import TYPE_CHECKING, Any

from turbosparse.cli.console import progress

if TYPE_CHECKING:
    from turbosparse.runtime.generation import Generation, GenerationStats

__all__ = ["stats_record", "timings", "write_stream"]

# A model may write escape sequences; a terminal must not obey them. U+2400 and on depict control characters.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_VISIBLE |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)
_ENDINGS = {"length": "cut at the limit", "interrupted": "stopped"}


def write_stream(answer: "Generation", written: list[str]) -> None:
    """Write an answer to standard output while it comes.

    Parameters
    ----------
    answer : Generation
        What is being written.
    written : list of str
        Gets every piece, so that they are known after an interrupt too.
    """
    is_terminal = sys.stdout.isatty()
    try:
        with progress(None, "reading the prompt"):
            piece = next(answer, None)
        while piece is not None:
            written.append(piece)
            sys.stdout.write(piece.translate(_VISIBLE) if is_terminal else piece)
            sys.stdout.flush()
            piece = next(answer, None)
    finally:
        answer.close()  # so that its statistics are complete after an interrupt too


def timings(stats: "GenerationStats") -> str:
    """Say what an answer cost, in one line.

    Parameters
    ----------
    stats : GenerationStats
        Of an answer that has ended.

    Returns
    -------
    str
        Speeds, mode and share of neurons.
    """
    reused = f" ({stats.reused_tokens} cached)" if stats.reused_tokens else ""
    active = "" if stats.active_ratio is None else f", {100 * stats.active_ratio:.1f} % of neurons active"
    parts = [
        f"prompt {stats.prompt_tokens} tokens{reused}{_speed(stats.prompt_tok_per_s)}",
        f"answer {stats.tokens} tokens{_speed(stats.decode_tok_per_s)}",
        f"{stats.mode}{active}",
    ]
    if stats.finish_reason in _ENDINGS:
        parts.append(_ENDINGS[stats.finish_reason])
    return " | ".join(parts)


def stats_record(stats: "GenerationStats") -> dict[str, Any]:
    """Make the JSON form of what an answer cost.

    Parameters
    ----------
    stats : GenerationStats
        Of an answer that has ended.

    Returns
    -------
    dict
        Plain values.
    """
    return {
        "mode": stats.mode,
        "prompt_tokens": stats.prompt_tokens,
        "tokens": stats.tokens,
        "prompt_tok_per_s": stats.prompt_tok_per_s,
        "decode_tok_per_s": stats.decode_tok_per_s,
        "active_ratio": stats.active_ratio,
        "bytes_per_token": stats.bytes_per_token,
        "finish_reason": stats.finish_reason,
        "ids": stats.ids,
    }


def _speed(tok_per_s: float | None) -> str:
    return "" if tok_per_s is None else f" at {tok_per_s:.1f} tok/s"
