"""A running average of the trained weights: about what a decay of the learning rate gives, at any moment."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as sharded_files
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from turbosparse.sparsify.checkpoints import reading

__all__ = ["WeightAverage"]

_DIRECTORY = "average"


class WeightAverage(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Averages the weights after each step; the training itself does not see it.

    Early on it is the plain mean of all steps, later an exponential average. Under a constant learning rate
    such an average is about as good as a decayed copy (arXiv 2405.18392).

    Parameters
    ----------
    steps : float
        Horizon: how many of the last steps count, at least 1.
    checkpoint : Path or None
        Where to go on from. If it has no average, averaging starts there.
    """

    def __init__(self, steps: float, checkpoint: Path | None) -> None:
        self._steps = steps
        self._checkpoint = checkpoint
        self._model: Any = None
        self._averages: dict[str, torch.Tensor] = {}
        self._count = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from the model's weights, or from the checkpoint's average."""
        self._model = kwargs["model"]
        self._averages = {name: weight.detach().clone() for name, weight in self._weights().items()}
        if self._checkpoint is not None and (self._checkpoint / _DIRECTORY).is_dir():
            with reading(self._checkpoint), _single_process_allowed():
                sharded_files.load(self._state(), checkpoint_id=self._checkpoint / _DIRECTORY)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move towards the new weights."""
        self._count += 1
        share = max(1 / int(self._count), 1 / self._steps)
        weights = self._weights()
        torch._foreach_lerp_(list(self._averages.values()), list(weights.values()), share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights within this block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def save(self, checkpoint: Path) -> None:
        """Write the average into a checkpoint; every process calls it.

        Parameters
        ----------
        checkpoint : Path
            The checkpoint's directory.
        """
        with _single_process_allowed():
            sharded_files.save(self._state(), checkpoint_id=checkpoint / _DIRECTORY)

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self._weights().items():
            kept = weight.clone()
            weight.copy_(self._averages[name])
            self._averages[name].copy_(kept)
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # drops weights that were gathered before

    def _state(self) -> dict[str, torch.Tensor]:
        return {**self._averages, "count": self._count}

    def _weights(self) -> dict[str, torch.Tensor]:
        """Name independently of wrappers, so that any number of processes can load the average."""
        return {
            name.removeprefix("module."): weight.detach()
            for name, weight in self._model.named_parameters()
            if weight.requires_grad
        }


@contextmanager
def _single_process_allowed() -> Iterator[None]:
    """Without a process group torch warns that it assumes one process, which is right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        yield
