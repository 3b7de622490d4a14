"""Fit the predictors of a model, layer by layer, from captured inputs.

Labels come from the layer's own weights. The loss is binary cross entropy, weighted so that a neuron counts
by the norm of what it adds to the output: what matters is found first. The threshold of each predictor is the
highest that keeps the CETT target on held-out tokens; of several ranks the one that then reads the fewest
bytes is kept.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from turbosparse.models.gated_ffn import GatedFFN
from turbosparse.predict.config import PredictorConfig
from turbosparse.predict.predictors import LowRankPredictor, OraclePredictor, Predictor, SignBitPredictor
from turbosparse.predict.score import PredictorScore, choose_threshold, score_candidates

__all__ = ["FittedLayer", "fit_layer"]

_LOG = logging.getLogger(__name__)
_SCORED_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class FittedLayer:
    """The predictor of one FFN, and how it and the alternatives score."""

    predictor: LowRankPredictor
    threshold: float
    """Neurons with a logit of at least this are candidates."""
    scores: dict[str, PredictorScore]
    """By kind: low_rank_RANK, sign_bits, oracle; each at its own threshold for the CETT target."""
    chosen: str
    """Key of `predictor` in `scores`."""


def fit_layer(ffn: GatedFFN, inputs: NDArray[np.float16], config: PredictorConfig) -> FittedLayer:
    """Fit one layer's predictor.

    Parameters
    ----------
    ffn : GatedFFN
        The layer; not changed.
    inputs : ndarray of float16, shape [N, D]
        Its captured inputs; the last part is held out.
    config : PredictorConfig
        Ranks, labels, loss.

    Returns
    -------
    FittedLayer
        The cheapest predictor that meets the target, with the scores of all.
    """
    training = int(len(inputs) * (1 - config.held_out_share))
    held_out = torch.from_numpy(np.array(inputs[training:][:_SCORED_TOKENS], dtype=np.float32))
    down = ffn.down_proj.weight.detach().float()  # [D, F]
    activations = _intermediate(ffn, held_out)
    active = active_neurons(activations, down, config)
    norms = down.norm(dim=0)
    fitted = {
        f"low_rank_{rank}": _fit_low_rank(ffn, inputs[:training], rank, config) for rank in config.ranks
    }
    rivals: dict[str, Predictor] = {
        **fitted,
        "sign_bits": SignBitPredictor(
            [ffn.project(torch.eye(down.shape[0]))[i].T.detach() for i in range(2)]
        ),
        "oracle": OraclePredictor(lambda x: _intermediate(ffn, x).abs() * norms),
    }
    scores, thresholds = {}, {}
    for name, predictor in rivals.items():
        values = predictor.scores(held_out)
        thresholds[name] = choose_threshold(values, activations, down, config.target_cett)
        candidates = values >= thresholds[name]
        scores[name] = score_candidates(candidates, activations, active, down, predictor.weights())
    chosen = min(fitted, key=lambda name: scores[name].bytes_ratio)
    return FittedLayer(predictor=fitted[chosen], threshold=thresholds[chosen], scores=scores, chosen=chosen)


def active_neurons(activations: Tensor, down: Tensor, config: PredictorConfig) -> Tensor:
    """Return which neurons count as active.

    Parameters
    ----------
    activations : Tensor of shape [N, F]
        Intermediate states.
    down : Tensor of shape [D, F]
        Down projection.
    config : PredictorConfig
        What active means.

    Returns
    -------
    Tensor of bool, shape [N, F]
        Per token and neuron.
    """
    if config.labels == "nonzero":
        return activations != 0
    norms = activations.abs() * down.norm(dim=0)
    return norms >= choose_threshold(norms, activations, down, config.label_cett)


@torch.no_grad()
def _intermediate(ffn: GatedFFN, x: Tensor) -> Tensor:
    return ffn.activation(*ffn.project(x.to(next(ffn.parameters()).dtype))).float()


def _fit_low_rank(
    ffn: GatedFFN, inputs: NDArray[np.float16], rank: int, config: PredictorConfig
) -> LowRankPredictor:
    down = ffn.down_proj.weight.detach().float()
    norms = down.norm(dim=0)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        predictor = LowRankPredictor(down.shape[0], down.shape[1], rank)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.steps)
    for _ in range(config.steps):
        rows = torch.randint(len(inputs), (config.batch_tokens,), generator=generator).sort().values.numpy()
        x = torch.from_numpy(inputs[rows].astype(np.float32))
        activations = _intermediate(ffn, x)
        active = active_neurons(activations, down, config)
        importance = activations.abs() * norms
        weight = 1 + config.norm_weight * importance / importance.mean().clamp(min=1e-30)
        weight = torch.where(active, weight, 1.0)
        loss = functional.binary_cross_entropy_with_logits(predictor(x), active.float(), weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    _LOG.debug("rank %d: loss %.4f", rank, float(loss.detach()))
    return predictor.requires_grad_(False)
