"""What a calibration was asked for and what it found, and how that is kept in the model file."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from turbosparse import __version__
from turbosparse.errors import ConfigError
from turbosparse.runtime.model_file import KEY_CALIBRATION, KEY_CETT_TARGET
from turbosparse.runtime.sparse_file import Refinement
from turbosparse.sparsity.thresholds import LayerThresholds

__all__ = ["CalibrationConfig", "CalibrationReport", "Perplexities"]

_NATIVE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
FEWEST_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """What to calibrate for. Exactly one of ``cett`` and ``ppl_budget`` is given."""

    cett: float | None = None
    """Largest mean relative error of an FFN's output, above 0 and below 1."""
    ppl_budget: float | None = None
    """Largest relative rise of the perplexity on the calibration text, above 0: 0.01 is 1 %."""
    tokens: int = 4096
    """Tokens of the text that thresholds are found on, at least 128; half as many that follow are held out. A
    shorter text is split in the same proportion."""
    window: int = 512
    """Tokens that see each other, at least 32."""
    stages: int = 2
    """1: drop by the activation alone; 2: by the gate first, which saves rows of up too."""
    down_type: str | None = None
    """Weight type of the transposed down projection; by default that of ffn_down, but at least 8 bits."""
    refine: Refinement | None = None
    """Store weights in two parts of 4 bits, and read the second for the largest neurons and logits alone. The
    down projection has no ``down_type`` of its own then."""
    threads: int = 0
    """Threads of the engine; 0 means physical cores, at most 8."""
    memory_bytes: int | None = None
    """Budget for captured activations; by default a quarter of the machine's memory."""

    def __post_init__(self) -> None:
        if (self.cett is None) == (self.ppl_budget is None):
            raise ConfigError("[calibration] expected either a CETT target or a perplexity budget")
        if self.cett is not None and not 0 < self.cett < 1:
            raise ConfigError(f"[calibration cett] expected above 0 and below 1, got {self.cett}")
        if self.ppl_budget is not None and not 0 < self.ppl_budget < 10:
            raise ConfigError(
                f"[calibration ppl_budget] expected above 0 and below 10, got {self.ppl_budget}"
            )
        if self.tokens < FEWEST_TOKENS:
            raise ConfigError(f"[calibration tokens] expected at least {FEWEST_TOKENS}, got {self.tokens}")
        if self.window < 32:
            raise ConfigError(f"[calibration window] expected at least 32, got {self.window}")
        if self.stages not in (1, 2):
            raise ConfigError(f"[calibration stages] expected 1 or 2, got {self.stages}")
        if self.down_type is not None and self.refine is not None:
            raise ConfigError(
                f"[calibration down_type] expected none with weights in two parts, got {self.down_type}"
            )
        if self.down_type is not None and self.down_type not in _NATIVE_TYPES:
            expected = ", ".join(_NATIVE_TYPES)
            raise ConfigError(f"[calibration down_type] expected one of {expected}, got {self.down_type!r}")


@dataclass(frozen=True, kw_only=True)
class Perplexities:
    """Of one text."""

    source: float
    """The file that was calibrated, dense."""
    dense: float
    """The new file, dense: what requantising the down projection cost."""
    threshold: float
    """The new file with its thresholds."""


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """What a calibration found, and what it cost."""

    cett_target: float
    """CETT that the thresholds were found for."""
    ffns: list[LayerThresholds]
    """One per layer; with experts one per expert: layer by layer, its experts, then the shared one."""
    ffn_tokens: list[int]
    """Tokens that reached each of them. Experts with too few keep all of their neurons."""
    tokens: int
    """Tokens the thresholds were found on."""
    held_out_tokens: int
    text_sha256: str
    """Of the whole text in UTF-8."""
    down_type: str
    """Weight type of ffn_down_t."""
    ppl: Perplexities
    """On the calibration tokens."""
    held_out_ppl: Perplexities
    """On the held-out tokens of the same text."""

    @property
    def active_ratio(self) -> float:
        """Mean share of neurons whose row of down is read, on the calibration tokens."""
        return self.mean("active")

    @property
    def gate_passed(self) -> float:
        """Mean share of neurons whose row of up is read, on the calibration tokens."""
        return self.mean("gate_passed")

    def mean(self, field: str) -> float:
        """Average a number of the FFNs over tokens and neurons.

        Parameters
        ----------
        field : str
            Of `LayerThresholds`: ``cett``, ``gate_passed``, ``active`` or ``zeros``.

        Returns
        -------
        float
            Its mean.
        """
        weights = [n * len(ffn.threshold) for n, ffn in zip(self.ffn_tokens, self.ffns, strict=True)]
        return float(np.average([getattr(ffn, field) for ffn in self.ffns], weights=weights))

    def as_metadata(self, config: CalibrationConfig) -> dict[str, Any]:
        """Give the keys of the model file: enough to repeat the calibration and to know what it gave.

        Parameters
        ----------
        config : CalibrationConfig
            What was asked for.

        Returns
        -------
        dict
            ``turbosparse.cett_target`` and ``turbosparse.calibration.*``.
        """
        keys = {KEY_CALIBRATION + key: value for key, value in self.as_record(config).items()}
        return {KEY_CETT_TARGET: self.cett_target} | keys

    def as_record(self, config: CalibrationConfig) -> dict[str, Any]:
        """Give plain values of what was asked for and what was found.

        Parameters
        ----------
        config : CalibrationConfig
            What was asked for.

        Returns
        -------
        dict
            Numbers, strings, and lists with one number per FFN.
        """
        return {
            "method": "cett" if config.ppl_budget is None else "cett-ppl",
            **({} if config.ppl_budget is None else {"ppl_budget": config.ppl_budget}),
            "tool": f"turbosparse {__version__}",
            "text_sha256": self.text_sha256,
            "tokens": self.tokens,
            "held_out_tokens": self.held_out_tokens,
            "window": config.window,
            "stages": config.stages,
            **({} if config.refine is None else {"refine": config.refine.neurons}),
            "cett": [ffn.cett for ffn in self.ffns],
            "active_ratio": [ffn.active for ffn in self.ffns],
            "gate_passed": [ffn.gate_passed for ffn in self.ffns],
            "exact_zeros": [ffn.zeros for ffn in self.ffns],
            "split": [ffn.split for ffn in self.ffns],
            **({} if min(self.ffn_tokens) == max(self.ffn_tokens) else {"ffn_tokens": self.ffn_tokens}),
            "down_type": self.down_type,
            "ppl_source": self.ppl.source,
            "ppl_dense": self.ppl.dense,
            "ppl_threshold": self.ppl.threshold,
            "held_out_ppl_source": self.held_out_ppl.source,
            "held_out_ppl_dense": self.held_out_ppl.dense,
            "held_out_ppl_threshold": self.held_out_ppl.threshold,
        }
