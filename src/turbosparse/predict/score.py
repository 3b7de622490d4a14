"""What a predictor costs and what it loses, on arrays: the same report for every kind."""

from dataclasses import dataclass

import torch
from torch import Tensor

from turbosparse.errors import ConfigError

__all__ = ["ALL_NEURONS", "PredictorScore", "choose_threshold", "score_candidates"]

ALL_NEURONS = float(torch.finfo(torch.float32).min)
"""A threshold that every score meets; finite, so that JSON can hold it."""
_CANDIDATE_THRESHOLDS = 64


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
    """Weights read, predictor and candidates together, over those of the whole FFN."""


def score_candidates(
    candidates: Tensor, activations: Tensor, active: Tensor, down: Tensor, predictor_weights: int
) -> PredictorScore:
    """Score a set of candidates.

    Parameters
    ----------
    candidates : Tensor of bool, shape [N, F]
        What the predictor names.
    activations : Tensor of shape [N, F]
        Intermediate states of the whole FFN.
    active : Tensor of bool, shape [N, F]
        What should be named.
    down : Tensor of shape [D, F]
        Down projection.
    predictor_weights : int
        Weights the predictor reads per token.

    Returns
    -------
    PredictorScore
        Ratios, each 0 to 1 except ``cett`` and ``bytes_ratio``, which can exceed 1.

    Notes
    -----
    CETT is that of ReLU^2 Wins (arXiv 2402.03804) with the candidates in place of a threshold on ||n_i||.
    """
    norms = activations.abs() * down.norm(dim=0)  # [N, F]
    named = candidates.sum().item()
    wanted = active.sum().item()
    both = (candidates & active).sum().item()
    output = activations @ down.T  # [N, D]
    missed = (activations * ~candidates) @ down.T
    hidden_size, intermediate_size = down.shape
    ratio = named / candidates.numel()
    return PredictorScore(
        recall=both / max(wanted, 1),
        precision=both / max(named, 1),
        norm_kept=float((norms * candidates).sum() / norms.sum().clamp(min=1e-30)),
        cett=float((missed.norm(dim=1) / output.norm(dim=1).clamp(min=1e-30)).mean()),
        active_ratio=wanted / active.numel(),
        candidate_ratio=ratio,
        bytes_ratio=predictor_weights / (3 * hidden_size * intermediate_size) + ratio,
    )


def choose_threshold(scores: Tensor, activations: Tensor, down: Tensor, target_cett: float) -> float:
    """Find the highest threshold on the scores whose CETT meets a target.

    Parameters
    ----------
    scores : Tensor of shape [N, F]
        Of the predictor.
    activations : Tensor of shape [N, F]
        Intermediate states of the whole FFN.
    down : Tensor of shape [D, F]
        Down projection.
    target_cett : float
        Between 0 and 1.

    Returns
    -------
    float
        A neuron is a candidate where its score is at least this; `ALL_NEURONS` if no higher one meets the
        target.

    Raises
    ------
    ConfigError
        If there are no tokens.
    """
    if not len(scores):
        raise ConfigError("[fit-predictor] expected held-out tokens to choose a threshold on, got none")
    norm = (activations @ down.T).norm(dim=1).clamp(min=1e-30)
    sample = scores.flatten()[:: max(scores.numel() // 1_000_000, 1)].float()
    levels = torch.quantile(sample, torch.linspace(0, 1, _CANDIDATE_THRESHOLDS))
    low, high = -1, len(levels)  # levels[low] meets the target, levels[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        missed = (activations * (scores < levels[middle])) @ down.T
        if float((missed.norm(dim=1) / norm).mean()) <= target_cett:
            low = middle
        else:
            high = middle
    return float(levels[low]) if low >= 0 else ALL_NEURONS
