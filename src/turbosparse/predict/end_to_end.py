"""The model with its predictors on: only candidates add to the output of an FFN."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from turbosparse.models.gated_ffn import GatedExperts, GatedFFN, gated_ffns
from turbosparse.predict.fit import FittedLayer

__all__ = ["predictors_on"]


class _Mask:
    """A probe that computes an FFN with the candidates alone."""

    def __init__(self, layer: FittedLayer) -> None:
        self._layer = layer

    def on_intermediate(self, intermediate: Tensor) -> None:
        """See nothing."""

    def run(self, ffn: GatedFFN | GatedExperts, x: Tensor, *routing: Tensor) -> Tensor:
        """Compute the FFN with zeros in place of all neurons that are no candidates."""
        assert isinstance(ffn, GatedFFN)
        candidates = self._layer.predictor.scores(x.float()) >= self._layer.threshold
        result: Tensor = ffn.down_proj(torch.where(candidates, ffn.activation(*ffn.project(x)), 0.0))
        return result


@contextmanager
def predictors_on(model: nn.Module, layers: Mapping[str, FittedLayer]) -> Iterator[None]:
    """Let a model compute candidates alone within this block.

    Parameters
    ----------
    model : nn.Module
        The model the predictors were fitted for.
    layers : mapping of str to FittedLayer
        By the FFN's name.
    """
    ffns = gated_ffns(model)
    before = {name: ffns[name].probe for name in layers}
    try:
        for name, layer in layers.items():
            ffns[name].probe = _Mask(layer)
        yield
    finally:
        for name, probe in before.items():
            ffns[name].probe = probe
