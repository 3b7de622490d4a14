"""Losses against plain autograd."""

import pytest
import torch
from torch.nn import functional

from turbosparse.measure.divergence import logit_divergence, relative_error

N, V = 300, 37  # more rows than are handled at a time


def random_logits(seed: int) -> torch.Tensor:
    return 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


def plain(
    student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor, t: float, k: int
) -> torch.Tensor:
    p, q = torch.softmax(teacher / t, -1), torch.softmax(student / t, -1)
    if k:
        index = p.topk(k).indices
        p, q = p.gather(-1, index), q.gather(-1, index)
        p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
        q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    divergence = (p * (p.log() - q.log())).sum(-1)
    return (divergence * weight).sum() / weight.sum() * t**2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 5])
def test_divergence_and_its_gradient(temperature: float, top_k: int) -> None:
    teacher = random_logits(1)
    weight = (torch.arange(N) % 3 > 0).float()
    ours, plainly = random_logits(2).requires_grad_(), random_logits(2).requires_grad_()
    loss = logit_divergence(ours, teacher, weight=weight, temperature=temperature, top_k=top_k)
    expected = plain(plainly, teacher, weight, temperature, top_k)
    torch.autograd.backward([2 * loss, 2 * expected])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, plainly.grad)


def test_divergence_of_equal_distributions_is_zero() -> None:
    logits = random_logits(3)
    assert float(logit_divergence(logits, logits + 5.0)) == pytest.approx(0, abs=1e-5)


def test_divergence_matches_torch() -> None:
    student, teacher = random_logits(4), random_logits(5)
    expected = functional.kl_div(
        functional.log_softmax(student, -1),
        functional.log_softmax(teacher, -1),
        log_target=True,
        reduction="batchmean",
    )
    torch.testing.assert_close(logit_divergence(student.requires_grad_(), teacher), expected)


def test_relative_error() -> None:
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    output = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert float(relative_error(output, reference)) == pytest.approx((1 + 0.25) / 2)
    assert float(relative_error(reference, reference)) == 0
