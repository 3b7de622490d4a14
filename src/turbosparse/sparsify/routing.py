"""How evenly a mixture's routers use their experts: a loss to train by, and the entropy of the load."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["balance_loss", "load_entropy"]


def balance_loss(router_logits: Sequence[Tensor], *, experts_per_token: int) -> Tensor:
    """Return how unevenly the routers use their experts, with a gradient towards even use.

    Parameters
    ----------
    router_logits : sequence of Tensor of shape [T, E]
        Of each layer with experts, before the softmax.
    experts_per_token : int
        Experts that each token is sent to, 1 to E.

    Returns
    -------
    Tensor
        A scalar, fp32: E times the sum over experts of share of the load * mean probability, averaged over
        the layers. 1 is balanced, E / k the worst for k experts per token.

    Notes
    -----
    Each layer is balanced by itself; transformers' own function balances the sum of all layers, where one
    layer's busy expert may make up for another's.

    References
    ----------
    Fedus et al., Switch Transformers, arXiv 2101.03961, equations 4 to 6.

    Examples
    --------
    >>> import torch
    >>> one_for_all = torch.tensor([[9.0, -9.0], [9.0, -9.0]])
    >>> one_for_each = torch.tensor([[9.0, -9.0], [-9.0, 9.0]])
    >>> [round(float(balance_loss([x], experts_per_token=1)), 3) for x in (one_for_all, one_for_each)]
    [2.0, 1.0]
    """
    losses = []
    for logits in router_logits:
        probabilities = torch.softmax(logits.float(), dim=-1)  # [T, E]
        chosen = probabilities.detach().topk(experts_per_token, dim=-1).indices  # [T, k]
        load = torch.bincount(chosen.flatten(), minlength=logits.shape[-1]) / chosen.numel()  # [E]
        losses.append(logits.shape[-1] * (load * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def load_entropy(tokens: Tensor) -> float:
    """Return the entropy of a layer's load over its largest value.

    Parameters
    ----------
    tokens : Tensor of shape [E]
        Tokens that each expert got, not all 0.

    Returns
    -------
    float
        1 where all experts get the same, 0 where one gets all.

    Examples
    --------
    >>> load_entropy(torch.tensor([5, 5, 0, 0]))
    0.5
    """
    share = tokens.double() / tokens.sum()
    return float(-torch.xlogy(share, share).sum() / torch.log(torch.tensor(max(len(tokens), 2.0))))
