"""Measure how well a model predicts a text, and what a sparse mode costs against a dense one.

The method is llama.cpp's, so numbers compare: windows do not overlap, the second half of each is scored.

  turbosparse perplexity model.gguf --text book.txt
  turbosparse perplexity sparse.gguf --text book.txt --mode threshold --against-mode dense --json
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from turbosparse.cli.console import add_json_option, print_json, progress
from turbosparse.cli.model_options import (
    MODES,
    add_model_options,
    check_modes,
    describe,
    open_model,
    read_text,
)
from turbosparse.errors import ConfigError

__all__ = ["add_arguments", "run"]

DEFAULT_CONTEXT = 512  # tokens, as llama-perplexity has it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Where they go.
    """
    add_model_options(parser)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to predict")
    parser.add_argument(
        "--against-mode", choices=MODES, help="also run this mode and tell how far the two are apart"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens per window (default: 512, or all that the model has)"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="only the first N tokens of the text")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed arguments.

    Returns
    -------
    int
        Exit status.
    """
    if args.tokens is not None and args.tokens < 1:
        raise ConfigError(f"[tokens] expected 1 or more, got {args.tokens}")
    text = read_text(args.text)
    check_modes(args.model, args.mode, args.against_mode)
    model = open_model(args)
    trained = model.info.context_length
    if args.context is None:
        args.context = min(DEFAULT_CONTEXT, trained)
    if args.context > trained:
        raise ConfigError(
            f"[context] expected at most {trained} tokens, as the model was trained, got {args.context}"
        )
    ids = model.text_ids(text)[: args.tokens]
    sys.stderr.write(describe(model, args.mode) + "\n")
    record, lines = _measure(args, model, ids)
    sys.stdout.write("\n".join(lines) + "\n")
    if args.json:
        print_json(record)
    return 0


def _measure(args: argparse.Namespace, model: Any, ids: list[int]) -> tuple[dict[str, Any], list[str]]:
    from turbosparse.runtime.perplexity import PerplexityResult, compare_modes, perplexity

    def line(result: PerplexityResult) -> str:
        text = (
            f"{result.mode:<9} perplexity {result.perplexity:.4f} +/- {result.standard_error:.4f}, "
            f"{result.tokens} tokens, {100 * result.active_ratio:.1f} % of neurons active"
        )
        if result.candidates is None:
            return text
        return (
            f"{text}, {100 * result.candidates.candidate_ratio:.1f} % candidates "
            f"(recall {100 * result.candidates.recall:.1f} %, "
            f"precision {100 * result.candidates.precision:.1f} %)"
        )

    mode = args.mode or model.default_mode
    with progress(len(ids), "predicting the text") as advance:
        if args.against_mode is None:
            result = perplexity(
                model.engine,
                ids,
                mode=mode,
                context=args.context,
                bos_id=model.window_bos_id,
                advance=advance,
            )
            return dataclasses.asdict(result), [line(result)]
        both = compare_modes(
            model.engine,
            ids,
            mode=mode,
            against=args.against_mode,
            context=args.context,
            bos_id=model.window_bos_id,
            advance=advance,
        )
    divergence = {
        "perplexity_ratio": both.perplexity_ratio,
        "mean_kl": both.mean_kl,
        "kl_99_percentile": both.kl_99_percentile,
        "max_kl": both.max_kl,
        "same_top_1": both.same_top_1,
    }
    against = dataclasses.asdict(both.baseline)
    lines = [
        line(both.result),
        line(both.baseline),
        f"ratio {both.perplexity_ratio:.4f}, KL mean {both.mean_kl:.5f}, 99 % {both.kl_99_percentile:.4f}, "
        f"max {both.max_kl:.3f} nats, same likeliest token {100 * both.same_top_1:.2f} %",
    ]
    return {**dataclasses.asdict(both.result), **divergence, "against": against}, lines
