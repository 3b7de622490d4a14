"""What a run will need, before it starts: memory, steps and time."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from turbosparse.data.encoding import make_encoder
from turbosparse.data.held_out import split_of
from turbosparse.data.mixture import DocumentError, Mixture
from turbosparse.data.readers import open_reader
from turbosparse.errors import ConfigError
from turbosparse.models.activations import parse_activation
from turbosparse.models.registry import activation_of, load_config, load_tokenizer, swap_activation
from turbosparse.sparsify.recipe import Recipe, StageConfig
from turbosparse.sparsify.stage import has_bf16
from turbosparse.sparsify.upcycling import mixture_config

__all__ = ["StageEstimate", "check_data", "estimate_run", "measure_flops", "swapped_outline"]

_PARAMETER_BYTES = 4  # fp32 master weights
_OPTIMIZER_BYTES = 12  # fp32 gradient and two Adam moments
_AVERAGE_BYTES = 4
_MATRIX_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """One stage on one process."""

    name: str
    steps: int
    tokens: int
    memory_gb: float
    """Weights, gradients, optimizer, teacher and logits; activations come on top."""
    flops_per_token: float
    hours: float


def measure_flops(*, bf16: bool, seconds: float = 0.5) -> float:
    """Measure the matrix product speed of the device.

    Parameters
    ----------
    bf16 : bool
        Multiply in bf16 instead of fp32.
    seconds : float, default 0.5
        How long to measure.

    Returns
    -------
    float
        Floating-point operations per second.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(
        _MATRIX_SIZE, _MATRIX_SIZE, device=device, dtype=torch.bfloat16 if bf16 else torch.float32
    )
    (a @ a).sum().item()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        (a @ a).sum().item()
        count += 1
    return count * 2 * _MATRIX_SIZE**3 / (time.perf_counter() - start)


def swapped_outline(recipe: Recipe) -> Any:
    """Build the model that a recipe trains, without its weights.

    Parameters
    ----------
    recipe : Recipe
        The run; of the model only the configuration is read.

    Returns
    -------
    PreTrainedModel
        On the device ``meta``.

    Raises
    ------
    ConfigError
        If its activation cannot be swapped.
    """
    config = load_config(recipe.model)
    if recipe.upcycle is not None:
        config = mixture_config(config, recipe.upcycle)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    activation = parse_activation(recipe.activation)
    if not (recipe.from_scratch and activation == activation_of(model)):
        swap_activation(model, activation)
    return model


def check_data(recipe: Recipe, stages: Sequence[StageConfig] | None = None) -> None:
    """Open every source of a recipe and read it up to the first document to train on.

    Parameters
    ----------
    recipe : Recipe
        The run; of the model only the tokenizer is read.
    stages : sequence of StageConfig, optional
        Whose data is looked at; all of the recipe's if not given.

    Raises
    ------
    DataError
        If a source is missing or empty, or has chats for which the tokenizer has no template.
    """
    mixtures = dict.fromkeys(recipe.data_of(stage) for stage in (recipe.stages if stages is None else stages))
    if not mixtures:
        return
    tokenizer = load_tokenizer(recipe.model)
    for data in mixtures:
        encode = make_encoder(tokenizer, data.document_end)
        Mixture(data, encode, split=split_of(data))
        for source in data.held_out:
            first = next(iter(open_reader(source, max_corrupt_percent=100)), "")
            if not isinstance(first, str):
                with suppress(DocumentError):  # one that is skipped when it is its turn
                    encode(first)


def estimate_run(recipe: Recipe, *, flops: float, processes: int = 1) -> list[StageEstimate]:
    """Work out what each stage of a recipe needs.

    Parameters
    ----------
    recipe : Recipe
        The run; of the model only the configuration is read.
    flops : float
        Speed of one process, as `measure_flops` returns it; a model reaches about half of that.
    processes : int, default 1
        Processes that share the work, and with FSDP the memory.

    Returns
    -------
    list of StageEstimate
        One per stage.

    Raises
    ------
    ConfigError
        If the recipe does not fit the model or the number of processes.
    """
    model = swapped_outline(recipe)
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    # The head multiplies, the input embedding only looks up; tied ones are counted once already.
    multiplied = total if config.tie_word_embeddings else total - vocabulary * hidden
    embeddings = vocabulary * hidden * (1 if config.tie_word_embeddings else 2)
    ffn = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name or ".experts." in name)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = experts - experts * config.num_experts_per_tok // config.num_experts if experts else 0
    estimates = []
    for stage in recipe.stages:
        _check_stage(recipe, stage, processes)
        length = recipe.data_of(stage).sequence_length
        steps = stage.steps(length)
        tokens = steps * stage.batch_sequences * length
        per_token = _flops_per_token(stage, multiplied - idle, ffn - idle, vocabulary * hidden)
        memory = _model_bytes(recipe, stage, total=total, ffn=ffn, embeddings=embeddings)
        if recipe.fsdp:
            memory = max(memory // processes, _bytes_before_sharding(recipe, stage, total))
        if not stage.loss.is_regression_only:  # two sets of logits and a gradient
            memory += 3 * _element_bytes(recipe) * stage.micro_batch * length * vocabulary
        estimates.append(
            StageEstimate(
                name=stage.name,
                steps=steps,
                tokens=tokens,
                memory_gb=memory / 1e9,
                flops_per_token=per_token,
                hours=tokens * per_token / (0.5 * flops * processes) / 3600,
            )
        )
    return estimates


def _check_stage(recipe: Recipe, stage: StageConfig, processes: int) -> None:
    """Refuse what the stage itself refuses when it starts."""
    if stage.batch_sequences % (stage.micro_batch * processes):
        raise ConfigError(
            f"[stages.{stage.name}.batch_sequences] expected a multiple of micro_batch * processes = "
            f"{stage.micro_batch} * {processes}, got {stage.batch_sequences}"
        )
    if recipe.from_scratch and _has_teacher(stage):
        raise ConfigError(
            "[from_scratch] expected next_token and activation_l1 losses only, got one of a teacher"
        )


def _has_teacher(stage: StageConfig) -> bool:
    return stage.loss.needs_teacher or stage.loss.ffn_output > 0


def _element_bytes(recipe: Recipe) -> int:
    """Bytes of what is computed, and of the teacher's weights."""
    return 2 if recipe.precision == "bf16" or (recipe.precision == "auto" and has_bf16()) else 4


def _model_bytes(recipe: Recipe, stage: StageConfig, *, total: int, ffn: int, embeddings: int) -> int:
    trained = total - embeddings if stage.trainable == "all_but_embeddings" else total
    if stage.loss.is_regression_only or stage.trainable == "ffn":
        trained = ffn
    each = _OPTIMIZER_BYTES + (_AVERAGE_BYTES if stage.average_tokens else 0)
    teacher = total * _element_bytes(recipe) if _has_teacher(stage) else 0
    return total * _PARAMETER_BYTES + trained * each + teacher


def _bytes_before_sharding(recipe: Recipe, stage: StageConfig, total: int) -> int:
    """A model that is fitted is on each device as a whole before it is sharded."""
    is_fitted = (
        stage is recipe.stages[0]
        and recipe.initial_fit_tokens > 0
        and not (recipe.from_scratch or stage.blend_tokens)
    )
    return total * _PARAMETER_BYTES if is_fitted else 0


def _flops_per_token(stage: StageConfig, multiplied: int, ffn: int, head: int) -> float:
    """2 per weight and pass: forward 1, backward 2 for what is trained."""
    if stage.loss.is_regression_only:
        return 2.0 * ((multiplied - head - ffn) + ffn + 3 * ffn)
    return 2.0 * (
        3 * multiplied
        + (multiplied if stage.loss.needs_teacher else 0)
        + (ffn if stage.loss.ffn_output else 0)
    )
