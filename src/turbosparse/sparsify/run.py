"""A run: its stages one after another, each resumable."""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turbosparse.errors import ConfigError, TrainingError
from turbosparse.sparsify.checkpoints import latest_checkpoint, read_identity
from turbosparse.sparsify.estimate import check_data
from turbosparse.sparsify.fresh_model import start_fresh
from turbosparse.sparsify.host_memory import keep_freed_memory
from turbosparse.sparsify.recipe import Recipe, StageConfig, recipe_to_dict
from turbosparse.sparsify.sharding import set_up_single_process
from turbosparse.sparsify.stage import MODEL_DIRECTORY, RECORD_FILE, Stage
from turbosparse.sparsify.upcycling import start_of, upcycle

__all__ = ["RunResult", "run_recipe"]

_LOG = logging.getLogger(__name__)


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
        If the loss is not finite, the disk is full, or a checkpoint or a finished stage is of another run.
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
    checked = False
    for number, stage in enumerate(stages):
        directory = output / stage.name
        if not _is_finished(recipe, stage, control=control):
            if not checked:  # now, not after the hours of this stage
                check_data(recipe, [later for later in stages[number + 1 :] if later.data])
                checked = True
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
        With next-token loss in place of losses that compare with the original FFNs, and with all weights
        trained where only FFNs were.
    """
    stages = []
    for stage in recipe.stages:
        loss = dataclasses.replace(
            stage.loss,
            ffn_output=0.0,
            activation_l1=0.0,
            next_token=stage.loss.next_token or float(not (stage.loss.logits or stage.loss.hidden_states)),
        )
        trainable = "all" if stage.trainable == "ffn" else stage.trainable
        stages.append(
            dataclasses.replace(stage, loss=loss, trainable=trainable, blend_tokens=0, threshold_tokens=0)
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


def _is_finished(recipe: Recipe, stage: StageConfig, *, control: bool) -> bool:
    """Whether a stage left its model; refuse one of another run, set aside one that shall train longer."""
    directory = Path(recipe.output) / stage.name
    model, record = directory / MODEL_DIRECTORY, directory / RECORD_FILE
    if not model.is_dir():
        return False
    if not record.is_file():  # put there by hand
        return True
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        found = _kind(content["recipe"], stage.name, control=content["control"])
    except (OSError, ValueError, LookupError, StopIteration) as error:
        raise TrainingError(f"[{record}] expected the record of a stage, got: {error!r}") from error
    wanted = _kind(recipe_to_dict(recipe), stage.name, control=control)
    for name, value in wanted.items():
        longer = name == "tokens" and value > found[name]
        if value != found[name] and not longer:
            raise TrainingError(
                f"[{model}] expected a finished stage with {name} {value}, got {found[name]}; give the run "
                "another output"
            )
    if wanted["tokens"] == found["tokens"]:
        return True
    _set_aside(recipe, stage, model)
    return False


def _kind(recipe: Mapping[str, Any], stage: str, *, control: bool) -> dict[str, Any]:
    """What a finished stage must have in common with the recipe; only its tokens may grow."""
    settings = next(each for each in recipe["stages"] if each["name"] == stage)
    data = settings["data"] or recipe["data"]
    model = recipe["model"].removeprefix(str(Path(recipe["output"])))
    step = settings["batch_sequences"] * data["sequence_length"]
    return {
        "control": control,
        "model": str(Path(model).resolve()) if Path(model).exists() else model,
        **({} if control else {"activation": recipe["activation"]}),
        "data": [source["path"] for source in data["sources"]],
        "tokens": max(settings["tokens"] // step, 1) * step,
    }


def _set_aside(recipe: Recipe, stage: StageConfig, model: Path) -> None:
    """Make room for the model of a stage that goes on from its last checkpoint."""
    checkpoint = latest_checkpoint(model.parent)
    if checkpoint is None:
        raise TrainingError(f"[{model.parent}] expected a checkpoint to train longer from, got none")
    later = recipe.stages[recipe.stages.index(stage) + 1 :]
    begun = [each.name for each in later if (Path(recipe.output) / each.name).is_dir()]
    if begun:
        raise TrainingError(
            f"[stages.{stage.name}.tokens] expected as many as before, since stage {begun[0]} began where it "
            f"ended, got {stage.tokens}"
        )
    if os.environ.get("RANK", "0") == "0":
        kept = model.with_name(checkpoint.name.replace("checkpoint", MODEL_DIRECTORY))
        _LOG.info("[%s] goes on to %d tokens; the model so far is %s", stage.name, stage.tokens, kept)
        model.rename(kept)
