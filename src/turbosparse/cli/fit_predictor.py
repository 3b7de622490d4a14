"""Fit predictors of active neurons, and say whether they are cheaper than skipping exactly.

Captures what the feed-forward layers see on some text, fits low-rank predictors for every layer or expert,
chooses rank and threshold of all layers together so that perplexity rises by no more than --ppl-budget, and
compares the bytes that are then read with the exact mode, which computes every gate and needs no predictor.

  turbosparse fit-predictor runs/mine/distillation/model --text mine.txt --output predictors
  turbosparse fit-predictor mine.gguf --text mine.txt --output predictors
"""

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from turbosparse.cli.console import add_json_option, print_json, share_of, thread_count
from turbosparse.cli.model_options import check_model_name
from turbosparse.cli.predictor_report import show_report
from turbosparse.errors import ConfigError

if TYPE_CHECKING:
    from turbosparse.predict.config import PredictorConfig
    from turbosparse.predict.source import PredictorSource

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser.
    """
    add = parser.add_argument
    add("model", type=Path, help="Hugging Face directory, or a GGUF file, which the engine runs")
    add("--text", action="append", required=True, help="text to capture on; may be repeated")
    add("--held-out", action="append", default=[], help="text to judge on (default: 2 %% of the documents)")
    add("-o", "--output", type=Path, required=True, help="directory for predictors and report")
    add("--tokens", type=int, default=50_000, help="tokens to capture (default: 50000)")
    add("--ranks", default="64,128", help="ranks to try per layer (default: 64,128)")
    add(
        "--inputs",
        default="ffn_norm",
        help="what predictors read: ffn_norm, residual, previous; those after the first are only compared",
    )
    add("--rivals", help="kinds to compare: sign_bits, and of a directory low_bit_1, low_bit_2, oracle")
    add("--ppl-budget", default="3%", metavar="P%", help="rise of perplexity allowed (default: 3%%)")
    add("--labels", default="nonzero", help="what is active: nonzero, or cett for dense activations")
    add("--cett", type=float, default=0.1, help="error that makes a neuron active for --labels cett")
    add("--weight-type", type=str.upper, default="Q8_0", help="gate, up, down in the file (default: q8_0)")
    add("--predictor-type", type=str.upper, default="Q8_0", help="predictors there (default: q8_0)")
    add("--steps", type=int, default=600, help="steps per layer (default: 600)")
    add("--batch-tokens", type=int, default=512, help="tokens per step (default: 512)")
    add("--finetune-steps", type=int, default=0, help="straight-through steps after the fit (default: 0)")
    add("--finetune", default="predictors", help="what these train: predictors, or model for both")
    add("--sequence-length", type=int, default=256, help="tokens per sequence (default: 256)")
    add("-t", "--threads", type=thread_count, default=0, help="of the engine (default: physical cores)")
    add("--seed", type=int, default=0, help="of weights and batches (default: 0)")
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
    check_model_name(str(args.model))
    if args.tokens < 1:
        raise ConfigError(f"[--tokens] expected at least 1, got {args.tokens}")
    from turbosparse.predict.config import PredictorConfig
    from turbosparse.predict.predictors import RIVALS
    from turbosparse.predict.run import fit_predictors

    try:
        ranks = tuple(int(rank) for rank in args.ranks.split(","))
    except ValueError:
        raise ConfigError(f"[--ranks] expected numbers with commas between, got {args.ranks!r}") from None
    rivals = ("sign_bits",) if args.model.is_file() else tuple(RIVALS)
    if args.rivals is not None:
        rivals = tuple(filter(None, args.rivals.split(",")))
    config = PredictorConfig(
        ranks=ranks,
        inputs=tuple(args.inputs.split(",")),
        rivals=rivals,
        labels=args.labels,
        label_cett=args.cett,
        ppl_budget=share_of("--ppl-budget", args.ppl_budget),
        weight_type=args.weight_type,
        predictor_type=args.predictor_type,
        steps=args.steps,
        batch_tokens=args.batch_tokens,
        finetune_steps=args.finetune_steps,
        finetune=args.finetune,
        seed=args.seed,
    )
    logging.getLogger("turbosparse").setLevel(logging.INFO)
    source = _model_file(args, config) if args.model.is_file() else _hugging_face(args, config)
    report = fit_predictors(source, args.output, config)
    show_report(report)
    if args.json:
        record = dataclasses.asdict(report)
        del record["layers"]  # they are in the report
        print_json(record)
    return 0


def _hugging_face(args: argparse.Namespace, config: "PredictorConfig") -> "PredictorSource":
    from transformers.utils.logging import disable_progress_bar

    from turbosparse.data.config import DataConfig, SourceConfig
    from turbosparse.predict.source import HuggingFaceSource

    disable_progress_bar()
    data = DataConfig(
        sources=tuple(SourceConfig(path=text, on_end="stop") for text in args.text),
        held_out=tuple(SourceConfig(path=text) for text in args.held_out),
        sequence_length=args.sequence_length,
    )
    return HuggingFaceSource(
        args.model, data, tokens=args.tokens, weight_type=config.weight_type, seed=config.seed
    )


def _model_file(args: argparse.Namespace, config: "PredictorConfig") -> "PredictorSource":
    from turbosparse.export.predictor_source import ModelFileSource
    from turbosparse.runtime.texts import read_text

    return ModelFileSource(
        args.model,
        [read_text(Path(path)) for path in args.text],
        [read_text(Path(path)) for path in args.held_out],
        config,
        tokens=args.tokens,
        window=args.sequence_length,
        threads=args.threads,
    )
