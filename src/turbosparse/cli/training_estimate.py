"""What a training run will take, and whether what it leaves can be exported: told before it starts."""

import dataclasses
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from turbosparse.errors import ModelFileError

if TYPE_CHECKING:
    from turbosparse.sparsify.recipe import Recipe

__all__ = ["print_estimate", "warn_of_export"]

_LOG = logging.getLogger(__name__)


def print_estimate(recipe: "Recipe") -> None:
    """Print steps, memory and time of each stage, and find out whether its text is there.

    Parameters
    ----------
    recipe : Recipe
        The run; nothing is left behind in its output.

    Raises
    ------
    ConfigError, DataError
        If it does not fit the model or its sources.
    """
    from turbosparse.cli.console import console
    from turbosparse.sparsify.estimate import check_data, estimate_run, measure_flops
    from turbosparse.sparsify.fresh_model import start_fresh

    with tempfile.TemporaryDirectory() as scratch:
        recipe = start_fresh(dataclasses.replace(recipe, output=scratch))
        flops = measure_flops(bf16=recipe.precision != "fp32")
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        out = console()
        out.print(f"measured {flops / 1e9:.0f} GFLOP/s per process, {processes} process(es)")
        for stage in estimate_run(recipe, flops=flops, processes=processes):
            out.print(
                f"{stage.name}: {stage.tokens:,} tokens in {stage.steps:,} steps, {stage.memory_gb:.1f} GB "
                f"per process plus activations, {stage.flops_per_token / 1e9:.2f} GFLOP/token, "
                f"{stage.hours:.1f} h"
            )
        warn_of_export(recipe)
        check_data(recipe)


def warn_of_export(recipe: "Recipe") -> None:
    """Say so before the training if `export` will not take its result.

    Parameters
    ----------
    recipe : Recipe
        Of a model that is swapped.
    """
    from turbosparse.export.hf_config import HFConfig
    from turbosparse.sparsify.estimate import swapped_outline

    try:
        with tempfile.TemporaryDirectory() as directory:
            swapped_outline(recipe).config.save_pretrained(directory)
            HFConfig(Path(directory))
    except ModelFileError as error:
        reason = str(error).split("] ", 1)[-1]
        _LOG.warning("[%s] can be trained, but export will refuse the result: %s", recipe.model, reason)
