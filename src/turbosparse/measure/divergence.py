"""How far a model is from another, as losses to train by; written so that a CPU can afford them."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["logit_divergence", "relative_error"]

_ROWS = 32  # logits of so many tokens are in fp32 at a time: few enough that a processor's cache holds them
_TINY = 1e-12


class _LogitDivergence(torch.autograd.Function):
    """KL(teacher || student), with the gradient computed in the forward pass.

    The gradient by the student's logits is T * (q - p); with it at hand, nothing but one tensor of the
    logits' own type has to be kept, where autograd would keep four in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, temperature: float, top_k: int
    ) -> Tensor:
        total = student.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(student)
        for start in range(0, len(student), _ROWS):
            rows = slice(start, start + _ROWS)
            log_q = _log_softmax(student[rows], temperature)
            log_p = _log_softmax(teacher[rows], temperature)
            if top_k:
                log_p = _keep_top(log_p, log_q, top_k)
            p, q = log_p.exp(), log_q.exp()
            scale = weight[rows] * temperature**2
            total += log_p.sub_(log_q).mul_(p).sum(-1).mul(scale).sum()
            gradient[rows] = q.sub_(p).mul_((scale / temperature)[:, None]).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def _keep_top(log_p: Tensor, log_q: Tensor, k: int) -> Tensor:
    """Spread the teacher's mass outside its top k as the student does: only its size is learnt."""
    values, index = log_p.topk(k, dim=-1)
    rest_p = torch.log1p(-values.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    rest_q = torch.log1p(-log_q.gather(-1, index).exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    return (log_q + (rest_p - rest_q)).scatter(-1, index, values)


def logit_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
) -> Tensor:
    """Return the mean KL divergence of the student's next-token distributions from the teacher's.

    Parameters
    ----------
    student : Tensor of shape [N, V]
        Logits with gradient.
    teacher : Tensor of shape [N, V]
        Logits of the original model.
    weight : Tensor of shape [N], optional
        Weight of each token; all equal if not given.
    temperature : float, default 1.0
        Softens both distributions; the loss is multiplied by its square.
    top_k : int, default 0
        Compare the teacher's k most likely tokens and the mass of all others as one; 0 compares all.

    Returns
    -------
    Tensor
        A scalar in nats, fp32.

    References
    ----------
    Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
    """
    if weight is None:
        weight = student.new_ones(len(student), dtype=torch.float32)
    weight = weight / weight.sum().clamp(min=1)
    loss: Tensor = _LogitDivergence.apply(student, teacher, weight, temperature, top_k)
    return loss


def relative_error(output: Tensor, reference: Tensor) -> Tensor:
    """Return the squared error of each token's vector as a share of the reference's squared norm, averaged.

    Parameters
    ----------
    output : Tensor of shape [..., D]
        What was computed.
    reference : Tensor of shape [..., D]
        What it should be.

    Returns
    -------
    Tensor
        A scalar, fp32; 0 is exact, 1 is as bad as zeros.
    """
    reference = reference.detach().float()
    error = (output.float() - reference).square().sum(-1)
    return (error / reference.square().sum(-1).clamp(min=_TINY)).mean()
