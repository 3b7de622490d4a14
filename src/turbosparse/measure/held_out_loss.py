"""Next-token loss on held-out text."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from turbosparse.data.mixture import PackedSequence

__all__ = ["batch_of", "mean_loss"]


def batch_of(sequences: Sequence[PackedSequence], device: Any = "cpu") -> dict[str, Tensor]:
    """Stack packed sequences into model inputs.

    Parameters
    ----------
    sequences : sequence of PackedSequence
        Rows of equal length.
    device : torch.device, default "cpu"
        Where the tensors go.

    Returns
    -------
    dict of Tensor of shape [B, T]
        ``input_ids`` and ``position_ids``.
    """
    return {
        name: torch.tensor([getattr(sequence, name) for sequence in sequences], device=device)
        for name in ("input_ids", "position_ids")
    }


@torch.no_grad()
def mean_loss(
    model: Any, sequences: Sequence[PackedSequence], *, batch_size: int = 4, device: Any = "cpu"
) -> float:
    """Return the mean next-token cross entropy.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    sequences : sequence of PackedSequence
        Held-out text; labels below 0 are not scored.
    batch_size : int, default 4
        Sequences at once.
    device : torch.device, default "cpu"
        Where the model is.

    Returns
    -------
    float
        In nats per token; NaN without sequences. Its exponential is the perplexity.
    """
    total, count = 0.0, 0
    for start in range(0, len(sequences), batch_size):
        rows = sequences[start : start + batch_size]
        batch = batch_of(rows, device)
        labels = torch.tensor([row.labels[1:] for row in rows], device=device).flatten()
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        total += float(functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum"))
        count += int((labels >= 0).sum())
    return total / count if count else math.nan
