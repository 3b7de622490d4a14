"""The loss of held-out text, over what is to be predicted alone."""

import math

import pytest

pytest.importorskip("torch")

import torch

from tests.tiny_hf import make_hf_model, tiny_ids
from turbosparse.data.mixture import PackedSequence
from turbosparse.measure.held_out_loss import mean_loss


def test_labels_below_zero_are_not_scored() -> None:
    model = make_hf_model()
    ids = tiny_ids()
    positions = list(range(ids.shape[1]))
    labels = ids.clone()
    labels[0, 5] = labels[1, 0] = labels[
        1, 9
    ] = -100  # the first of a sequence is none to be predicted anyway
    rows = [
        PackedSequence(input_ids=row.tolist(), position_ids=positions, labels=learnt.tolist())
        for row, learnt in zip(ids, labels, strict=True)
    ]
    with torch.no_grad():
        losses = -model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    scored = losses[labels[:, 1:] >= 0]
    assert len(scored) == losses.numel() - 2
    assert mean_loss(model, rows, batch_size=1) == pytest.approx(float(scored.mean()), rel=1e-5)
    assert math.isnan(mean_loss(model, []))
