"""Finding and checking the checkpoints of a stage."""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from turbosparse.errors import TrainingError, TurboSparseError

__all__ = [
    "COMPLETE_FILE",
    "check_identity",
    "checkpoint_steps",
    "latest_checkpoint",
    "load_weights",
    "read_identity",
    "reading",
    "step_of",
    "sync_files",
    "writing",
]

COMPLETE_FILE = "turbosparse_run.json"
_PREFIX = "checkpoint-"


def checkpoint_steps(stage_directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints of a stage.

    Parameters
    ----------
    stage_directory : Path
        Where the stage writes.

    Returns
    -------
    list of int
        In rising order.
    """
    names = [path.parent.name for path in stage_directory.glob(f"{_PREFIX}*/{COMPLETE_FILE}")]
    return sorted(int(name.removeprefix(_PREFIX)) for name in names if name.removeprefix(_PREFIX).isdigit())


def latest_checkpoint(stage_directory: Path) -> Path | None:
    """Return the newest complete checkpoint of a stage, or None.

    Parameters
    ----------
    stage_directory : Path
        Where the stage writes.

    Returns
    -------
    Path or None
        Its directory.
    """
    steps = checkpoint_steps(stage_directory)
    return stage_directory / f"{_PREFIX}{steps[-1]}" if steps else None


def read_identity(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says about the run that wrote it.

    Parameters
    ----------
    checkpoint : Path
        A checkpoint's directory.

    Returns
    -------
    dict
        Stage, activation and shape of the model.

    Raises
    ------
    TrainingError
        If it is no complete checkpoint.
    """
    try:
        identity: dict[str, Any] = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"[{checkpoint}] expected a complete checkpoint, got: {error}") from error
    return identity


def check_identity(checkpoint: Path, expected: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model or stage.

    Parameters
    ----------
    checkpoint : Path
        A checkpoint's directory.
    expected : dict
        The identity of the run that wants to resume.

    Raises
    ------
    TrainingError
        If they differ; the message names the first difference.
    """
    identity = read_identity(checkpoint)
    for name, value in expected.items():
        got = identity.get(name, False if name == "fsdp" else value)  # earlier versions wrote fewer names
        if got != value:
            raise TrainingError(f"[{checkpoint}] expected a checkpoint with {name} {value}, got {got}")


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was written at.

    Parameters
    ----------
    checkpoint : Path
        A checkpoint's directory.

    Returns
    -------
    int
        Optimizer steps done.

    Raises
    ------
    TrainingError
        If it is damaged.
    """
    with reading(checkpoint):
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"])


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Say in one line why what is read within this block is not what a run can go on from.

    Parameters
    ----------
    checkpoint : Path
        A checkpoint's directory.

    Raises
    ------
    TrainingError
        If a file is missing, cut, or of other parameters.
    """
    try:
        yield
    except TurboSparseError:
        raise
    except (
        OSError,
        ValueError,
        LookupError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
        CheckpointException,
    ) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise TrainingError(
            f"[{checkpoint}] expected a whole checkpoint of these parameters, got: {reason}"
        ) from error


def load_weights(model: Any, checkpoint: Path) -> None:
    """Give a model the weights of a checkpoint that is not sharded.

    Parameters
    ----------
    model : PreTrainedModel
        In fp32, of the class that wrote the checkpoint.
    checkpoint : Path
        A checkpoint's directory. Its files have the hub's names and shapes (an expert is three tensors), and
        transformers turns them into those of a model in memory.

    Raises
    ------
    TrainingError
        If a file is missing or cut, or its tensors are not exactly those of the model.
    """
    with reading(checkpoint):
        saved, info = type(model).from_pretrained(
            checkpoint, config=model.config, dtype=torch.float32, output_loading_info=True
        )
        for kind in ("missing", "unexpected"):
            names = sorted(info[f"{kind}_keys"])
            if names:
                raise ValueError(f"{len(names)} {kind} tensors, such as {names[0]}")
        model.load_state_dict(saved.state_dict(), strict=True)


def sync_files(directory: Path) -> None:
    """Wait until all files below a directory are on the disk.

    Parameters
    ----------
    directory : Path
        What is about to be renamed into place.
    """
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def writing(path: Path, staging: Path) -> Iterator[None]:
    """Say in one line why what is written within this block could not be, and take away its beginning.

    Parameters
    ----------
    path : Path
        Where it was to be.
    staging : Path
        Where it is written first.

    Raises
    ------
    TrainingError
        If the disk is full, or anything else went wrong.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        shutil.rmtree(staging, ignore_errors=True)
        free = shutil.disk_usage(path.parent).free / 1e9
        raise TrainingError(
            f"[{path}] expected to write {path.name}, got {error} ({free:.1f} GB free); the checkpoints "
            "before it are intact"
        ) from error
