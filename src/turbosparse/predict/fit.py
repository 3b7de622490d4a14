"""Fit low-rank predictors of one FFN or expert from captured inputs.

Labels come from the layer's own weights. The loss is binary cross entropy, weighted so that a neuron counts
by the norm of what it adds to the output, against the token's other neurons: what matters is found first.
All ranks and inputs are fitted in one pass, since computing the labels costs more than a step of a predictor.
States are scaled to unit size per dimension while training: on SmolLM2-135M with dReLU, 300 steps then reach
what took 600.
"""

import logging
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from turbosparse.predict.config import PredictorConfig
from turbosparse.predict.layers import FFNLayer
from turbosparse.predict.predictors import LowRankPredictor
from turbosparse.sparsity.cett import find_cett_threshold

__all__ = ["activity_bound", "fit_low_rank", "rows_of"]

_LOG = logging.getLogger(__name__)
_WARMUP_STEPS = 20
_SCALED_ROWS = 2048


def rows_of(inputs: NDArray[np.float16], rows: NDArray[np.int64] | slice) -> Tensor:
    """Read rows of captured inputs.

    Parameters
    ----------
    inputs : ndarray of float16, shape [N, D]
        As `CapturedInputs.open` maps them.
    rows : ndarray of int64, shape [n], or slice
        Which.

    Returns
    -------
    Tensor of float32, shape [n, D]
        A copy.
    """
    return torch.from_numpy(np.asarray(inputs[rows], dtype=np.float32))


def activity_bound(layer: FFNLayer, x: Tensor, config: PredictorConfig) -> float:
    """Return from which norm of its output on a neuron counts as active.

    Parameters
    ----------
    layer : FFNLayer
        Whose neurons.
    x : Tensor of shape [N, D]
        Inputs of the FFN to judge by.
    config : PredictorConfig
        What active means.

    Returns
    -------
    float
        Above 0.
    """
    if config.labels == "nonzero":
        return float(torch.finfo(torch.float32).tiny)
    return find_cett_threshold(
        layer.neurons(x).activations.numpy(), layer.down.T.numpy(), config.label_cett
    ).eps


def fit_low_rank(
    layer: FFNLayer, inputs: Mapping[str, NDArray[np.float16]], bound: float, config: PredictorConfig
) -> dict[tuple[str, int], LowRankPredictor]:
    """Fit predictors of all ranks on all inputs.

    Parameters
    ----------
    layer : FFNLayer
        Whose neurons to predict.
    inputs : mapping of str to ndarray of float16, shape [N, D]
        Rows to fit on by the kind of input, ``ffn_norm`` among them; at least one row.
    bound : float
        Norm of its output from which on a neuron is active; see `activity_bound`.
    config : PredictorConfig
        Ranks, inputs, loss.

    Returns
    -------
    dict of (str, int) to LowRankPredictor
        By input and rank, without gradients.
    """
    size, neurons = layer.down.shape
    norms = layer.down.norm(dim=0)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        fitted = {
            (kind, rank): LowRankPredictor(size, neurons, rank)
            for kind in config.inputs
            for rank in config.ranks
        }
    parameters = [parameter for predictor in fitted.values() for parameter in predictor.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / _WARMUP_STEPS) * (1 - step / config.steps)
    )
    count = len(inputs["ffn_norm"])
    scales = {kind: _scale(inputs[kind]) for kind in config.inputs}
    loss = torch.zeros(())
    for _ in range(config.steps):
        rows = torch.randint(count, (min(config.batch_tokens, count),), generator=generator).sort()[0].numpy()
        importance = layer.neurons(rows_of(inputs["ffn_norm"], rows)).activations.abs() * norms
        active = importance >= bound
        weight = 1 + config.norm_weight * importance / importance.mean(dim=1, keepdim=True).clamp(min=1e-30)
        weight = torch.where(active, weight, 1.0)
        states = {kind: rows_of(inputs[kind], rows) * scales[kind] for kind in config.inputs}
        losses = [
            functional.binary_cross_entropy_with_logits(
                predictor(states[kind]), active.float(), weight=weight
            )
            for (kind, _), predictor in fitted.items()
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    _LOG.debug("loss %.4f", float(loss.detach()) / len(fitted))
    for (kind, _), predictor in fitted.items():
        predictor.requires_grad_(False).a.weight.mul_(scales[kind])
    return fitted


def _scale(inputs: NDArray[np.float16]) -> Tensor:
    """What brings each of the D numbers of a state to unit size; folded into the weights in the end."""
    sample = rows_of(inputs, slice(None, None, max(len(inputs) // _SCALED_ROWS, 1)))
    return sample.square().mean(0).sqrt().clamp(min=1e-6).reciprocal()
