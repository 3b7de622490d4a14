"""The options of `turbosparse export`, and what they ask for."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from turbosparse.cli.console import add_json_option, thread_count
from turbosparse.errors import ConfigError

if TYPE_CHECKING:
    from turbosparse.export.run import ExportConfig

__all__ = ["add_options", "export_config"]

LAYOUTS = ("plain", "bundled")
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser.
    """
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face directory, or a model file (GGUF)")
    add("-o", "--output", type=Path, metavar="OUT.gguf", help="file to write (default: MODEL-TYPE.gguf)")
    add(
        "--type",
        type=str.lower,
        choices=TYPES,
        help="weight type (default: q8_0; a model file keeps its own)",
    )
    add(
        "--down-type",
        type=str.lower,
        choices=TYPES,
        help="of down projections (default: --type, sparse ones at least q8_0)",
    )
    add(
        "--embedding-type",
        type=str.lower,
        choices=TYPES,
        help="of embedding and output (default: --type, at least q8_0)",
    )
    add("--predictor", type=Path, metavar="DIR", help="add predictors that `fit-predictor` left there")
    add(
        "--predictor-type",
        type=str.lower,
        choices=TYPES,
        default="q8_0",
        help="of predictors (default: q8_0)",
    )
    add(
        "--thresholds",
        type=Path,
        metavar="FILE.gguf",
        help="add thresholds of this model's calibrated file",
    )
    add("--name", help="name of the model in the file")
    add("--layout", choices=LAYOUTS, help="bundled: for models larger than memory (default: as in MODEL)")
    add(
        "--gate-apart",
        action="store_true",
        help="bundled: keep gate in memory, for the modes exact and threshold",
    )
    add(
        "--hotness-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="bundled: tokens to find out by which neurons are hot (default: 2048; 0 keeps their order)",
    )
    add("--allow-untrained", action="store_true", help="export a swapped model without a record of training")
    add("--check", action=argparse.BooleanOptionalAction, default=True, help="compare with the original")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to compare on (default: technical English)")
    add("--tokens", type=int, default=1024, help="tokens to compare on (default: 1024)")
    add("-t", "--threads", type=thread_count, default=0, help="threads (default: physical cores, at most 8)")
    add("--dry-run", action="store_true", help="say what would be written, and write nothing")
    add("--force", action="store_true", help="replace OUT.gguf if it exists")
    add_json_option(parser)


def export_config(args: argparse.Namespace) -> "ExportConfig":
    """Collect what the file shall hold.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed options.

    Returns
    -------
    ExportConfig
        Checked.

    Raises
    ------
    ConfigError
        For a number out of range, or gate apart in a file without bundles.
    ModelFileError
        For a file with bundles that shall be plain.
    """
    from turbosparse.export.draft import TypeChoice
    from turbosparse.export.run import Bundles, ExportConfig
    from turbosparse.runtime.model_file import ModelFile

    if args.layout == "plain" and args.model.is_file():
        ModelFile(args.model).require_no_bundles()  # which nothing takes apart
    if args.gate_apart and args.layout != "bundled":
        raise ConfigError("[--gate-apart] expected --layout bundled beside it, got it alone")
    types = (args.type, args.down_type, args.embedding_type, args.predictor_type)
    weights, down, embedding, predictor = (name and name.upper() for name in types)
    return ExportConfig(
        types=TypeChoice(weights=weights, down=down, embedding=embedding, predictor=predictor),
        predictors=args.predictor,
        thresholds=args.thresholds,
        name=args.name,
        allow_untrained=args.allow_untrained,
        check=args.check,
        check_tokens=args.tokens,
        bundles=Bundles(gate_apart=args.gate_apart, hotness_tokens=args.hotness_tokens)
        if args.layout == "bundled"
        else None,
        threads=args.threads,
    )
