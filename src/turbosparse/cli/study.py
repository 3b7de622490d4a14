"""Run a study: many measurements by one recipe, resumable, with a report of tables and figures.

  trade-off     what each rule that leaves out neurons loses at each cost, on one model
  experts       the same inside of the experts of a mixture
  activations   kinds of FFN trained from scratch on the same tokens, then measured
  scale         the same at several sizes
  relufication  one model swapped to several activations, with the same recovery

  turbosparse study trade-off model.gguf --text book.txt -o studies/model
  turbosparse study activations --recipe examples/studies/activations_small.toml -o studies/activations

The first two need no recipe; any field of a recipe can be set by --set FIELD=VALUE. The same command goes on
with an interrupted study.
"""

import argparse
import logging
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbosparse.cli.console import add_json_option, console, print_json
from turbosparse.errors import ConfigError

if TYPE_CHECKING:
    from turbosparse.study.config import FromScratchStudy, RelufyStudy, SweepStudy

__all__ = ["add_arguments", "run"]

_SWEEPS = ("trade-off", "experts")
_KINDS = (*_SWEEPS, "activations", "scale", "relufication")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser.
    """
    add = parser.add_argument
    add("kind", choices=_KINDS, metavar="STUDY", help=f"one of {', '.join(_KINDS)}")
    add("model", nargs="?", metavar="MODEL", help="GGUF file, or Hugging Face directory or id")
    add("--recipe", type=Path, metavar="FILE", help="TOML; see examples/ and docs/how-to/study.md")
    add("--text", metavar="FILE", help="UTF-8 text to measure on (default: the technical English that ships)")
    add("-o", "--output", metavar="DIR", help="where results and report go")
    add("--set", action="append", default=[], dest="settings", metavar="FIELD=VALUE", help="change a field")
    add("--train-only", action="store_true", help="train, such as under torchrun; the next call measures")
    add("--dry-run", action="store_true", help="show what would be trained and how long it takes")
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
        0 done, 1 a run failed, 130 interrupted with all that was finished kept.
    """
    import matplotlib as mpl  # before hours of work, not after them

    from turbosparse.cli.measure_model import show
    from turbosparse.cli.study_runs import estimate, find, settings_of, train
    from turbosparse.measure.report import plain
    from turbosparse.study.report import study_tables, write_study

    mpl.use("agg")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logger = logging.getLogger("turbosparse")
    logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
    config = _config(args)
    if args.dry_run:
        for line in estimate(config):
            console().print(line, markup=False)
        return 0
    started = time.monotonic()
    try:
        if args.train_only:
            train(args.kind, config)
            return 0
        found = find(args.kind, config)
    except KeyboardInterrupt:
        console(stderr=True).print("stopped; finished results are kept, the same command goes on")
        return 130
    command = shlex.join(["turbosparse", *sys.argv[1:]])
    seconds = max(found.pop("seconds"), time.monotonic() - started)
    record = plain({**settings_of(args.kind, config, command, seconds), **found})
    page = write_study(record, Path(config.output))
    for table in study_tables(record)[:1]:
        show(table)
    for note in record["notes"]:
        console().print(f"note: {note}", markup=False)
    console().print(f"wrote {page}", markup=False)
    if args.json:
        print_json({"report": str(page), "study": record})
    return 1 if any(" failed: " in note for note in record["notes"]) else 0


def _config(args: argparse.Namespace) -> "SweepStudy | FromScratchStudy | RelufyStudy":
    from turbosparse.config import apply_setting, fill, read_toml
    from turbosparse.runtime.texts import HELD_OUT
    from turbosparse.study.config import FromScratchStudy, RelufyStudy, SweepStudy

    values: dict[str, Any] = read_toml(args.recipe) if args.recipe else {}
    for name in ("model", "text", "output"):
        if getattr(args, name) is not None:
            values[name] = getattr(args, name)
    for setting in args.settings:
        apply_setting(values, setting)
    if not values.get("text"):
        values["text"] = str(HELD_OUT)
    if args.kind in _SWEEPS:
        return fill(SweepStudy, values, args.kind)
    if args.recipe is None:
        raise ConfigError(f"[study {args.kind}] expected --recipe FILE, got none; examples/ has some")
    if args.kind == "relufication":
        return fill(RelufyStudy, values, args.kind)
    config = fill(FromScratchStudy, values, args.kind)
    if (args.kind == "scale") != (len(config.sizes) > 1):
        wanted = "several sizes" if args.kind == "scale" else "one size"
        raise ConfigError(f"[sizes] expected {wanted} for study {args.kind}, got {len(config.sizes)}")
    return config
