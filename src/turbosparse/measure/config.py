"""What is measured, on how much text, within how much memory."""

from dataclasses import dataclass

from turbosparse.errors import ConfigError
from turbosparse.sparsity.reuse import WINDOWS

__all__ = ["MeasureConfig"]


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Settings of a measurement."""

    tokens: int = 10_000
    """At most so many tokens of the text, at least one window."""
    context: int = 512
    """Tokens per window, at least 16; each window starts with an empty cache."""
    cett_targets: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    """Errors of the FFN output to find thresholds for, each above 0 and below 1."""
    active: float | None = 0.1
    """CETT target of the neurons that count as active for hotness, re-use, unions and pairs; one of
    ``cett_targets``. None: the neurons that are not exactly zero."""
    ppl_budgets: tuple[float, ...] = (0.01, 0.05, 0.1)
    """CETT-PPL-p%: rises of the perplexity to find the largest CETT target for, each above 0."""
    top_k: tuple[float, ...] = (0.5, 0.3, 0.2, 0.15, 0.1)
    """Shares of neurons that the top-k rule keeps, each above 0 and at most 1."""
    quality_tokens: int = 4096
    """Tokens on which perplexity and KL are measured at each point; 0 measures no quality."""
    sample_tokens: int = 512
    """Tokens, spread over the text, on which thresholds are found, at least 16; a fourth as many more check
    them."""
    pair_neurons: int = 64
    """Neurons per layer whose partners are counted, at least 2."""
    memory_bytes: int = 2 << 30
    """Budget for samples, which shrink to fit, and dense predictions; counts come on top."""
    seed: int = 0
    """Of the neurons sampled, 0 or more."""

    def __post_init__(self) -> None:
        if self.context < max(WINDOWS):
            raise ConfigError(f"[context] expected at least {max(WINDOWS)} tokens, got {self.context}")
        if self.tokens < self.context:
            raise ConfigError(f"[tokens] expected at least one window of {self.context}, got {self.tokens}")
        if not self.cett_targets or not all(0 < target < 1 for target in self.cett_targets):
            raise ConfigError(
                f"[cett] expected targets above 0 and below 1, got {_listed(self.cett_targets)}"
            )
        if self.active is not None and self.active not in self.cett_targets:
            raise ConfigError(
                f"[active] expected one of the CETT targets {_listed(self.cett_targets)}, got {self.active}"
            )
        if not all(budget > 0 for budget in self.ppl_budgets):
            raise ConfigError(f"[ppl budgets] expected above 0, got {_listed(self.ppl_budgets)}")
        if not all(0 < share <= 1 for share in self.top_k):
            raise ConfigError(f"[top-k] expected shares above 0 and at most 1, got {_listed(self.top_k)}")
        if self.quality_tokens < 0:
            raise ConfigError(f"[quality tokens] expected 0 or more, got {self.quality_tokens}")
        if self.sample_tokens < 16:
            raise ConfigError(f"[sample tokens] expected at least 16, got {self.sample_tokens}")
        if self.pair_neurons < 2:
            raise ConfigError(f"[pair neurons] expected at least 2, got {self.pair_neurons}")
        if self.seed < 0:
            raise ConfigError(f"[seed] expected 0 or more, got {self.seed}")


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"
