"""The model with predictors on: only candidates add to the output of an FFN. And what that changes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from turbosparse.data.mixture import PackedSequence
from turbosparse.measure.held_out_loss import batch_of
from turbosparse.models.gated_ffn import GatedExperts, GatedFFN, gated_ffns
from turbosparse.predict.inputs import InputTap
from turbosparse.predict.predictors import Predictor

__all__ = ["Evaluation", "PlacedPredictor", "evaluate", "predictors_on"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedPredictor:
    """A predictor as it is used in one FFN or expert."""

    predictor: Predictor
    threshold: float
    """Neurons with at least this score are candidates."""
    input: str = "ffn_norm"
    """What it reads, of `turbosparse.predict.inputs.INPUTS`."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a model with predictors predicts a text, and how far it is from the one without."""

    perplexity: float
    kl_divergence: float
    """Of the next-token distributions from those without predictors, mean, in nats."""
    same_top1: float
    """Share of positions where the most likely token stays the same."""


class _Mask:
    """A probe that computes an FFN with the candidates alone."""

    def __init__(
        self, name: str, tap: InputTap, placed: Mapping[str, PlacedPredictor], trained: dict[str, Tensor]
    ) -> None:
        self._name = name
        self._tap = tap
        self._placed = placed
        self._trained = trained

    def on_intermediate(self, intermediate: Tensor) -> None:
        """See nothing."""

    def run(self, ffn: GatedFFN | GatedExperts, x: Tensor, *routing: Tensor) -> Tensor:
        """Compute the FFN with zeros in place of all neurons that are no candidates."""
        if isinstance(ffn, GatedFFN):
            intermediate = ffn.activation(*ffn.project(x)).flatten(0, -2)  # [N, F]
            masked = intermediate * self._candidates(self._name, x, slice(None))
            output: Tensor = ffn.down_proj(masked).reshape(x.shape)
            return output

        def run_expert(expert: int, token: Tensor) -> Tensor:
            intermediate = ffn.activation(*ffn.project(x[token], expert))
            mask = self._candidates(f"{self._name}.{expert}", x, token)
            return functional.linear(intermediate * mask, ffn.down_proj[expert])

        top_k_index, top_k_weights = routing
        return ffn.mix(x, top_k_index, top_k_weights, run_expert)

    def _candidates(self, unit: str, x: Tensor, token: Tensor | slice) -> Tensor:
        """1 for candidates and 0 for others, [n, F]; 1 everywhere where there is no predictor."""
        placed = self._placed.get(unit)
        if placed is None:
            return torch.ones((), dtype=x.dtype, device=x.device)
        scores = placed.predictor(self._tap.read(placed.input, self._name, x)[token].float())
        mask = (scores >= placed.threshold).to(x.dtype)
        if scores.requires_grad:  # straight through: the gradient is that of the sigmoid
            soft = torch.sigmoid(scores - placed.threshold)
            self._trained[unit] = mask = mask + (soft - soft.detach())
        return mask


@contextmanager
def predictors_on(model: nn.Module, placed: Mapping[str, PlacedPredictor]) -> Iterator[dict[str, Tensor]]:
    """Let a model compute candidates alone within this block.

    Where predictors are being trained, gradients pass straight through the choice of candidates.

    Parameters
    ----------
    model : nn.Module
        The model the predictors were fitted for.
    placed : mapping of str to PlacedPredictor
        By the FFN's name, with the expert's number behind it; those that are not there run as ever.

    Yields
    ------
    dict of str to Tensor of shape [N, F]
        Masks of candidates with gradient, of the last call of each FFN whose predictor is being trained.
    """
    ffns = gated_ffns(model)
    before = {name: ffn.probe for name, ffn in ffns.items()}
    trained: dict[str, Tensor] = {}
    try:
        with InputTap(model) as tap:
            for name, ffn in ffns.items():
                ffn.probe = _Mask(name, tap, placed, trained)
            yield trained
    finally:
        for name, probe in before.items():
            ffns[name].probe = probe


@torch.no_grad()
def evaluate(
    model: Any, configurations: Sequence[Mapping[str, PlacedPredictor]], rows: Sequence[PackedSequence]
) -> list[Evaluation]:
    """Measure a model with several sets of predictors on the same text.

    Parameters
    ----------
    model : PreTrainedModel
        The model the predictors were fitted for.
    configurations : sequence of mapping of str to PlacedPredictor
        What `predictors_on` takes; an empty mapping is the model itself.
    rows : sequence of PackedSequence
        At least one.

    Returns
    -------
    list of Evaluation
        One per configuration.
    """
    sums = torch.zeros(len(configurations), 3, dtype=torch.float64)  # loss, divergence, same token
    positions = 0
    for row in rows:
        batch = batch_of([row])
        labels = batch["input_ids"][0, 1:]
        expected = _log_probabilities(model, batch)
        for index, placed in enumerate(configurations):
            got = expected
            if placed:
                with predictors_on(model, placed):
                    got = _log_probabilities(model, batch)
            sums[index, 0] -= got.gather(1, labels[:, None]).sum()
            sums[index, 1] += (expected.exp() * (expected - got)).sum()
            sums[index, 2] += (expected.argmax(-1) == got.argmax(-1)).sum()
        positions += len(labels)
    return [
        Evaluation(perplexity=math.exp(loss), kl_divergence=max(divergence, 0.0), same_top1=same)
        for loss, divergence, same in (sums / positions).tolist()
    ]


def _log_probabilities(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Next-token log probabilities [T - 1, V] of one sequence."""
    result: Tensor = model(**batch, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return result
