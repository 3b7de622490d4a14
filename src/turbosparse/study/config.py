"""Recipes of studies: frozen settings, filled from a TOML file, ``field=value`` settings, or in Python."""

from dataclasses import dataclass, field

from turbosparse.data.config import DataConfig
from turbosparse.errors import ConfigError
from turbosparse.measure.config import MeasureConfig
from turbosparse.models.activations import Activation, parse_activation
from turbosparse.sparsify.fresh_model import FreshModel
from turbosparse.sparsify.recipe import StageConfig

__all__ = ["FFN_KINDS", "FromScratchStudy", "RelufyStudy", "SweepStudy"]

FFN_KINDS = {
    "relu": ("relu", False),
    "relu2": ("relu2", False),
    "swiglu": ("silu", True),
    "reglu": ("relu", True),
    "geglu": ("gelu", True),
    "relu2glu": ("relu2", True),
    "drelu": ("drelu", True),
}
"""Activation, and whether the FFN is gated, by what the literature calls them together."""

_SWEPT = tuple(round(0.05 * step, 2) for step in range(1, 11))
_SHARES = (0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)


@dataclass(frozen=True, kw_only=True)
class SweepStudy:
    """Settings of the trade-off of one model, and of the sweep inside of experts."""

    model: str
    """Model file, or Hugging Face directory or id."""
    output: str
    """Directory of the study."""
    text: str = ""
    """Text to measure on; the technical English that ships if empty."""
    tokens: int = 4096
    """Of the text, for the quality of each point; at least one window."""
    context: int = 512
    """Tokens per window, at least 16."""
    sample_tokens: int = 512
    """Tokens that thresholds are found on, at least 16."""
    cett_targets: tuple[float, ...] = _SWEPT
    """Errors of the FFN output, each above 0 and below 1."""
    top_k: tuple[float, ...] = _SHARES
    """Shares of neurons that the top-k rule keeps, each above 0 and at most 1."""
    gate_shares: tuple[float, ...] = _SHARES
    """Shares of neurons that a threshold on abs(f(gate)) per layer keeps, each above 0 and below 1."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness asked at each point (turbosparse[eval])."""
    task_folder: str = ""
    """Folder with further tasks (YAML)."""
    task_limit: int = 0
    """Questions per task; 0 asks all."""
    memory_mib: int = 2048
    """Budget for samples, which shrink to fit, and dense predictions."""
    threads: int = 0
    """CPU threads; 0: physical cores, at most 8."""
    device: str = "cpu"
    """Where torch runs."""
    seed: int = 0
    """Of what is sampled."""

    def __post_init__(self) -> None:
        if not self.cett_targets:
            raise ConfigError("[cett_targets] expected at least one target, got none")
        for share in self.gate_shares:
            if not 0 < share < 1:
                raise ConfigError(f"[gate_shares] expected shares above 0 and below 1, got {share}")
        if self.memory_mib < 1 or self.threads < 0 or self.task_limit < 0:
            raise ConfigError(
                "[study] expected memory_mib of at least 1, threads and task_limit of at least 0, got "
                f"{self.memory_mib}, {self.threads} and {self.task_limit}"
            )
        self.measured()

    def measured(self) -> MeasureConfig:
        """Give what a measurement needs to know.

        Returns
        -------
        MeasureConfig
            Checked.
        """
        return MeasureConfig(
            tokens=self.tokens,
            context=self.context,
            cett_targets=tuple(sorted(self.cett_targets)),
            active=None,
            top_k=self.top_k,
            quality_tokens=self.tokens,
            sample_tokens=self.sample_tokens,
            memory_bytes=self.memory_mib << 20,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class _TrainingStudy:
    """What studies that train have in common."""

    output: str
    """Directory of the study."""
    text: str = ""
    """Text to measure on, not trained on; the technical English that ships if empty."""
    data: DataConfig
    """The training text, the same for every run."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    """What is measured of each trained model."""
    predict_layers: int = 2
    """Layers whose neurons predictors are fitted for; 0 for none, as mixtures of experts need it."""
    seeds: tuple[int, ...] = (1, 2)
    """One run of each kind per seed; two at least give error bars."""
    precision: str = "auto"
    """As in a recipe of `turbosparse sparsify`."""
    threads: int = 0
    """CPU threads; 0 leaves torch's default."""
    device: str = "cpu"
    """Where trained models are measured; training takes what torch has."""
    fsdp: bool = False
    """Shard training over the processes of torchrun."""
    evaluate_tokens: int = 100_000
    """Tokens between evaluations during training."""
    evaluation_sequences: int = 16
    """Sequences per evaluation, as in a recipe."""
    checkpoint_minutes: float = 10.0
    """Wall-clock time between checkpoints."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"[seeds] expected different seeds, at least one, got {self.seeds}")
        if self.predict_layers < 0:
            raise ConfigError(f"[predict_layers] expected at least 0, got {self.predict_layers}")


@dataclass(frozen=True, kw_only=True)
class FromScratchStudy(_TrainingStudy):
    """Settings of the comparison of activations, and of scales: every kind of FFN at every size."""

    kinds: tuple[str, ...] = tuple(FFN_KINDS)
    """Of `FFN_KINDS`. Plain FFNs are made 1.5 times as wide, so that parameters match."""
    baseline: str = "swiglu"
    """The kind that losses are compared with, where it is among them."""
    sizes: tuple[FreshModel, ...]
    """Shapes, with the intermediate size of a gated FFN."""
    training: StageConfig
    """The stage that trains each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.size_names()
        if len(set(self.kinds)) != len(self.kinds):
            raise ConfigError(f"[kinds] expected different ones, got {', '.join(self.kinds)}")
        for kind in self.kinds:
            if kind not in FFN_KINDS:
                raise ConfigError(f"[kinds] expected FFNs of {', '.join(FFN_KINDS)}, got {kind!r}")
        if not self.kinds or not self.sizes:
            raise ConfigError(
                f"[study] expected at least one kind and one size, got {len(self.kinds)} and "
                f"{len(self.sizes)}"
            )
        if self.predict_layers and any(size.num_experts for size in self.sizes):
            raise ConfigError(
                f"[predict_layers] expected 0 for mixtures of experts, got {self.predict_layers}"
            )

    def size_names(self) -> list[str]:
        """Name the sizes, so that no two runs share a name.

        Returns
        -------
        list of str
            Width and layers of each, and the width of its FFN where that alone tells sizes apart.

        Raises
        ------
        ConfigError
            If two sizes differ in neither.
        """
        names = [f"{size.hidden_size}x{size.num_hidden_layers}" for size in self.sizes]
        if len(set(names)) < len(names):
            names = [f"{name}x{size.intermediate_size}" for name, size in zip(names, self.sizes, strict=True)]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ConfigError(
                "[sizes] expected sizes that differ in hidden_size, num_hidden_layers or intermediate_size, "
                f"got {min(twice)} twice"
            )
        return names


@dataclass(frozen=True, kw_only=True)
class RelufyStudy(_TrainingStudy):
    """Settings of the comparison of swaps: one model, several activations, the same recovery."""

    model: str
    """Hugging Face directory or id of a gated model."""
    activations: tuple[str, ...] = ("relu", "shifted_relu:0.1", "fatrelu:0.01", "relu2", "drelu")
    """NAME or NAME:THRESHOLD each. ReLU on the gate is what is also called ReGLU."""
    control: bool = True
    """Train the unswapped model on the same tokens too."""
    initial_fit_tokens: int = 16_384
    """As in a recipe: refits the swapped FFNs before training."""
    seeds: tuple[int, ...] = (1,)
    """One run of each activation per seed."""
    stages: tuple[StageConfig, ...]
    """The recovery."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.activations or not self.stages:
            raise ConfigError("[study] expected at least one activation and one stage, got none")
        names: dict[Activation, str] = {}
        for name in self.activations:
            activation = parse_activation(name)
            if activation in names:
                both = f"{names[activation]} and {name}"
                raise ConfigError(f"[activations] expected different ones, got {both}, which are the same")
            names[activation] = name
