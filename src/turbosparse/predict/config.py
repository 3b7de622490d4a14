"""Settings of a predictor fit."""

from dataclasses import dataclass

from turbosparse.errors import ConfigError
from turbosparse.predict.inputs import INPUTS
from turbosparse.predict.layers import BYTES_PER_WEIGHT
from turbosparse.predict.predictors import RIVALS

__all__ = ["PredictorConfig"]

LABELS = ("nonzero", "cett")
FINETUNED = ("predictors", "model")


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """How the predictors of a model are fitted and their thresholds chosen."""

    ranks: tuple[int, ...] = (64, 128)
    """Ranks to fit, each at least 1 (a multiple of 32 for a quantised predictor); every FFN gets the one that
    is cheapest there."""
    inputs: tuple[str, ...] = ("ffn_norm",)
    """What predictors read, of `turbosparse.predict.inputs.INPUTS`: the first is used, the others are fitted
    and reported beside it."""
    rivals: tuple[str, ...] = ("sign_bits", "low_bit_1", "low_bit_2", "oracle")
    """Other kinds to report, of `turbosparse.predict.predictors.RIVALS`."""
    labels: str = "nonzero"
    """What counts as active: nonzero (dReLU, ReLU, ReLU^2, thresholds in the model file), or cett: the
    smallest set of neurons that meets ``label_cett`` (any activation)."""
    label_cett: float = 0.1
    """CETT of the active set for ``labels = "cett"``, 0 to 1."""
    ppl_budget: float = 0.03
    """How much higher perplexity may be with the predictors on, as a share, at least 0."""
    weight_type: str = "Q8_0"
    """What gate, up and down will be in the model file."""
    predictor_type: str = "Q8_0"
    """What the predictors will be there."""
    steps: int = 600
    """Optimizer steps per FFN, at least 1."""
    batch_tokens: int = 512
    """Tokens per step, at least 1."""
    learning_rate: float = 5e-3
    """Peak of AdamW's learning rate, above 0; rises over the first steps, then falls linearly to 0."""
    norm_weight: float = 1.0
    """How much more an active neuron with a large output counts: its loss is weighted by
    1 + norm_weight * ||n_i|| / mean ||n||, the mean over the token's neurons; at least 0."""
    finetune_steps: int = 0
    """Steps of straight-through fine-tuning after the fit, at least 0."""
    finetune: str = "predictors"
    """What these train: predictors, or model: predictors and all weights of the model."""
    finetune_learning_rate: float = 3e-4
    """AdamW's learning rate there, above 0; linear decay to 0."""
    finetune_sequences: int = 4
    """Sequences per step there, at least 1."""
    held_out_share: float = 0.2
    """Share of the captured sequences, the last ones, on which predictors are scored and nothing is trained,
    above 0, below 1."""
    seed: int = 0
    """Of weights and batches."""

    def first_held_out(self, count: int) -> int:
        """Say where the held-out part of the captured text begins.

        Parameters
        ----------
        count : int
            Sequences in all; or tokens, where sequences are not known.

        Returns
        -------
        int
            How many come before; with few of them, this may be 0.
        """
        return int(count * (1 - self.held_out_share) + 1e-9)  # 10 times 0.1 is below 1

    def __post_init__(self) -> None:
        unit = 32 if self.predictor_type.startswith("Q") else 1
        if not self.ranks or any(rank < 1 or rank % unit for rank in self.ranks):
            raise ConfigError(
                f"[predictor.ranks] expected multiples of {unit} for {self.predictor_type}, got {self.ranks}"
            )
        for name, allowed, values in (
            ("inputs", INPUTS, self.inputs or ("",)),
            ("rivals", RIVALS, self.rivals),
            ("labels", LABELS, (self.labels,)),
            ("finetune", FINETUNED, (self.finetune,)),
            ("weight_type", BYTES_PER_WEIGHT, (self.weight_type,)),
            ("predictor_type", BYTES_PER_WEIGHT, (self.predictor_type,)),
        ):
            for value in values:
                if value not in allowed:
                    known = ", ".join(allowed)
                    raise ConfigError(f"[predictor.{name}] expected one of {known}, got {value!r}")
        for name in ("label_cett", "held_out_share"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"[predictor.{name}] expected between 0 and 1, got {getattr(self, name)}")
        for name in ("steps", "batch_tokens", "finetune_sequences"):
            if getattr(self, name) < 1:
                raise ConfigError(f"[predictor.{name}] expected at least 1, got {getattr(self, name)}")
        for name in ("norm_weight", "ppl_budget", "finetune_steps", "seed"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"[predictor.{name}] expected at least 0, got {getattr(self, name)}")
        for name in ("learning_rate", "finetune_learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"[predictor.{name}] expected above 0, got {getattr(self, name)}")
