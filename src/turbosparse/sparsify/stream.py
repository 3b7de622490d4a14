"""The mixture as a torch dataset that remembers where it stood at each optimizer step."""

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from turbosparse.data.encoding import IGNORED_LABEL
from turbosparse.data.mixture import Mixture
from turbosparse.errors import DataError

__all__ = ["DATA_STATE_FILE", "SequenceStream"]

DATA_STATE_FILE = "data_state.json"
_KEPT_STATES = 8  # data loaders read ahead by less than two optimizer steps


class SequenceStream(IterableDataset):  # type: ignore[type-arg, unused-ignore]
    """Rows of tensors for the Trainer, and the mixture's state at any recent step.

    The first token of each document gets no label: nothing before it belongs to the same document.

    Parameters
    ----------
    mixture : Mixture
        Where sequences come from.
    batch_sequences : int
        Sequences per optimizer step.
    steps : int
        Optimizer steps of the stage: whoever reads ahead gets no sequence beyond them.
    """

    def __init__(self, mixture: Mixture, batch_sequences: int, *, steps: int) -> None:
        super().__init__()
        self.mixture = mixture
        self._batch_sequences = batch_sequences
        self._steps = steps
        self._first_step = 0
        self._states: deque[tuple[int, dict[str, Any], dict[str, Any]]] = deque(maxlen=_KEPT_STATES)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        step = self._first_step
        rows = 0
        self._remember(step)
        for sequence in self.mixture:
            position_ids = torch.tensor(sequence.position_ids)
            labels = torch.tensor(sequence.labels)
            labels[position_ids == 0] = IGNORED_LABEL
            yield {
                "input_ids": torch.tensor(sequence.input_ids),
                "position_ids": position_ids,
                "labels": labels,
            }
            rows += 1
            if rows == self._batch_sequences:
                step, rows = step + 1, 0
                self._remember(step)
                if step >= self._steps:
                    return
        raise DataError(
            f"[data] expected text for the whole stage, got the end of all sources in step {step + 1}; "
            "set on_end to repeat, or train on fewer tokens"
        )

    def _remember(self, step: int) -> None:
        self._states.append((step, self.mixture.state(), self.mixture.report()))

    def save(self, step: int, directory: Path) -> None:
        """Write the state after a step's batches.

        Parameters
        ----------
        step : int
            Optimizer steps done.
        directory : Path
            A checkpoint.
        """
        for known, state, report in self._states:
            if known == step:
                content = {"step": step, "state": state, "drawn": report}
                (directory / DATA_STATE_FILE).write_text(json.dumps(content), encoding="utf-8")
                return
        raise AssertionError(f"no data state for step {step}, only {[known for known, _, _ in self._states]}")

    def restore(self, directory: Path, *, step: int) -> None:
        """Go to where a checkpoint was written.

        Parameters
        ----------
        directory : Path
            A checkpoint.
        step : int
            The step to count from: the checkpoint's, or 0 in a new stage.

        Raises
        ------
        DataError
            If the checkpoint has no data state or that of other sources.
        """
        path = directory / DATA_STATE_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"[{path}] expected the state of the data stream, got: {error}") from error
        self.mixture.restore(content["state"])
        self._first_step = step
        self._remember(step)
