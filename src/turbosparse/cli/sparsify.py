"""Replace a model's FFN activation by one with exact zeros and train it until it works again.

What to do stands in a recipe (TOML; see examples/), or for a quick start in --model, --text, --output and
--tokens. The same command goes on with an interrupted run, and works under torchrun and accelerate launch.
"""

import argparse
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from turbosparse.cli.model_options import check_model_name
from turbosparse.cli.training_estimate import print_estimate, warn_of_export
from turbosparse.errors import ConfigError

if TYPE_CHECKING:
    from turbosparse.sparsify.recipe import Recipe

__all__ = ["add_arguments", "run"]

_LOG = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser.
    """
    parser.add_argument("recipe", nargs="?", type=Path, help="recipe file (TOML)")
    parser.add_argument("--model", help="Hugging Face directory or id of the model to start from")
    parser.add_argument("--output", help="directory of the run")
    parser.add_argument("--activation", help="new FFN activation, NAME or NAME:THRESHOLD (default: drelu)")
    parser.add_argument(
        "--text", action="append", default=[], help="training text without a recipe; may be repeated"
    )
    parser.add_argument("--tokens", type=int, help="training tokens without a recipe (default: 1000000)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="FIELD=VALUE",
        help="override a field, such as data.sequence_length=256 or stages.NAME.learning_rate=1e-4",
    )
    parser.add_argument("--from-checkpoint", type=Path, help="start from a checkpoint of another run")
    parser.add_argument("--control", action="store_true", help="train the unswapped model on the same tokens")
    parser.add_argument("--dry-run", action="store_true", help="show memory, steps and time, then stop")


def run(args: argparse.Namespace) -> int:
    """Run the verb.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed options.

    Returns
    -------
    int
        0 done, 130 stopped by a signal with a checkpoint written.
    """
    recipe = _recipe(args)
    if recipe.fresh is None:
        check_model_name(recipe.model)
    if args.dry_run:
        print_estimate(recipe)
        return 0
    from transformers.utils.logging import disable_progress_bar

    from turbosparse.sparsify.run import run_recipe

    disable_progress_bar()
    if os.environ.get("RANK", "0") == "0":
        if recipe.fresh is None and not args.control:
            warn_of_export(recipe)
        logging.getLogger("turbosparse").setLevel(
            min(logging.getLogger("turbosparse").getEffectiveLevel(), logging.INFO)
        )
    result = run_recipe(recipe, control=args.control, from_checkpoint=args.from_checkpoint)
    if not result.finished:
        print("stopped; the same command goes on from the checkpoint")  # noqa: T201 -- the verb's output
        return 130
    print(result.model)  # noqa: T201 -- the verb's output
    return 0


def _recipe(args: argparse.Namespace) -> "Recipe":
    from turbosparse.sparsify.recipe import load_recipe, quick_recipe

    settings = [*args.settings]
    for name in ("model", "output", "activation"):
        value = getattr(args, name)
        if value is not None:
            settings.append(f"{name}={json.dumps(value, ensure_ascii=False)}")
    if args.recipe is not None:
        if args.text or args.tokens is not None:
            raise ConfigError("[sparsify] expected a recipe or --text and --tokens, got both")
        return load_recipe(args.recipe, settings)
    if not args.text or args.model is None or args.output is None:
        raise ConfigError("[sparsify] expected a recipe file, or --model, --text and --output")
    tokens = 1_000_000 if args.tokens is None else args.tokens
    if tokens < 1:
        raise ConfigError(f"[--tokens] expected at least 1, got {tokens}")
    return quick_recipe(args.text, tokens, settings)
