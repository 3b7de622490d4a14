"""Stream what FFNs and their predictors read to disk: one file per FFN or expert, and kind of input.

Only states are stored (2 bytes per value); gate, up and activations are computed again from the layer's
weights when its predictor is fitted: F / D times less space than storing them.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from turbosparse.models.gated_ffn import GatedExperts, gated_ffns
from turbosparse.predict.inputs import InputTap
from turbosparse.predict.layers import FFNLayer

__all__ = ["CapturedFFNs", "CapturedInputs", "capture_inputs"]

FFN_INPUT = "ffn_norm"


@dataclass(frozen=True, kw_only=True)
class CapturedInputs:
    """Rows of one FFN or expert on disk, the same tokens in every file."""

    files: Mapping[str, Path]
    """By the kind of input; ``ffn_norm`` is always there."""
    hidden_size: int
    tokens_seen: int
    """Tokens that the model was run on; an expert meets a part of them."""
    batch_ends: tuple[int, ...] = ()
    """Rows up to the end of each batch that the model was run on; empty if they are not known."""

    def open(self, kind: str) -> NDArray[np.float16]:
        """Map a file into memory.

        Parameters
        ----------
        kind : str
            One of `turbosparse.predict.inputs.INPUTS`.

        Returns
        -------
        ndarray of float16, shape [N, D]
            Read-only; rows are read when they are used.
        """
        path = self.files[kind]
        if not path.stat().st_size:  # mmap refuses empty files
            return np.empty((0, self.hidden_size), np.float16)
        flat: NDArray[np.float16] = np.memmap(path, dtype=np.float16, mode="r")
        return flat.reshape(-1, self.hidden_size)


class CapturedFFNs(Protocol):
    """The FFNs of a model, and what they read on a text."""

    @property
    def layers(self) -> Mapping[str, FFNLayer]:
        """The FFNs by name; experts have their number behind it."""

    def capture(self, directory: Path, inputs: Sequence[str]) -> Mapping[str, CapturedInputs]:
        """Write what FFNs and their predictors read.

        Parameters
        ----------
        directory : Path
            Where the files go.
        inputs : sequence of str
            What predictors read, of `turbosparse.predict.inputs.INPUTS`.

        Returns
        -------
        mapping of str to CapturedInputs
            For each of `layers`.
        """


@torch.no_grad()
def capture_inputs(
    model: Any, batches: Iterable[dict[str, Tensor]], directory: Path, inputs: Sequence[str] = (FFN_INPUT,)
) -> dict[str, CapturedInputs]:
    """Run a model over text and write what its FFNs and their predictors read.

    Parameters
    ----------
    model : PreTrainedModel
        A model with `GatedFFN` or `GatedExperts` modules.
    batches : iterable of dict of Tensor
        Model inputs.
    directory : Path
        Where the files go; 2 * D bytes per token, FFN (or expert that the token meets) and kind of input.
    inputs : sequence of str
        Kinds of input; ``ffn_norm`` is added if it is not among them.

    Returns
    -------
    dict of str to CapturedInputs
        By the name of the FFN, with the expert's number behind it.
    """
    kinds = tuple(dict.fromkeys((FFN_INPUT, *inputs)))
    size = model.config.hidden_size
    directory.mkdir(parents=True, exist_ok=True)
    paths: dict[str, dict[str, Path]] = {}
    for name, ffn in gated_ffns(model).items():
        experts = [f"{name}.{i}" for i in range(ffn.num_experts)] if isinstance(ffn, GatedExperts) else [name]
        paths |= {unit: {kind: directory / f"{unit}.{kind}.f16" for kind in kinds} for unit in experts}
    tokens = 0
    ends: dict[str, list[int]] = {unit: [] for unit in paths}
    with ExitStack() as stack:
        tap = stack.enter_context(InputTap(model))
        files = {
            path: stack.enter_context(path.open("wb")) for unit in paths.values() for path in unit.values()
        }

        def write(name: str, ffn: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, *routing = args
            for kind in kinds:
                rows = tap.read(kind, name, x).to(torch.float16).cpu()
                if not routing:
                    rows.numpy().tofile(files[paths[name][kind]])
                    continue
                for expert in range(ffn.num_experts):
                    met = (routing[0] == expert).any(-1).cpu()
                    rows[met].numpy().tofile(files[paths[f"{name}.{expert}"][kind]])

        for name, ffn in gated_ffns(model).items():
            stack.callback(ffn.register_forward_pre_hook(partial(write, name)).remove)
        for batch in batches:
            model(**batch, use_cache=False, logits_to_keep=1)
            tokens += batch["input_ids"].numel()
            for unit, found in ends.items():
                found.append(files[paths[unit][FFN_INPUT]].tell() // (2 * size))
    return {
        unit: CapturedInputs(files=files, hidden_size=size, tokens_seen=tokens, batch_ends=tuple(ends[unit]))
        for unit, files in paths.items()
    }
