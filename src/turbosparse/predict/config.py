"""Settings of a predictor fit."""

from dataclasses import dataclass

from turbosparse.errors import ConfigError

__all__ = ["LABELS", "PredictorConfig"]

LABELS = ("nonzero", "cett")


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """How the predictors of a model are fitted and their thresholds chosen."""

    ranks: tuple[int, ...] = (64, 128)
    """Ranks to try per layer, each at least 1; the cheapest in bytes that meets the target is kept."""
    labels: str = "nonzero"
    """What counts as active: nonzero (dReLU, ReLU, ReLU^2), or cett: the smallest set of neurons that meets
    ``label_cett`` (any activation)."""
    label_cett: float = 0.1
    """CETT of the active set for ``labels = "cett"``, 0 to 1."""
    target_cett: float = 0.1
    """What a predictor may lose: norm of the missed output over norm of the output, mean; 0 to 1."""
    steps: int = 600
    """Optimizer steps per layer and rank, at least 1."""
    batch_tokens: int = 512
    """Tokens per step, at least 1."""
    learning_rate: float = 2e-3
    """Peak of AdamW's learning rate, above 0; linear decay to 0."""
    norm_weight: float = 1.0
    """How much more an active neuron with a large output counts: its loss is weighted by
    1 + norm_weight * ||n_i|| / mean ||n||; at least 0."""
    held_out_share: float = 0.2
    """Share of the captured tokens on which thresholds are chosen and reports made, above 0, below 1."""
    seed: int = 0
    """Of weights and batches."""

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1:
            raise ConfigError(f"[predictor.ranks] expected ranks of at least 1, got {self.ranks}")
        if self.labels not in LABELS:
            raise ConfigError(f"[predictor.labels] expected one of {', '.join(LABELS)}, got {self.labels!r}")
        for name in ("label_cett", "target_cett", "held_out_share"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"[predictor.{name}] expected between 0 and 1, got {getattr(self, name)}")
        for name in ("steps", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"[predictor.{name}] expected at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0 or self.norm_weight < 0:
            raise ConfigError("[predictor] expected learning_rate above 0 and norm_weight of at least 0")
