"""A run: its stages one after another, each resumable."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from turbosparse.errors import ConfigError
from turbosparse.sparsify.checkpoints import read_identity
from turbosparse.sparsify.fresh_model import start_fresh
from turbosparse.sparsify.host_memory import keep_freed_memory
from turbosparse.sparsify.recipe import Recipe, StageConfig
from turbosparse.sparsify.sharding import set_up_single_process
from turbosparse.sparsify.stage import MODEL_DIRECTORY, Stage
from turbosparse.sparsify.upcycling import start_of, upcycle

__all__ = ["RunResult", "run_recipe"]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run left."""

    finished: bool
    """False if a signal stopped it; the same command goes on."""
    model: Path
    """Hugging Face directory of the last finished stage."""


def run_recipe(recipe: Recipe, *, control: bool = False, from_checkpoint: Path | None = None) -> RunResult:
    """Train a model by a recipe, or go on with what an earlier call left in the output directory.

    Parameters
    ----------
    recipe : Recipe
        The whole run.
    control : bool, default False
        Train the unswapped model on the same tokens; losses that need a swapped FFN are left out, and stages
        without any other loss are trained on the next token.
    from_checkpoint : Path, optional
        Start from a checkpoint of another run, in the stage that wrote it, such as to take a decayed copy.

    Returns
    -------
    RunResult
        Where the model is.

    Raises
    ------
    ConfigError, DataError
        If the recipe does not fit the model or its sources.
    TrainingError
        If the loss is not finite, the disk is full or a checkpoint is of another run.
    """
    if control:
        recipe = control_recipe(recipe)
    if not torch.cuda.is_available():
        keep_freed_memory()
    if recipe.fsdp:
        set_up_single_process()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    recipe = start_fresh(recipe)
    upcycle(recipe)
    stages = list(recipe.stages)
    if from_checkpoint is not None:
        stages = _stages_from(stages, from_checkpoint)
    previous: Path | None = None
    for stage in stages:
        directory = output / stage.name
        if not (directory / MODEL_DIRECTORY).is_dir():
            finished = Stage(recipe, stage, directory, previous, from_checkpoint, control=control).train()
            if not finished:
                return RunResult(finished=False, model=previous or Path(start_of(recipe)))
        from_checkpoint = None
        previous = directory / MODEL_DIRECTORY
    assert previous is not None
    return RunResult(finished=True, model=previous)


def control_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe of the control: the same tokens for the model as it is.

    Parameters
    ----------
    recipe : Recipe
        Of the swapped model.

    Returns
    -------
    Recipe
        With next-token loss in place of losses that compare with the original FFNs.
    """
    stages = []
    for stage in recipe.stages:
        loss = dataclasses.replace(
            stage.loss,
            ffn_output=0.0,
            activation_l1=0.0,
            next_token=stage.loss.next_token or float(not (stage.loss.logits or stage.loss.hidden_states)),
        )
        stages.append(
            dataclasses.replace(stage, loss=loss, trainable="all", blend_tokens=0, threshold_tokens=0)
        )
    return dataclasses.replace(recipe, stages=tuple(stages), initial_fit_tokens=0)


def _stages_from(stages: list[StageConfig], checkpoint: Path) -> list[StageConfig]:
    name = read_identity(checkpoint)["stage"]
    names = [stage.name for stage in stages]
    if name not in names:
        raise ConfigError(
            f"[{checkpoint}] expected a checkpoint of a stage of {', '.join(names)}, got one of {name}"
        )
    return stages[names.index(name) :]
