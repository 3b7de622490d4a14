"""Per-neuron thresholds of a gated FFN layer, in two stages, that meet a CETT target with the fewest bytes.

Stage 1 looks at f(gate) and saves a neuron's rows of up and down_t; stage 2 looks at the activation
a = f(gate) * g(up) and saves its row of down_t. One eps each, turned into one threshold per neuron, so that
at run time a neuron costs one comparison per stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import ConfigError
from turbosparse.sparsity.cett import (
    DroppedError,
    activation_ratio,
    largest_meeting,
    neuron_output_norms,
    typical_norm,
    zero_share,
)

__all__ = ["ONE_STAGE", "TWO_STAGES", "LayerThresholds", "find_layer_thresholds", "kept_neurons"]

# Ratios eps_gate / eps that are tried. 0 is stage 2 alone; 1 drops a neuron by its gate as soon as its
# expected output norm is below eps. The bytes have a flat minimum: in layers of SmolLM2-135M at CETT 0.2 it
# lies between 1.25 and 1.5, and 1 or 2 read at most 2 % more.
TWO_STAGES = (0.0, 1.0, 1.25, 1.5, 2.0)
ONE_STAGE = (0.0,)
_SPLIT_TOKENS = 256  # enough to rank the splits; the thresholds themselves use every token
_RMS_FLOOR = (
    0.01  # of the layer's mean: a neuron that the text hardly woke must not get an endless gate threshold
)
_SMALLEST = np.float32(1e-30)  # thresholds start here, so that exact zeros are dropped at any target
_LARGEST = np.float32(3e38)


@dataclass(frozen=True, kw_only=True)
class LayerThresholds:
    """Thresholds of one layer and what they do to the tokens they were found on."""

    gate_threshold: NDArray[np.float32]
    """[F]: drop at |f(gate)| below it, before up is read. All zero where stage 1 is off."""
    threshold: NDArray[np.float32]
    """[F]: drop at |f(gate) * g(up)| below it, before down is read."""
    cett: float
    """Error of the FFN output with both stages, 0 to 1, not above the target."""
    split: float
    """eps of stage 1 relative to that of stage 2; 0 means stage 2 alone."""
    gate_passed: float
    """Share of neurons whose row of up is read, 0 to 1."""
    active: float
    """Share of neurons whose row of down_t is read, 0 to 1; the activation ratio."""
    zeros: float
    """Share of activations that are zero without any threshold, 0 to 1."""


def kept_neurons(
    gate: NDArray[np.float32],
    up: NDArray[np.float32],
    gate_threshold: NDArray[np.float32],
    threshold: NDArray[np.float32],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Apply both stages as the engine does.

    Parameters
    ----------
    gate, up : float32, shape (T, F)
        f(gate) and g(up).
    gate_threshold, threshold : float32, shape (F,)
        Thresholds of the two stages, at least 0.

    Returns
    -------
    tuple of bool arrays, shape (T, F)
        Neurons that pass stage 1, and those that pass both. A value equal to its threshold passes.
    """
    passed = np.abs(gate) >= gate_threshold
    return passed, passed & (np.abs(gate * up) >= threshold)


def find_layer_thresholds(
    gate: NDArray[np.float32],
    up: NDArray[np.float32],
    down_t: NDArray[np.float32],
    target: float,
    *,
    splits: Sequence[float] = TWO_STAGES,
    row_bytes: tuple[float, float] = (1.0, 1.0),
    tolerance: float = 0.01,
) -> LayerThresholds:
    """Find thresholds of one gated FFN layer that meet a CETT target.

    Parameters
    ----------
    gate, up : float32, shape (T, F)
        f(gate) and g(up) on calibration tokens.
    down_t : float32, shape (F, D)
        Transposed down projection.
    target : float
        Largest error of the FFN output allowed (CETT over both stages together), above 0 and below 1.
    splits : sequence of float
        Ratios of stage 1's eps to stage 2's to choose from, at least 0; ``ONE_STAGE`` drops by the activation
        alone.
    row_bytes : tuple of float
        Bytes of one row of up and of one row of down_t; only their ratio matters.
    tolerance : float
        How far below the target the error may stay, relative to it.

    Returns
    -------
    LayerThresholds
        Thresholds, what they achieve, and which split they use.

    Raises
    ------
    ConfigError
        When shapes do not fit, or the target or a split is out of range.
    CalibrationError
        When the activations are all zero or not finite.

    Notes
    -----
    tau_i = eps / ||W_down[:, i]|| as in Sparsing Law [1]_. Stage 1 knows the gate alone and expects the rest:
    tau_gate_i = eps_gate / (rms(up_i) ||W_down[:, i]||), with the rms over the calibration tokens. For every
    split s = eps_gate / eps in ``splits``, eps is searched so that the union of what both stages drop meets
    the target; the split with the fewest bytes, passed * up_row + active * down_row, wins. Stage 1 alone is
    what CATS (arXiv:2404.08763) does. No threshold is below 1e-30: exact zeros are dropped at any target.

    References
    ----------
    .. [1] Luo et al., "Sparsing Law", arXiv:2411.02335.

    Examples
    --------
    >>> import numpy as np
    >>> gate = np.float32([[0.1, 1, 2]])
    >>> found = find_layer_thresholds(gate, np.ones_like(gate), np.eye(3, dtype=np.float32), 0.1)
    >>> round(found.gate_passed, 2), round(found.active, 2), round(found.cett, 3)
    (0.67, 0.67, 0.045)
    """
    if not splits or min(splits) < 0:
        raise ConfigError(f"[calibration] expected splits of at least 0, got {list(splits)}")
    layer = _Layer.of(gate, up, down_t)
    sample = layer.every(max(1, len(gate) // _SPLIT_TOKENS))
    start = typical_norm(neuron_output_norms(sample.activations, down_t))
    found: list[tuple[float, float, float]] = []
    for split in splits:
        eps, _ = sample.search(target, split, start, 5 * tolerance)
        passed, kept = sample.kept(eps, split)
        cost = activation_ratio(passed) * row_bytes[0] + activation_ratio(kept) * row_bytes[1]
        found.append((cost, split, eps))
        start = eps or start
    _, split, eps = min(found)
    eps, achieved = layer.search(target, split, eps or start, tolerance)
    passed, kept = layer.kept(eps, split)
    gate_threshold, threshold = layer.thresholds(eps, split)
    return LayerThresholds(
        gate_threshold=gate_threshold,
        threshold=threshold,
        cett=achieved,
        split=split,
        gate_passed=activation_ratio(passed),
        active=activation_ratio(kept),
        zeros=zero_share(layer.activations),
    )


@dataclass(frozen=True)
class _Layer:
    """Calibration tokens of one layer, with what every evaluation needs."""

    gate: NDArray[np.float32]  # [T, F]
    up: NDArray[np.float32]  # [T, F]
    activations: NDArray[np.float32]  # [T, F]
    down_t: NDArray[np.float32]  # [F, D]
    down_norms: NDArray[np.float64]  # [F]
    up_rms: NDArray[np.float64]  # [F]
    error: DroppedError

    @classmethod
    def of(cls, gate: NDArray[np.float32], up: NDArray[np.float32], down_t: NDArray[np.float32]) -> "_Layer":
        if gate.shape != up.shape:
            raise ConfigError(
                f"[calibration] expected gate and up of one shape, got {gate.shape} and {up.shape}"
            )
        activations = gate * up
        error = DroppedError(activations, down_t)
        rms = np.sqrt(np.mean(np.square(up), axis=0, dtype=np.float64))
        down_norms = np.linalg.norm(down_t, axis=1).astype(np.float64)
        rms = np.maximum(rms, _RMS_FLOOR * rms.mean())
        return cls(gate, up, activations, down_t, down_norms, rms, error)

    def every(self, stride: int) -> "_Layer":
        """The same layer on every `stride`-th token."""
        activations = self.activations[::stride]
        return replace(
            self,
            gate=self.gate[::stride],
            up=self.up[::stride],
            activations=activations,
            error=DroppedError(activations, self.down_t),
        )

    def thresholds(self, eps: float, split: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Those of stage 1 and stage 2, each [F]."""
        second = _per_neuron(eps, self.down_norms)
        first = _per_neuron(eps * split, self.down_norms * self.up_rms) if split else np.zeros_like(second)
        return first, second

    def kept(self, eps: float, split: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        return kept_neurons(self.gate, self.up, *self.thresholds(eps, split))

    def search(self, target: float, split: float, start: float, tolerance: float) -> tuple[float, float]:
        """Largest eps of stage 2 at this split, and its error."""
        return largest_meeting(
            lambda eps: self.error(self.kept(eps, split)[1]), target, start=start, tolerance=tolerance
        )


def _per_neuron(eps: float, scale: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.clip(eps / np.maximum(scale, 1e-30), _SMALLEST, _LARGEST).astype(np.float32)
