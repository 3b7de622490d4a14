"""Stream the inputs of all FFNs of a model to disk, one file per layer.

Only the post-norm hidden states are stored (2 bytes per value); gate, up and activations are computed again
from the layer's weights when its predictor is fitted: F / D times less space than storing them.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from turbosparse.errors import ConfigError
from turbosparse.models.gated_ffn import GatedFFN, gated_ffns

__all__ = ["capture_inputs", "open_inputs"]


@torch.no_grad()
def capture_inputs(model: Any, batches: Iterable[dict[str, Tensor]], directory: Path) -> dict[str, Path]:
    """Run a model over text and write what its FFNs see.

    Parameters
    ----------
    model : PreTrainedModel
        A model with `GatedFFN` modules.
    batches : iterable of dict of Tensor
        Model inputs.
    directory : Path
        Where the files go, 2 * D bytes per token and layer.

    Returns
    -------
    dict of str to Path
        One file of float16 rows per layer, by the FFN's name.

    Raises
    ------
    ConfigError
        If the model has no `GatedFFN`.
    """
    ffns = {name: ffn for name, ffn in gated_ffns(model).items() if isinstance(ffn, GatedFFN)}
    if not ffns:
        raise ConfigError("[fit-predictor] expected a model with dense gated FFNs, got none")
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"{name}.f16" for name in ffns}
    files = {name: path.open("wb") for name, path in paths.items()}

    def _write(name: str, ffn: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].flatten(0, -2).to(torch.float16).cpu().numpy().tofile(files[name])

    hooks = [ffn.register_forward_pre_hook(partial(_write, name)) for name, ffn in ffns.items()]
    try:
        for batch in batches:
            model(**batch, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
        for file in files.values():
            file.close()
    return paths


def open_inputs(path: Path, hidden_size: int) -> NDArray[np.float16]:
    """Map a captured file into memory.

    Parameters
    ----------
    path : Path
        What `capture_inputs` wrote.
    hidden_size : int
        Values per row.

    Returns
    -------
    ndarray of float16, shape [N, D]
        Read-only; rows are read when they are used.
    """
    flat: NDArray[np.float16] = np.memmap(path, dtype=np.float16, mode="r")
    return flat.reshape(-1, hidden_size)
