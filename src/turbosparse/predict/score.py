"""What a predictor of one layer costs and loses, on arrays: at one threshold, and at all of them.

Bytes are what the engine pays: the predictor, a row of gate for each candidate, and of those a row of up
where the gate lets it through, a row of down where the product does.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turbosparse.predict.allocation import Tradeoff
from turbosparse.predict.layers import FFNLayer, Neurons

__all__ = ["PredictorScore", "exact_bytes", "score_candidates", "trade_off"]

_LEVELS = 256


@dataclass(frozen=True, kw_only=True)
class PredictorScore:
    """One predictor of one layer at one threshold, on held-out tokens."""

    recall: float
    """Share of the active neurons that are candidates."""
    precision: float
    """Share of the candidates that are active."""
    norm_kept: float
    """Share of the summed output norms ||n_i|| that candidates have."""
    cett: float
    """Norm of what the other neurons would have added, over the norm of the output; mean over tokens."""
    active_ratio: float
    """Share of neurons that are active."""
    candidate_ratio: float
    """Share of neurons that are candidates."""
    bytes_ratio: float
    """Bytes read, predictor and candidates together, over those of all rows of the FFN."""


def score_candidates(
    candidates: Tensor, neurons: Neurons, layer: FFNLayer, *, bound: float, predictor_bytes: float
) -> PredictorScore:
    """Score a set of candidates.

    Parameters
    ----------
    candidates : Tensor of bool, shape [N, F]
        What the predictor names.
    neurons : Neurons
        What the layer does on the same tokens.
    layer : FFNLayer
        The layer.
    bound : float
        Norm of its output from which on a neuron is active.
    predictor_bytes : float
        What the predictor reads per token.

    Returns
    -------
    PredictorScore
        Ratios, each 0 to 1 except ``cett`` and ``bytes_ratio``, which can exceed 1.

    Notes
    -----
    CETT is that of ReLU^2 Wins (arXiv 2402.03804) with the candidates in place of a threshold on ||n_i||.
    """
    activations = neurons.activations
    norms = activations.abs() * layer.down.norm(dim=0)  # [N, F]
    active = norms >= bound
    tokens = max(len(activations), 1)  # an expert may have met none
    named, wanted = candidates.sum().item(), active.sum().item()
    both = (candidates & active).sum().item()
    output = activations @ layer.down.T  # [N, D]
    missed = (activations * ~candidates) @ layer.down.T
    rows = torch.stack([candidates, candidates & neurons.passed, candidates & (activations != 0)])
    per_token = rows.sum(dim=(1, 2)).double() / tokens
    read = float(per_token @ torch.tensor(layer.row_bytes, dtype=torch.float64)) + predictor_bytes
    return PredictorScore(
        recall=both / max(wanted, 1),
        precision=both / max(named, 1),
        norm_kept=float((norms * candidates).sum() / norms.sum().clamp(min=1e-30)),
        cett=float((missed.norm(dim=1) / output.norm(dim=1).clamp(min=1e-30)).sum()) / tokens,
        active_ratio=wanted / (tokens * active.shape[1]),
        candidate_ratio=named / (tokens * candidates.shape[1]),
        bytes_ratio=read / layer.dense_bytes,
    )


def exact_bytes(neurons: Neurons, layer: FFNLayer) -> float:
    """Return what the layer costs without a predictor, gate first.

    Parameters
    ----------
    neurons : Neurons
        What it does on some tokens.
    layer : FFNLayer
        The layer.

    Returns
    -------
    float
        Bytes per token: all rows of gate, rows of up where the gate lets the neuron through, rows of down
        where its activation is not zero.
    """
    tokens = max(len(neurons.activations), 1)
    passed = int(neurons.passed.sum()) / tokens
    active = int((neurons.activations != 0).sum()) / tokens
    gate, up, down = layer.row_bytes
    return len(layer.gate) * gate + passed * up + active * down


def trade_off(scores: Tensor, neurons: Neurons, layer: FFNLayer, predictor_bytes: float) -> Tradeoff:
    """Find what every threshold on the scores costs and loses.

    Parameters
    ----------
    scores : Tensor of shape [N, F]
        Of the predictor.
    neurons : Neurons
        What the layer does on the same tokens.
    layer : FFNLayer
        The layer.
    predictor_bytes : float
        What the predictor reads per token.

    Returns
    -------
    Tradeoff
        At thresholds that are quantiles of the scores.

    Notes
    -----
    What is lost of a token is the share of its energy that the missed neurons have, energy being the squared
    norm of a neuron's output: additive over neurons, so that all thresholds take one pass of N x F. Vectors
    that cancel or agree make the true error smaller or larger; perplexity decides in the end. Shares are
    averaged, not energies: the first token of a sequence can have a thousand times the norm of the others.
    """
    tokens = len(scores)
    sample = scores.flatten()[:: max(scores.numel() // 1_000_000, 1)].float()
    levels = torch.quantile(sample, torch.linspace(0, 1, _LEVELS + 1)[:-1]).unique()  # ascending
    met = torch.bucketize(scores.float(), levels, right=True).flatten()  # how many levels a score is at least
    energy = (neurons.activations * layer.down.norm(dim=0)).square()
    energy /= energy.sum(dim=1, keepdim=True).clamp(min=1e-30)

    def _of_candidates(weights: Tensor) -> NDArray[np.float64]:
        per_level = torch.bincount(met, weights.flatten().double(), len(levels) + 1)
        return (per_level.flip(0).cumsum(0).flip(0)[1:] / tokens).numpy()

    kept = _of_candidates(energy)
    counts = [
        _of_candidates(mask) for mask in (torch.ones_like(scores), neurons.passed, neurons.activations != 0)
    ]
    read = np.asarray(layer.row_bytes) @ np.stack(counts) + predictor_bytes
    total = float(energy.sum()) / tokens
    return Tradeoff(thresholds=levels.double().numpy(), read_bytes=read, lost=np.maximum(total - kept, 0.0))
