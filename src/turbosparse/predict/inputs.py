"""What a predictor may read, and hooks that have it at hand when an FFN is called.

========== ===============================================================================================
ffn_norm   the FFN's own input: the state after the norm (Turbo Sparse's Mixtral, arXiv 2406.05955)
residual   the residual stream before that norm (PowerInfer, arXiv 2312.12456)
previous   the input of the FFN one layer before, so that prediction can run ahead (Deja Vu, arXiv
           2310.17157); the first layer reads its own
========== ===============================================================================================
"""

import re
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from turbosparse.models.gated_ffn import gated_ffns

__all__ = ["INPUTS", "InputTap", "layer_index"]

INPUTS = ("ffn_norm", "residual", "previous")


def layer_index(name: str) -> int:
    """Return which layer an FFN belongs to.

    Parameters
    ----------
    name : str
        Of the module, such as ``model.layers.3.mlp``.

    Returns
    -------
    int
        The first number in it.
    """
    found = re.search(r"\.(\d+)(\.|$)", name)
    assert found, name
    return int(found[1])


class InputTap:
    """Watches a model while it runs; a context manager.

    Parameters
    ----------
    model : nn.Module
        A model with replaced FFNs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._norm: tuple[Tensor, Tensor] | None = None  # input and output of the norm that ran last
        self._inputs: dict[int, Tensor] = {}  # of the FFN, by layer
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "InputTap":
        for name, module in self._model.named_modules():
            if "norm" in name.rpartition(".")[2]:
                self._hooks.append(module.register_forward_hook(self._on_norm))
        for name, ffn in gated_ffns(self._model).items():
            index = layer_index(name)
            self._hooks.append(
                ffn.register_forward_pre_hook(lambda _, args, index=index: self._on_ffn(index, args[0]))
            )
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._norm = None
        self._inputs.clear()

    def _on_norm(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._norm = (args[0], output)

    def _on_ffn(self, index: int, x: Tensor) -> None:
        self._inputs[index] = x

    def read(self, kind: str, name: str, x: Tensor) -> Tensor:
        """Return what a predictor of this kind of input reads in the call at hand.

        Parameters
        ----------
        kind : str
            One of `INPUTS`.
        name : str
            Of the FFN that is being called.
        x : Tensor of shape [..., D]
            Its input.

        Returns
        -------
        Tensor of shape [N, D]
            Rows in the order of the FFN's tokens.
        """
        match kind:
            case "residual" if self._norm is not None and self._norm[1].data_ptr() == x.data_ptr():
                found = self._norm[0]
            case "previous":
                found = self._inputs.get(layer_index(name) - 1, x)
            case _:  # ffn_norm, and residual where the model has no norm before its FFN
                found = x
        return found.reshape(-1, x.shape[-1])
