"""The tests of a benchmark, cut out of the text that ships with the package."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from turbosparse import _native
from turbosparse.bench.rounds import Case
from turbosparse.errors import ConfigError
from turbosparse.runtime.texts import HELD_OUT, read_text
from turbosparse.tokenizer import Tokenizer

if TYPE_CHECKING:
    from turbosparse.bench.benchmark import BenchConfig

__all__ = ["cases_of", "longest"]


def cases_of(path: Path, config: "BenchConfig", context_length: int) -> list[Case]:
    """Cut the tests out of the text that ships with the package.

    Parameters
    ----------
    path : Path
        Model file, for its tokenizer.
    config : BenchConfig
        What to time.
    context_length : int
        Positions the model can have.

    Returns
    -------
    list of Case
        Prompt, decode, or both.

    Raises
    ------
    ConfigError
        When the tests do not fit the text or the context.
    """
    tokenizer = Tokenizer.from_metadata(_native.GgufFile(str(path)).metadata)
    ids = tokenizer.encode(read_text(HELD_OUT))
    most = max(config.depths) + max(config.prompt_tokens, config.generated_tokens)
    limit = min(len(ids), context_length)
    if most > limit:
        what = "the model's context" if limit == context_length else "the text that ships with turbosparse"
        raise ConfigError(f"[bench] expected at most {limit} tokens at once ({what}), got {most}")
    tests = [("pp", config.prompt_tokens, False), ("tg", config.generated_tokens, True)]
    return [
        Case(
            name=f"{name}{count}" + (f" @ d{depth}" if depth else ""),
            warm=ids[:depth],
            timed=ids[depth : depth + count],
            stepwise=stepwise,
        )
        for depth in config.depths
        for name, count, stepwise in tests
        if count
    ]


def longest(cases: Sequence[Case]) -> int:
    """Count the tokens of the longest test.

    Parameters
    ----------
    cases : sequence of Case
        At least one.

    Returns
    -------
    int
        Those before it among them.
    """
    return max(len(case.warm) + len(case.timed) for case in cases)
