"""One stage of a run: model, original, data and trainer put together, trained, and saved."""

import dataclasses
import hashlib
import json
import logging
import math
import os
import platform
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, PrinterCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import set_seed

from turbosparse.data.config import SourceConfig
from turbosparse.data.encoding import make_encoder
from turbosparse.data.held_out import split_of
from turbosparse.data.mixture import Mixture
from turbosparse.errors import ConfigError, DataError, ModelFileError, TrainingError
from turbosparse.measure.held_out_loss import batch_of, mean_loss
from turbosparse.models.activations import parse_activation
from turbosparse.models.gated_ffn import gated_ffns, replace_ffns
from turbosparse.models.registry import (
    activation_of,
    activation_of_config,
    base_fingerprint,
    check_swappable,
    load_config,
    load_model,
    load_tokenizer,
    swap_activation,
)
from turbosparse.sparsify.callbacks import EndReachedError, RunCallback
from turbosparse.sparsify.checkpoints import (
    check_identity,
    latest_checkpoint,
    read_identity,
    step_of,
    sync_files,
    writing,
)
from turbosparse.sparsify.evaluation_texts import PERPLEXITY, evaluation_texts, texts_of_original
from turbosparse.sparsify.initial_fit import fit_swapped_ffns
from turbosparse.sparsify.metrics_file import METRICS_FILE, forget_metrics, read_metrics
from turbosparse.sparsify.model_card import DRAWN_FILE, model_card
from turbosparse.sparsify.recipe import Recipe, StageConfig, recipe_to_dict
from turbosparse.sparsify.sharding import fsdp_arguments, shard_teacher
from turbosparse.sparsify.stream import DATA_STATE_FILE, SequenceStream
from turbosparse.sparsify.trainer import StageTrainer
from turbosparse.sparsify.upcycling import start_of
from turbosparse.sparsify.weight_average import WeightAverage

__all__ = ["MODEL_DIRECTORY", "RECORD_FILE", "Stage"]

_LOG = logging.getLogger(__name__)
MODEL_DIRECTORY = "model"
RECORD_FILE = "run.json"
# Up to here plain attention beats torch's fused CPU kernel: steps on sequences of 256 take 0.89 of the time.
_SHORT_SEQUENCE = 512


class Stage:
    """Everything one stage needs, built in the order in which it can fail cheaply.

    Parameters
    ----------
    recipe : Recipe
        The whole run.
    stage : StageConfig
        This stage of it.
    directory : Path
        Where the stage writes.
    previous : Path or None
        Model of the stage before; None starts from the recipe's.
    from_checkpoint : Path or None
        Checkpoint of another run, used as long as the stage has none of its own.
    control : bool
        Leave the activation as it is.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: StageConfig,
        directory: Path,
        previous: Path | None,
        from_checkpoint: Path | None,
        *,
        control: bool,
    ) -> None:
        self.recipe, self.stage, self.directory, self.previous = recipe, stage, directory, previous
        self.control = control
        self.data = recipe.data_of(stage)
        self._check_model()
        self.tokenizer = load_tokenizer(recipe.model)
        self.encode = make_encoder(self.tokenizer, self.data.document_end, answers_only=stage.answers_only)
        self.split = split_of(self.data)
        # A mixture of the stage's own must not begin with the documents that an earlier stage began with.
        order = recipe.seed + (recipe.stages.index(stage) if stage.data else 0)
        self.mixture = Mixture(self.data, self.encode, split=self.split, seed=order)
        self.evaluation = evaluation_texts(recipe, self.data, self.encode, self.split)
        self.checkpoint = latest_checkpoint(directory) or from_checkpoint
        self.trainable = "ffn" if stage.loss.is_regression_only else stage.trainable
        if control and self.checkpoint is not None:  # those of earlier versions train all weights
            self.trainable = read_identity(self.checkpoint).get("trainable", "all")
        self.stream = SequenceStream(
            self.mixture, stage.batch_sequences, steps=stage.steps(self.data.sequence_length)
        )
        known = texts_of_original(Path(recipe.output) / METRICS_FILE, stage.name if stage.data else None)
        self.original_unknown = [name for name in self.evaluation if name not in known]
        self.average = (
            WeightAverage(max(stage.average_tokens / self._step_tokens(), 1.0), self.checkpoint)
            if stage.average_tokens
            else None
        )

    def _check_model(self) -> None:
        """Refuse what the losses or the swap will, before any text is read."""
        if self.previous is not None:
            return
        config = load_config(start_of(self.recipe))
        if self.control or self.recipe.from_scratch:
            original = activation_of_config(config)
            if self.control or parse_activation(self.recipe.activation) == original:
                return
        check_swappable(config)

    def train(self) -> bool:
        """Train the stage to its end; False if a signal came first."""
        set_seed(self.recipe.seed)
        arguments = self._arguments()
        teacher = self._load_teacher(arguments.device)
        model = self._load_model(arguments.device)
        if teacher is not None and self.recipe.fsdp:
            shard_teacher(teacher)
        if arguments.device.type == "cpu" and self.data.sequence_length <= _SHORT_SEQUENCE:
            for each in filter(None, (model, teacher)):
                each.set_attn_implementation("eager")
        identity = self._identity(model)
        if self.checkpoint is not None:
            check_identity(self.checkpoint, identity)
            self.stream.restore(self.checkpoint, step=step_of(self.checkpoint))
            _LOG.info("[%s] goes on from %s", self.stage.name, self.checkpoint)
        elif self.previous is not None and self.stage.data is None:
            self.stream.restore(self.previous, step=0)
        _set_trainable(model, self.trainable)
        trainer = StageTrainer(
            model=model,
            args=arguments,
            stage=self.stage,
            stream=self.stream,
            teacher=teacher,
            identity=identity,
            metrics_file=Path(self.recipe.output) / METRICS_FILE,
            keep_checkpoints=self.recipe.keep_checkpoints,
            average=self.average,
            processing_class=self.tokenizer,
        )
        self._write_record(trainer.is_world_process_zero())
        return self._run(trainer)

    def _run(self, trainer: StageTrainer) -> bool:
        """Train, and save the model if no signal came."""
        if trainer.is_world_process_zero():
            done = -1 if self.checkpoint is None else step_of(self.checkpoint)
            forget_metrics(Path(self.recipe.output) / METRICS_FILE, self.stage.name, after=done)
        callback = RunCallback(
            self.recipe,
            self._step_tokens(),
            evaluate=lambda: self._evaluate(trainer),
            failed=lambda: trainer.metrics_error is not None,
        )
        trainer.remove_callback(PrinterCallback)  # the run logs its own lines
        trainer.add_callback(callback)
        if self.recipe.tensorboard:
            directory = Path(self.recipe.output) / "tensorboard" / self.stage.name
            trainer.tensorboard = SummaryWriter(str(directory))
            trainer.add_callback(TensorBoardCallback(trainer.tensorboard))
        try:
            trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        except EndReachedError:
            if not self._is_evaluated(trainer.state.global_step):
                self._evaluate(trainer)
        finally:
            callback.release()
        if trainer.metrics_error is not None:
            raise TrainingError(
                f"[{Path(self.recipe.output) / METRICS_FILE}] expected room for the metrics, got "
                f"{trainer.metrics_error}; the run goes on from its last checkpoint"
            )
        if trainer.state.global_step < trainer.state.max_steps:
            return False
        self._save_model(trainer)
        return True

    def _identity(self, model: Any) -> dict[str, Any]:
        """What a checkpoint must have in common with the stage."""
        base = "" if self.recipe.from_scratch else base_fingerprint(self.recipe.model)
        return {
            "stage": self.stage.name,
            "activation": str(activation_of(model)),
            "fsdp": self.recipe.fsdp,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "trainable": self.trainable,
            "batch_sequences": self.stage.batch_sequences,
            "sequence_length": self.data.sequence_length,
            **({"base_model": base} if base else {}),
        }

    def _arguments(self) -> Any:
        recipe, stage = self.recipe, self.stage
        bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and has_bf16())
        world = int(os.environ.get("WORLD_SIZE", "1"))
        per_round = stage.micro_batch * world
        if stage.batch_sequences % per_round:
            raise ConfigError(
                f"[stages.{stage.name}.batch_sequences] expected a multiple of micro_batch * processes = "
                f"{stage.micro_batch} * {world}, got {stage.batch_sequences}"
            )
        arguments = TrainingArguments(
            output_dir=str(self.directory),
            max_steps=stage.steps(self.data.sequence_length),
            per_device_train_batch_size=stage.micro_batch,
            gradient_accumulation_steps=stage.batch_sequences // per_round,
            learning_rate=stage.learning_rate,
            weight_decay=stage.weight_decay,
            adam_beta1=stage.beta1,
            adam_beta2=stage.beta2,
            max_grad_norm=stage.max_gradient_norm,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            **(
                fsdp_arguments(stage.gradient_checkpointing)
                if recipe.fsdp
                else _activation_checkpointing(stage.gradient_checkpointing)
            ),
            logging_steps=recipe.log_steps,
            logging_nan_inf_filter=False,
            save_strategy="no",
            eval_strategy="no",
            ignore_data_skip=True,
            disable_tqdm=True,
            report_to="none",
            seed=recipe.seed,
            data_seed=recipe.seed,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,  # losses inside of the FFNs are no outputs of the model
            dataloader_pin_memory=torch.cuda.is_available(),
            accelerator_config={"dispatch_batches": True},
        )
        if arguments.n_gpu > 1:  # nn.DataParallel, which the Trainer would take, copies no probes
            _LOG.warning(
                "[%s] trains on one of %d GPUs; start it with torchrun --nproc_per_node %d to use all",
                stage.name,
                arguments.n_gpu,
                arguments.n_gpu,
            )
            arguments._n_gpu = 1
        return arguments

    def _load_teacher(self, device: Any) -> Any:
        loss = self.stage.loss
        if not (loss.needs_teacher or loss.ffn_output):
            return None
        if self.recipe.from_scratch:
            raise ConfigError(
                "[from_scratch] expected next_token and activation_l1 losses only, got one of a teacher"
            )
        dtype = torch.bfloat16 if has_bf16() and self.recipe.precision != "fp32" else torch.float32
        # An upcycled mixture starts as the dense model, which is cheaper; FFNs are compared one by one.
        teacher = load_model(start_of(self.recipe) if loss.ffn_output else self.recipe.model, dtype=dtype)
        _keep_activation(teacher)
        teacher.requires_grad_(False)
        return teacher if self.recipe.fsdp else teacher.to(device)  # sharding moves it, layer by layer

    def _load_model(self, device: Any) -> Any:
        recipe = self.recipe
        if self.previous is not None:
            model = load_model(self.previous, dtype=torch.float32)
            return _keep_activation(model)
        if recipe.from_scratch:
            config = load_config(recipe.model)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:
            model = load_model(start_of(recipe), dtype=torch.float32)
        activation = parse_activation(recipe.activation)
        if self.control or (recipe.from_scratch and activation == activation_of(model)):
            return _keep_activation(model)
        swap_activation(model, activation)
        fit = recipe.initial_fit_tokens and not recipe.from_scratch and not self.stage.blend_tokens
        if self.checkpoint is None and fit:
            self._fit(model.to(device))
        return model

    def _fit(self, model: Any) -> None:
        count = math.ceil(self.recipe.initial_fit_tokens / self.data.sequence_length)
        rows = Mixture(self.data, self.encode, split=self.split, seed=self.recipe.seed)
        text = [row for row, _ in zip(rows, range(count), strict=False)]
        if not text:
            raise DataError("[data] expected text for the initial fit, got less than one sequence")
        _LOG.info(
            "[%s] fitting the swapped FFNs to the original ones on %d sequences", self.stage.name, count
        )
        errors = fit_swapped_ffns(model.eval(), batch_of(text, model.device))
        known = [error for error in errors if not math.isnan(error)]
        if not known:
            raise ModelFileError(
                f"[{start_of(self.recipe)}] expected a model whose FFNs return numbers, got NaN"
            )
        _LOG.info(
            "[%s] squared error of %d FFN outputs, relative: mean %.2f, worst %.2f%s",
            self.stage.name,
            len(known),
            sum(known) / len(known),
            max(known),
            f"; {len(errors) - len(known)} experts saw no token" if len(known) < len(errors) else "",
        )

    def _evaluate(self, trainer: StageTrainer) -> None:
        model = trainer.model
        was_training = model.training
        model.eval()
        trainer.set_progress()
        training_counts = trainer.probes.take_counts()
        record: dict[str, Any] = {
            "event": "evaluation",
            "tokens": trainer.state.global_step * self._step_tokens(),
        }
        with trainer.probes.watch(), self._averaged():
            record |= self._perplexities(trainer, model, self.evaluation)
        record |= trainer.probes.take_metrics()
        trainer.probes.put_counts(training_counts)
        model.train(was_training)
        self._report(trainer, record)
        if trainer.teacher is not None and self.original_unknown:
            found = self._perplexities(trainer, trainer.teacher, self.original_unknown)
            self._report(trainer, {"event": "original", **found})
            self.original_unknown = []

    def _is_evaluated(self, step: int) -> bool:
        return any(
            line.get("event") == "evaluation" and (line["stage"], line["step"]) == (self.stage.name, step)
            for line in read_metrics(Path(self.recipe.output) / METRICS_FILE)
        )

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.applied()

    def _perplexities(self, trainer: StageTrainer, model: Any, texts: Iterable[str]) -> dict[str, float]:
        perplexities = {}
        with trainer.accelerator.autocast():
            for name in texts:
                rows = self.evaluation[name]
                loss = mean_loss(model, rows, batch_size=self.stage.micro_batch, device=trainer.args.device)
                trainer.check_finite(f"loss on {name}", loss, step=trainer.state.global_step)
                perplexities[PERPLEXITY + name] = math.exp(min(loss, 700.0))
        return perplexities

    def _report(self, trainer: StageTrainer, record: dict[str, Any]) -> None:
        trainer.write_metrics(record)
        text = ", ".join(
            f"{name.removeprefix(PERPLEXITY)} {value:.2f}"
            for name, value in record.items()
            if name.startswith(PERPLEXITY)
        )
        found = f"; zeros {record['zeros']:.1%}" if record.get("zeros") else ""
        if "routing_entropy" in record:
            found += f"; routing entropy {record['routing_entropy']:.3f}"
        _LOG.info("[%s] held-out perplexity: %s%s", record["event"], text, found)

    def _step_tokens(self) -> int:
        return self.stage.batch_sequences * self.data.sequence_length

    def _write_record(self, is_main: bool) -> None:
        """Leave beside the output what went in: settings, versions, and a hash of each local source."""
        if not is_main:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        record = {
            "recipe": recipe_to_dict(self.recipe),
            "control": self.control,
            "sources": {
                source.path: _file_hash(source) for source in (*self.data.sources, *self.data.held_out)
            },
            "versions": {name: _version(name) for name in ("turbosparse", "torch", "transformers")},
            "machine": platform.processor() or platform.machine(),
        }
        (self.directory / RECORD_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")

    def _save_model(self, trainer: StageTrainer) -> None:
        """Leave the stage's model as a Hugging Face directory, whole or not at all."""
        staging, final = self.directory / ".model", self.directory / MODEL_DIRECTORY
        with writing(final, staging):
            with self._averaged():
                trainer.save_model(str(staging))
            if trainer.is_world_process_zero():
                self.stream.save(trainer.state.global_step, staging)
                drawn = json.loads((staging / DATA_STATE_FILE).read_text(encoding="utf-8"))["drawn"]
                (self.directory / DRAWN_FILE).write_text(json.dumps(drawn, indent=1), encoding="utf-8")
                if not self.control:
                    metrics = Path(self.recipe.output) / METRICS_FILE
                    card = model_card(self.recipe, self.stage, metrics_file=metrics)
                    (staging / "README.md").write_text(card, encoding="utf-8")
                sync_files(staging)
                staging.replace(final)
        trainer.accelerator.wait_for_everyone()


def _keep_activation(model: Any) -> Any:
    """Give a model that comes without `GatedFFN` modules ones that compute what it does."""
    if not gated_ffns(model):
        replace_ffns(model, activation_of(model), activation_of(model))
    return model


def _set_trainable(model: Any, mode: str) -> None:
    """Freeze what the stage does not train."""
    model.requires_grad_(mode != "ffn")
    if mode == "ffn":
        for ffn in gated_ffns(model).values():
            ffn.requires_grad_(True)
    elif mode == "all_but_embeddings":
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.requires_grad_(False)


def _file_hash(source: SourceConfig) -> str:
    path = Path(source.path)
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # used from a source tree
        return "not installed"


def _activation_checkpointing(enabled: bool) -> dict[str, Any]:
    """transformers 5.20 or so renamed the arguments."""
    name = "activation_checkpointing"
    if name not in {field.name for field in dataclasses.fields(TrainingArguments)}:
        name = "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if enabled else {}


def has_bf16() -> bool:
    """Whether the device multiplies bf16 in hardware."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())
