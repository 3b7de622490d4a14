"""Train predictors, and the model if wished, with the mask of candidates in the forward pass.

The mask is 0 or 1 forward; its gradient is that of the sigmoid (straight-through). The loss is the KL
divergence from the model without predictors as it was before, plus the price of the bytes of all candidates:
the same exchange of loss for bytes by which thresholds were chosen, so that predictors cannot get better by
naming everything. Turbo Sparse (arXiv 2406.05955) trains Mixtral's predictors inside of the model like this.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from turbosparse.data.mixture import PackedSequence
from turbosparse.errors import TrainingError
from turbosparse.measure.divergence import logit_divergence
from turbosparse.measure.held_out_loss import batch_of
from turbosparse.predict.config import PredictorConfig
from turbosparse.predict.end_to_end import PlacedPredictor, predictors_on
from turbosparse.predict.layers import FFNLayer
from turbosparse.predict.predictors import LowRankPredictor

__all__ = ["finetune"]

_LOG = logging.getLogger(__name__)


def finetune(
    model: Any,
    placed: Mapping[str, PlacedPredictor],
    layers: Mapping[str, FFNLayer],
    rows: Sequence[PackedSequence],
    price: float,
    config: PredictorConfig,
) -> None:
    """Train in place.

    Parameters
    ----------
    model : PreTrainedModel
        The model; its weights change only with ``config.finetune = "model"``.
    placed : mapping of str to PlacedPredictor
        Predictors and thresholds; layers that are not in it run without.
    layers : mapping of str to FFNLayer
        What their rows cost.
    rows : sequence of PackedSequence
        Text to train on, gone through in order and again.
    price : float
        KL divergence that a byte per token is worth, in nats.
    config : PredictorConfig
        Steps, sequences per step, learning rate.

    Raises
    ------
    TrainingError
        If the loss is not finite.
    """
    teacher = copy.deepcopy(model) if config.finetune == "model" else model
    predictors = [each.predictor for each in placed.values() if isinstance(each.predictor, LowRankPredictor)]
    trained = [parameter for predictor in predictors for parameter in predictor.parameters()]
    trained += model.parameters() if config.finetune == "model" else ()
    if not trained:
        _LOG.warning("nothing to fine-tune: no layer has a predictor")
        return
    frozen = [parameter for parameter in model.parameters() if config.finetune != "model"]
    for parameter in (*frozen, *teacher.parameters()):
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=config.finetune_learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.finetune_steps)
    for step in range(config.finetune_steps):
        first = step * config.finetune_sequences
        batch = batch_of([rows[(first + i) % len(rows)] for i in range(config.finetune_sequences)])
        with torch.no_grad():
            expected = teacher(**batch, use_cache=False).logits.flatten(0, 1)
        with predictors_on(model, placed) as candidates:
            got = model(**batch, use_cache=False).logits.flatten(0, 1)
        per_token = [
            masks.sum() * sum(layers[name].row_bytes) / len(got) for name, masks in candidates.items()
        ]
        divergence = logit_divergence(got, expected)
        loss = divergence + price * torch.stack(per_token).sum()
        if not torch.isfinite(loss):
            raise TrainingError(f"[fine-tuning] expected a finite loss, got {loss.item()} at step {step + 1}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        _LOG.info("fine-tuning step %d: KL %.4f, loss %.4f", step + 1, divergence.item(), loss.item())
    for parameter in trained:
        parameter.requires_grad_(False)
