"""transformers' Trainer with the losses of a stage, atomic checkpoints and metrics as JSON lines."""

import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer

from turbosparse.data.encoding import IGNORED_LABEL
from turbosparse.errors import ConfigError, TrainingError
from turbosparse.measure.divergence import logit_divergence, relative_error
from turbosparse.sparsify.checkpoints import (
    COMPLETE_FILE,
    checkpoint_steps,
    load_weights,
    reading,
    sync_files,
    writing,
)
from turbosparse.sparsify.probes import ProbeSet
from turbosparse.sparsify.recipe import StageConfig
from turbosparse.sparsify.routing import balance_loss
from turbosparse.sparsify.schedules import learning_rate_factor, ramp
from turbosparse.sparsify.stream import SequenceStream
from turbosparse.sparsify.weight_average import WeightAverage

__all__ = ["StageTrainer"]

_LOG = logging.getLogger(__name__)


class StageTrainer(Trainer):
    """Trains one stage.

    Parameters
    ----------
    stage : StageConfig
        Losses and schedules.
    stream : SequenceStream
        Training data.
    teacher : PreTrainedModel or None
        The original model, where a loss needs it.
    identity : dict
        What a checkpoint must have in common with the run that resumes it; stored in each.
    metrics_file : Path
        Where JSON lines are appended.
    keep_checkpoints : int
        Checkpoints kept.
    average : WeightAverage or None
        Goes into the checkpoints.
    **trainer_arguments
        Of `transformers.Trainer`; ``model`` has `GatedFFN` modules unless it is a control.
    """

    def __init__(
        self,
        *,
        stage: StageConfig,
        stream: SequenceStream,
        teacher: Any,
        identity: dict[str, Any],
        metrics_file: Path,
        keep_checkpoints: int,
        average: WeightAverage | None,
        **trainer_arguments: Any,
    ) -> None:
        super().__init__(train_dataset=stream, **trainer_arguments)
        self.lr_scheduler: Any
        self.stage = stage
        self.stream = stream
        self.teacher = teacher
        self.loss_is_scaled_for_ga = True
        self.probes = ProbeSet(self.model)
        self._identity = identity
        self.tensorboard: Any = None
        """A SummaryWriter, where metrics are drawn as well."""
        self.metrics_error: OSError | None = None
        self._metrics_file = metrics_file
        self._keep_checkpoints = keep_checkpoints
        self._average = average
        if average is not None:
            self.add_callback(average)
        self._staging: str | None = None
        self._warned_of_nothing = False
        self._last_inputs: dict[str, Any] = {}
        self._parts: dict[str, Tensor] = {}
        self._parts_since: int | None = None  # the step after which they are summed
        self._layer_errors: Tensor | None = None
        self._clock: tuple[float, int] | None = None  # when metrics were last taken, and tokens until then
        before = getattr(self.model.config, "turbosparse_training", {})  # what stages before this one did
        self._tokens_before = int(before.get("tokens", 0))
        loss = stage.loss
        self._experts_per_token = int(getattr(self.model.config, "num_experts_per_tok", 0))
        if loss.router_balance and not self._experts_per_token:
            raise ConfigError(
                f"[stages.{stage.name}.loss.router_balance] expected a mixture of experts, got a model of "
                f"type {self.model.config.model_type}"
            )
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        if stage.top_k > vocabulary:
            raise ConfigError(
                f"[stages.{stage.name}.top_k] expected at most the vocabulary's {vocabulary} tokens, got "
                f"{stage.top_k}"
            )
        if loss.activation_l1:
            self.probes.keep_l1()
        if loss.ffn_output:
            forced = loss.is_regression_only
            self.probes.regress(teacher, teacher_forced=forced, linked=forced and self.is_fsdp_enabled)

    # Losses

    @property
    def _accumulation(self) -> int:
        return int(self.args.gradient_accumulation_steps)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's part of the step's loss; the parts add up to the mean over all tokens."""
        loss = self.stage.loss
        labels = inputs["labels"][:, 1:]
        model_inputs = {
            "input_ids": inputs["input_ids"],
            "position_ids": inputs["position_ids"],
            "use_cache": False,
        }
        self._last_inputs = model_inputs
        self.set_progress()
        if self._parts_since is None:
            self._parts_since = self.state.global_step
        with self.probes.watch():
            outputs = model(
                **model_inputs,
                output_hidden_states=loss.hidden_states > 0,
                logits_to_keep=1 if loss.is_regression_only else 0,
                **({"output_router_logits": True} if loss.router_balance else {}),
            )
        learnt = labels != IGNORED_LABEL
        items = learnt.sum() if num_items_in_batch is None else num_items_in_batch
        if num_items_in_batch is not None and not items:
            self._warn_of_nothing()
        per_item = self.accelerator.num_processes / max(float(items), 1.0)
        parts: dict[str, tuple[float, Tensor]] = {}
        if loss.needs_teacher:
            with torch.no_grad():
                expected = self.teacher(**model_inputs, output_hidden_states=loss.hidden_states > 0)
            parts |= self._teacher_losses(outputs, expected, learnt, per_item)
        if loss.next_token or loss.logits:
            # All positions: picking those with a label would copy logits and scatter gradients.
            targets = functional.pad(labels, (0, 1), value=IGNORED_LABEL).flatten()
            logits = outputs.logits.flatten(0, 1)
            cross_entropy = _cross_entropy(logits, targets) if loss.next_token else _watched(logits, targets)
            parts["next_token"] = (loss.next_token, cross_entropy * per_item)
        if loss.router_balance:
            balance = balance_loss(outputs.router_logits, experts_per_token=self._experts_per_token)
            parts["router_balance"] = (loss.router_balance, balance / self._accumulation)
        l1, ffn_error, layer_errors = self.probes.take_losses()
        if l1 is not None:
            weight = loss.activation_l1 * ramp(
                self._tokens_done(), self.stage.l1_ramp_tokens, self.stage.l1_ramp
            )
            parts["activation_l1"] = (weight, l1 / self._accumulation)
        if ffn_error is not None:
            parts["ffn_output"] = (loss.ffn_output, ffn_error / self._accumulation)
            self._add_layer_errors(torch.stack(layer_errors) / self._accumulation)
        total = torch.stack([weight * value for weight, value in parts.values()]).sum()
        if self.is_fsdp_enabled and loss.is_regression_only:
            total = total + 0.0 * outputs.logits.sum()
        for name, (_, value) in parts.items():
            self._parts[name] = self._parts.get(name, torch.zeros_like(value)) + value.detach()
        return (total, outputs) if return_outputs else total

    def _warn_of_nothing(self) -> None:
        if not self._warned_of_nothing:
            self._warned_of_nothing = True
            _LOG.warning(
                "[%s] step %d has no token to learn%s",
                self.stage.name,
                self.state.global_step + 1,
                ": with answers_only it needs chats with answers" if self.stage.answers_only else "",
            )

    def _teacher_losses(
        self, outputs: Any, expected: Any, learnt: Tensor, per_item: float
    ) -> dict[str, tuple[float, Tensor]]:
        loss = self.stage.loss
        parts: dict[str, tuple[float, Tensor]] = {}
        if loss.logits:
            divergence = logit_divergence(
                outputs.logits[:, :-1].flatten(0, 1),
                expected.logits[:, :-1].flatten(0, 1),
                weight=learnt.flatten().float(),
                temperature=self.stage.temperature,
                top_k=self.stage.top_k,
            )
            parts["logits"] = (loss.logits, divergence * learnt.sum() * per_item)
        if loss.hidden_states:
            pairs = zip(outputs.hidden_states[1:], expected.hidden_states[1:], strict=True)
            errors = torch.stack([relative_error(state, target) for state, target in pairs])
            parts["hidden_states"] = (loss.hidden_states, errors.mean() / self._accumulation)
        return parts

    def set_progress(self) -> None:
        """Set how far the activation is by now; at the end of the stage it is what the saved model has."""
        done = self._tokens_done()
        if self.state.global_step >= self.args.max_steps:
            done = max(self.stage.blend_tokens, self.stage.threshold_tokens)
        self.probes.set_progress(
            blend=ramp(done, self.stage.blend_tokens), threshold=ramp(done, self.stage.threshold_tokens)
        )

    def _tokens_done(self) -> int:
        steps = int(self.state.global_step)
        return steps * self.stage.batch_sequences * self.stream.mixture.sequence_length

    def _add_layer_errors(self, errors: Tensor) -> None:
        self._layer_errors = errors if self._layer_errors is None else self._layer_errors + errors

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch; stop before the weights can change if its loss is not finite."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.check_finite("loss", loss, step=self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.check_finite("gradient norm", norm, step=self.state.global_step + 1)
        return norm

    def check_finite(self, name: str, value: Any, *, step: int) -> None:
        """Stop a run that diverged.

        Parameters
        ----------
        name : str
            What the value is.
        value : float or Tensor
            One number.
        step : int
            Where it arose.

        Raises
        ------
        TrainingError
            If it is infinite or NaN.
        """
        if math.isfinite(float(value)):
            return
        steps = checkpoint_steps(Path(self.args.output_dir))
        left = f"checkpoint-{steps[-1]} is intact" if steps else "there is no checkpoint of this stage yet"
        raise TrainingError(
            f"[{self.stage.name}] expected a finite {name}, got {float(value)} at step {step}; {left}: lower "
            "the learning rate"
        )

    @torch.no_grad()
    def _check_weights(self) -> None:
        """Refuse weights that a step blew up: its own loss was still that of the weights before."""
        only_last = 1 if self.stage.loss.is_regression_only else 0
        training = self.model.training
        self.model.eval()
        with self.accelerator.autocast():
            logits = self.model(**self._last_inputs, logits_to_keep=only_last).logits
        self.model.train(training)
        self.check_finite("output", logits.abs().max(), step=self.state.global_step)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the learning rate follow the stage's schedule."""
        if self.lr_scheduler is None:
            sequence_length = self.stream.mixture.sequence_length
            step_tokens = self.stage.batch_sequences * sequence_length

            def _factor(step: int) -> float:
                return learning_rate_factor(
                    step,
                    steps=num_training_steps,
                    warmup_steps=math.ceil(self.stage.warmup_tokens / step_tokens),
                    decay_steps=self.stage.decay_tokens // step_tokens,
                    schedule=self.stage.schedule,
                    final=self.stage.final_learning_rate / self.stage.learning_rate,
                )

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, _factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, but let the recipe decide the rates, so that a run can go on with others."""
        if checkpoint is None:
            return
        with reading(Path(checkpoint)):
            # transformers would begin with an empty optimizer.
            for kind in ("optimizer", "scheduler"):
                if not any(Path(checkpoint).glob(f"{kind}*")):
                    raise FileNotFoundError(f"no {kind}")
            super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        peak = self.stage.learning_rate
        scheduler.base_lrs = [peak] * len(self.optimizer.param_groups)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = peak
            group["betas"] = (self.args.adam_beta1, self.args.adam_beta2)
            group["lr"] = peak * scheduler.lr_lambdas[0](scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:  # the Trainer would leave out what the files name differently
            load_weights(self.model, Path(resume_from_checkpoint))
            return
        with reading(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)

    # Metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add loss parts, zeros per layer and speed to what the Trainer logs; append it to the metrics."""
        record: dict[str, Any] = dict(logs)
        if "loss" in logs:
            record |= self._take_training_metrics()
        super().log(
            {name: value for name, value in record.items() if isinstance(value, int | float)}, start_time
        )
        self.write_metrics(record)

    def _take_training_metrics(self) -> dict[str, Any]:
        steps = max(self.state.global_step - (self._parts_since or 0), 1)
        now, tokens = time.monotonic(), self._tokens_done()
        metrics: dict[str, Any] = {
            f"loss_{name}": float(self.accelerator.gather(value.reshape(1)).mean()) / steps
            for name, value in self._parts.items()
        }
        if "loss_next_token" in metrics:
            metrics["perplexity"] = math.exp(min(metrics["loss_next_token"], 700.0))
        if self._layer_errors is not None:
            metrics["ffn_error_per_layer"] = [round(float(error) / steps, 5) for error in self._layer_errors]
        metrics |= self.probes.take_metrics()
        if self._clock is not None:
            before, tokens_before = self._clock
            metrics["tokens_per_second"] = (tokens - tokens_before) / max(now - before, 1e-9)
        metrics["tokens"] = tokens
        self._clock, self._parts_since = (now, tokens), self.state.global_step
        self._parts, self._layer_errors = {}, None
        return metrics

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Append one JSON line, from the main process alone.

        Parameters
        ----------
        record : dict
            Names and numbers, or lists of numbers.
        """
        if not self.is_world_process_zero() or self.metrics_error is not None:
            return
        line = {
            "stage": self.stage.name,
            "step": self.state.global_step,
            "time": round(time.time(), 1),
            **record,
        }
        try:
            if self.tensorboard is not None:
                self._draw(record)
            with self._metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # the run stops with a checkpoint at the end of the step
            self.metrics_error = error

    def _draw(self, record: dict[str, Any]) -> None:
        """Show what the Trainer does not: values per layer, and all of evaluations."""
        event = record.get("event")
        place = f"{event or 'train'}/"
        for name, value in record.items():
            if isinstance(value, list):
                for layer, part in enumerate(value):
                    self.tensorboard.add_scalar(f"{place}{name}/{layer}", part, self.state.global_step)
            elif event and isinstance(value, int | float):
                self.tensorboard.add_scalar(place + name, value, self.state.global_step)
        self.tensorboard.flush()

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a Hugging Face directory; inside of checkpoints, a sharded run writes shards instead."""
        config = self.accelerator.unwrap_model(self.model).config
        tokens = self._tokens_before + self._tokens_done()
        config.turbosparse_training = {"stage": self.stage.name, "tokens": tokens}
        if self.is_fsdp_enabled and not _internal_call:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(output_dir, _internal_call=_internal_call)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside the others and give it its name when it is whole."""
        root = Path(self.args.output_dir)
        staging = root / ".incomplete"
        name = f"checkpoint-{self.state.global_step}"
        is_main = self.is_world_process_zero()
        self._check_weights()
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = str(staging)
        try:
            with writing(root / name, staging):
                super()._save_checkpoint(model, trial)
                if self._average is not None:
                    self._average.save(staging / name)
                if is_main:
                    self.stream.save(self.state.global_step, staging / name)
                    (staging / name / COMPLETE_FILE).write_text(json.dumps(self._identity), encoding="utf-8")
                    sync_files(staging / name)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if is_main:
            shutil.rmtree(root / name, ignore_errors=True)
            (staging / name).replace(root / name)
            shutil.rmtree(staging, ignore_errors=True)
            for step in checkpoint_steps(root)[: -self._keep_checkpoints]:
                shutil.rmtree(root / f"checkpoint-{step}", ignore_errors=True)
            _LOG.info("checkpoint %s", root / name)
        self.accelerator.wait_for_everyone()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED_LABEL, reduction="sum")


@torch.no_grad()
def _watched(logits: Tensor, targets: Tensor) -> Tensor:
    """Estimate the sum from every eighth position: all of them would take 3 % of a step."""
    part = targets[::8]
    mean = _cross_entropy(logits[::8], part) / (part != IGNORED_LABEL).sum().clamp(min=1)
    return mean * (targets != IGNORED_LABEL).sum()
