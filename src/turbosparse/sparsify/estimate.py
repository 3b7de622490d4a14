"""What a run will need, before it starts: memory, steps and time."""

import time
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from turbosparse.models.registry import register
from turbosparse.sparsify.recipe import Recipe, StageConfig
from turbosparse.sparsify.upcycling import mixture_config

__all__ = ["StageEstimate", "estimate_run", "measure_flops"]

_PARAMETER_BYTES = 4  # fp32 master weights
_OPTIMIZER_BYTES = 12  # fp32 gradient and two Adam moments
_TEACHER_BYTES = 2  # bf16
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
    """
    register()
    config = AutoConfig.from_pretrained(recipe.model)
    if recipe.upcycle is not None:
        config = mixture_config(config, recipe.upcycle)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    # The head multiplies, the input embedding only looks up; tied ones are counted once already.
    multiplied = total if config.tie_word_embeddings else total - vocabulary * hidden
    ffn = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name or ".experts." in name)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = experts - experts * config.num_experts_per_tok // config.num_experts if experts else 0
    estimates = []
    for stage in recipe.stages:
        length = recipe.data_of(stage).sequence_length
        steps = stage.steps(length)
        tokens = steps * stage.batch_sequences * length
        per_token = _flops_per_token(stage, multiplied - idle, ffn - idle, vocabulary * hidden)
        trainable = ffn if stage.loss.is_regression_only or stage.trainable == "ffn" else total
        memory = total * _PARAMETER_BYTES + trainable * _OPTIMIZER_BYTES
        if stage.loss.needs_teacher or stage.loss.ffn_output:
            memory += total * _TEACHER_BYTES
        if recipe.fsdp:
            memory //= processes
        if not stage.loss.is_regression_only:
            memory += (
                3 * 2 * stage.micro_batch * length * vocabulary
            )  # two sets of logits and a gradient, bf16
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


def _flops_per_token(stage: StageConfig, multiplied: int, ffn: int, head: int) -> float:
    """2 per weight and pass: forward 1, backward 2 for what is trained."""
    if stage.loss.is_regression_only:
        return 2.0 * ((multiplied - head - ffn) + ffn + 3 * ffn)
    return 2.0 * (
        3 * multiplied
        + (multiplied if stage.loss.needs_teacher else 0)
        + (ffn if stage.loss.ffn_output else 0)
    )
