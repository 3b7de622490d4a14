"""The recipe of a run: frozen settings, filled from a TOML file, ``field=value`` settings, or in Python."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbosparse.config import apply_setting, fill, read_toml
from turbosparse.data.config import DataConfig
from turbosparse.errors import ConfigError
from turbosparse.models.activations import parse_activation
from turbosparse.sparsify.fresh_model import FreshModel
from turbosparse.sparsify.upcycling import Upcycling

__all__ = [
    "LossWeights",
    "Recipe",
    "StageConfig",
    "load_recipe",
    "quick_recipe",
    "recipe_from_dict",
    "recipe_to_dict",
]

SCHEDULES = ("wsd", "cosine", "constant")
TRAINABLE = ("ffn", "all", "all_but_embeddings")
PRECISIONS = ("auto", "bf16", "fp32")
RAMPS = ("sine", "linear")


def _check(condition: bool, place: str, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"[{place}] expected {expected}, got {got!r}")


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the losses that are summed; each at least 0, not all 0."""

    next_token: float = 0.0
    """Cross entropy with the text."""
    logits: float = 0.0
    """KL divergence from the original model's next-token distribution."""
    ffn_output: float = 0.0
    """Relative squared error of each FFN's output against the original FFN on the same input."""
    hidden_states: float = 0.0
    """Relative squared error of each layer's hidden state against the original model's."""
    activation_l1: float = 0.0
    """Mean |intermediate state| of the FFNs, ramped up over ``l1_ramp_tokens``."""
    router_balance: float = 0.0
    """In a mixture, how unevenly each router uses its experts: 1 is balanced. 0.01 is usual."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            _check(0 <= value < math.inf, f"loss.{item.name}", "a finite weight of at least 0", value)
        taught = {name: value for name, value in vars(self).items() if name != "router_balance"}
        _check(any(taught.values()), "loss", "at least one weight above 0", taught)

    @property
    def needs_teacher(self) -> bool:
        """Whether the original model has to run beside the trained one."""
        return self.logits > 0 or self.hidden_states > 0

    @property
    def is_regression_only(self) -> bool:
        """Whether every FFN can be trained by itself, on the inputs it has in the original model."""
        return self.ffn_output > 0 and not (self.next_token or self.logits or self.hidden_states)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of training, with an optimizer and a schedule of its own."""

    name: str
    """Name of the stage's directory inside the output."""
    tokens: int
    """Tokens to train on, over all processes; rounded down to whole steps, at least one."""
    loss: LossWeights
    """What is minimised."""
    learning_rate: float
    """Peak learning rate, above 0."""
    batch_sequences: int = 16
    """Sequences per optimizer step, over all processes and accumulation steps; at least 1."""
    micro_batch: int = 4
    """Sequences per process that go through the model at once; at least 1."""
    schedule: str = "wsd"
    """wsd (warm-up, stable, linear decay), cosine, or constant; each after the warm-up."""
    warmup_tokens: int = 0
    """Tokens of linear warm-up, at least 0."""
    decay_tokens: int = 0
    """Tokens of the final linear decay of wsd, at least 0."""
    final_learning_rate: float = 0.0
    """Learning rate at the end of the decay, at least 0."""
    average_tokens: int = 0
    """Evaluate and save an average of the weights over the last so many tokens: with it, a constant learning
    rate does about as well as a decayed one. 0 takes the last weights."""
    weight_decay: float = 0.0
    """AdamW weight decay, at least 0."""
    beta1: float = 0.9
    """AdamW, 0 to 1."""
    beta2: float = 0.95
    """AdamW, 0 to 1."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm; at least 0, 0 turns it off."""
    trainable: str = "all"
    """ffn, all, or all_but_embeddings (embeddings and output head stay fixed)."""
    temperature: float = 1.0
    """Of the logit distillation, above 0."""
    top_k: int = 0
    """Keep the teacher's k most likely tokens and the mass of the rest; 0 keeps all."""
    blend_tokens: int = 0
    """Go from the original activation to the new one over so many tokens, at most the stage's; 0 swaps at
    once."""
    threshold_tokens: int = 0
    """Raise the activation's threshold from 0 over so many tokens, at most the stage's; 0 sets it at
    once."""
    l1_ramp_tokens: int = 0
    """Tokens over which the L1 weight rises from 0, at least 0."""
    l1_ramp: str = "sine"
    """sine or linear."""
    answers_only: bool = False
    """In chats, learn only the assistant's messages."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    data: DataConfig | None = None
    """The stage's own mixture, in its own order; if not given, the recipe's goes on where it stopped."""

    def __post_init__(self) -> None:
        place = f"stages.{self.name}"
        _check(
            self.name.replace("-", "").replace("_", "").isalnum(),
            "stages.name",
            "letters and digits",
            self.name,
        )
        _check(self.learning_rate > 0, f"{place}.learning_rate", "a rate above 0", self.learning_rate)
        _check(self.batch_sequences >= 1, f"{place}.batch_sequences", "at least 1", self.batch_sequences)
        _check(self.micro_batch >= 1, f"{place}.micro_batch", "at least 1", self.micro_batch)
        _check(
            self.schedule in SCHEDULES, f"{place}.schedule", f"one of {', '.join(SCHEDULES)}", self.schedule
        )
        _check(
            self.trainable in TRAINABLE,
            f"{place}.trainable",
            f"one of {', '.join(TRAINABLE)}",
            self.trainable,
        )
        _check(self.l1_ramp in RAMPS, f"{place}.l1_ramp", f"one of {', '.join(RAMPS)}", self.l1_ramp)
        _check(self.temperature > 0, f"{place}.temperature", "a temperature above 0", self.temperature)
        fixed = self.trainable == "ffn" or self.loss.is_regression_only
        _check(
            not (fixed and self.loss.router_balance),
            f"{place}.loss.router_balance",
            "0 where only FFNs are trained, which leaves the routers as they are",
            self.loss.router_balance,
        )
        _check(0 <= self.beta1 < 1, f"{place}.beta1", "0 to 1", self.beta1)
        _check(0 <= self.beta2 < 1, f"{place}.beta2", "0 to 1", self.beta2)
        for name in (
            "tokens",
            "warmup_tokens",
            "decay_tokens",
            "average_tokens",
            "final_learning_rate",
            "weight_decay",
            "max_gradient_norm",
            "top_k",
            "blend_tokens",
            "threshold_tokens",
            "l1_ramp_tokens",
        ):
            _check(getattr(self, name) >= 0, f"{place}.{name}", "at least 0", getattr(self, name))
        _check(
            self.warmup_tokens + self.decay_tokens <= self.tokens,
            f"{place}.warmup_tokens + decay_tokens",
            f"at most the stage's {self.tokens} tokens",
            self.warmup_tokens + self.decay_tokens,
        )
        for name in ("blend_tokens", "threshold_tokens"):
            _check(
                getattr(self, name) <= self.tokens,
                f"{place}.{name}",
                f"at most the stage's {self.tokens} tokens",
                getattr(self, name),
            )

    def steps(self, sequence_length: int) -> int:
        """Optimizer steps of the stage.

        Parameters
        ----------
        sequence_length : int
            Tokens per sequence.

        Returns
        -------
        int
            At least 1.
        """
        return max(self.tokens // (self.batch_sequences * sequence_length), 1)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: model, activation, data and stages."""

    model: str = ""
    """Hugging Face directory or id of the model to start from; empty where ``fresh`` is given."""
    output: str
    """Directory of the run."""
    activation: str = "drelu"
    """New FFN activation, NAME or NAME:THRESHOLD."""
    license: str = ""
    """Licence of the result, for its model card."""
    data: DataConfig
    """The training text."""
    stages: tuple[StageConfig, ...] = field(default_factory=tuple)
    """At least one, run in order."""
    from_scratch: bool = False
    """Start from random weights of the model's configuration instead of its own."""
    fresh: FreshModel | None = None
    """Start from random weights of this shape, with a tokenizer trained on the data where none is named."""
    upcycle: Upcycling | None = None
    """Make a mixture of experts of the model first, whose experts start as copies of its FFNs."""
    initial_fit_tokens: int = 16_384
    """Before training, choose which halves of neurons a swap to dReLU keeps, and refit down projections to
    the original outputs by least squares, on so many tokens in one pass; 0 leaves the weights as they are."""
    seed: int = 0
    """Of weights, data order and dropout."""
    precision: str = "auto"
    """bf16 (autocast; parameters and optimizer stay fp32), fp32, or auto (bf16 where the device has it)."""
    threads: int = 0
    """CPU threads; 0 leaves torch's default."""
    checkpoint_minutes: float = 10.0
    """Wall-clock time between checkpoints, above 0."""
    keep_checkpoints: int = 2
    """Checkpoints kept per stage, at least 1."""
    log_steps: int = 1
    """Steps between two lines of metrics, at least 1."""
    evaluate_tokens: int = 100_000
    """Tokens between evaluations; 0 evaluates only at the start and the end of a stage."""
    evaluation_sequences: int = 16
    """Sequences per evaluation of each held-out source, and a quarter of it of each training source's
    held-out documents; at least 1."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard as well, to ``output/tensorboard``."""
    fsdp: bool = False
    """Shard parameters, gradients and optimizer over the processes (FSDP2)."""

    def __post_init__(self) -> None:
        if self.fresh is None:
            _check(bool(self.model), "model", "a directory or model id, or [fresh]", self.model)
        else:
            _check(not self.model, "model", "none beside [fresh]", self.model)
        random = self.fresh is not None or self.from_scratch
        if self.upcycle is not None:
            _check(not random, "upcycle", "a trained model", "random weights")
        _check(bool(self.output), "output", "a directory", self.output)
        sparse = parse_activation(self.activation).is_sparse
        _check(sparse or random, "activation", "one with exact zeros for a trained model", self.activation)
        _check(self.initial_fit_tokens >= 0, "initial_fit_tokens", "at least 0", self.initial_fit_tokens)
        _check(bool(self.stages), "stages", "at least one stage", self.stages)
        names = [stage.name for stage in self.stages]
        _check(len(set(names)) == len(names), "stages.name", "different names", names)
        _check(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}", self.precision)
        _check(self.checkpoint_minutes > 0, "checkpoint_minutes", "a time above 0", self.checkpoint_minutes)
        _check(0 <= self.seed < 2**32, "seed", "0 to 2^32 - 1", self.seed)
        for name in ("keep_checkpoints", "log_steps", "evaluation_sequences"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("evaluate_tokens", "threads"):
            _check(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))

    def data_of(self, stage: StageConfig) -> DataConfig:
        """Return the mixture of a stage.

        Parameters
        ----------
        stage : StageConfig
            One of the recipe's stages.

        Returns
        -------
        DataConfig
            The stage's own, or the recipe's.
        """
        return stage.data or self.data


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Build a recipe from nested tables.

    Parameters
    ----------
    values : mapping
        As a TOML file gives them; field names as in `Recipe`.

    Returns
    -------
    Recipe
        The checked recipe.

    Raises
    ------
    ConfigError
        If a field is unknown, missing, of another type or out of range.
    """
    return fill(Recipe, values, "recipe")


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply settings on top.

    Parameters
    ----------
    path : Path
        A TOML file.
    settings : sequence of str
        ``field=value``, ``section.field=value`` or ``stages.NAME.field=value``; values in TOML syntax, bare
        words are taken as strings.

    Returns
    -------
    Recipe
        The checked recipe.

    Raises
    ------
    ConfigError
        If the file is missing or broken, or a field is wrong.
    """
    return recipe_from_dict(read_toml(path, settings))


def quick_recipe(texts: Sequence[str], tokens: int, settings: Sequence[str] = ()) -> Recipe:
    """Return a recipe for a first try: distillation from the original model.

    Parameters
    ----------
    texts : sequence of str
        Training text, in equal shares.
    tokens : int
        Tokens of the whole run.
    settings : sequence of str
        As in `load_recipe`; `model` and `output` must be among them.

    Returns
    -------
    Recipe
        The checked recipe.

    Raises
    ------
    ConfigError
        If a field is wrong.
    """
    values: dict[str, Any] = {
        "data": {"sequence_length": 256, "sources": [{"path": text} for text in texts]},
        "stages": [
            {
                "name": "distillation",
                "tokens": tokens,
                "loss": {"logits": 1.0},
                "learning_rate": 5e-4,
                "beta2": 0.99,
                "batch_sequences": 8,
                "trainable": "all_but_embeddings",
                "average_tokens": tokens // 5,
                "decay_tokens": tokens // 5,
            },
        ],
    }
    for setting in settings:
        apply_setting(values, setting)
    return recipe_from_dict(values)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as nested tables, the inverse of `recipe_from_dict`.

    Parameters
    ----------
    recipe : Recipe
        Any recipe.

    Returns
    -------
    dict
        JSON-able.
    """
    return dataclasses.asdict(recipe)
