"""Fit predictors of active neurons for a Hugging Face model, and say what they cost and save.

Captures what the FFNs see on some text, fits a low-rank predictor per layer at each of the ranks, keeps the
one that reads the fewest bytes at the CETT target, and measures perplexity with all of them on.
"""

import argparse
import dataclasses
import logging
from pathlib import Path

from turbosparse.cli.console import add_json_option, console, print_json

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser.
    """
    parser.add_argument("model", type=Path, help="Hugging Face directory")
    parser.add_argument("--text", action="append", required=True, help="text to capture on; may be repeated")
    parser.add_argument("--output", type=Path, required=True, help="directory for predictors and report")
    parser.add_argument("--tokens", type=int, default=50_000, help="tokens to capture (default: 50000)")
    parser.add_argument("--ranks", default="64,128", help="ranks to try per layer (default: 64,128)")
    parser.add_argument("--cett", type=float, default=0.1, help="error a predictor may make (default: 0.1)")
    parser.add_argument("--labels", default="nonzero", help="what is active: nonzero or cett")
    parser.add_argument("--steps", type=int, default=600, help="steps per layer and rank (default: 600)")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens per sequence (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed options.

    Returns
    -------
    int
        0.
    """
    from transformers.utils.logging import disable_progress_bar

    from turbosparse.data.config import DataConfig, SourceConfig
    from turbosparse.errors import ConfigError
    from turbosparse.predict.config import PredictorConfig
    from turbosparse.predict.run import fit_predictors

    try:
        ranks = tuple(int(rank) for rank in args.ranks.split(","))
    except ValueError:
        raise ConfigError(f"[--ranks] expected numbers with commas between, got {args.ranks!r}") from None
    config = PredictorConfig(
        ranks=ranks, labels=args.labels, target_cett=args.cett, steps=args.steps, seed=args.seed
    )
    sources = tuple(SourceConfig(path=text) for text in args.text)
    data = DataConfig(sources=sources, sequence_length=args.sequence_length)
    logging.getLogger("turbosparse").setLevel(logging.INFO)
    disable_progress_bar()
    report = fit_predictors(args.model, args.output, data=data, tokens=args.tokens, config=config)
    rise = report.predicted_perplexity / report.perplexity - 1
    out = console()
    out.print(
        f"perplexity {report.perplexity:.3f}, with predictors {report.predicted_perplexity:.3f} "
        f"({rise:+.1%}, KL {report.kl_divergence:.4f}, same top-1 {report.same_top1:.1%})"
    )
    out.print(f"predictors and candidates read {report.bytes_ratio:.1%} of the FFN's bytes")
    if args.json:
        record = dataclasses.asdict(report)
        del record["layers"]  # they are in the report
        print_json(record)
    return 0
