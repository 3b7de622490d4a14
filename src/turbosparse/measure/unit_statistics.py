"""Counts of one FFN, or one expert, while tokens stream by; memory does not depend on how many they are."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import CalibrationError
from turbosparse.sparsity.coactivation import CoactivationGap, PairCounts
from turbosparse.sparsity.float_histogram import FloatHistogram
from turbosparse.sparsity.hotness import batch_union, carrying_share
from turbosparse.sparsity.jackknife import Estimate, jackknife
from turbosparse.sparsity.reuse import UNION_SIZES, NeuronReuse, chance_reuse

__all__ = ["HISTOGRAMS", "RoutingStatistics", "UnitStatistics"]

HISTOGRAMS = ("gate", "up", "combined", "output_norm")
_HISTOGRAM_STRIDE = 8  # every eighth token: 8,960 neurons a token are plenty
_HOT = 0.9  # active on so many tokens


class _ActiveCounts:
    """What needs to know which neurons are active, and nothing else."""

    def __init__(self, neurons: int, groups: int) -> None:
        self._neurons = neurons
        self.counts = np.zeros((groups, neurons), np.int64)
        self._tokens = np.zeros(groups, np.int64)
        self._reuse = NeuronReuse(neurons, groups)

    def start(self) -> None:
        self._reuse.start()

    def add(self, active: NDArray[np.bool_], group: int) -> None:
        self.counts[group] += np.count_nonzero(active, axis=0)
        self._tokens[group] += len(active)
        self._reuse.add(active, group)

    @property
    def frequencies(self) -> NDArray[np.float64]:
        """Share of tokens on which each neuron was active, [F]."""
        return np.asarray(self.counts.sum(axis=0) / max(self._tokens.sum(), 1), np.float64)

    def estimates(self) -> dict[str, Estimate]:
        counted = (self.counts, self._tokens)
        reuse = self._reuse
        of_counts: dict[str, Callable[..., NDArray[np.float64] | float]] = {
            "active_share": lambda counts, tokens: _ratio(counts.sum(), tokens * self._neurons),
            "carrying_80_percent": lambda counts, tokens: carrying_share(counts),
            "hot_share": lambda counts, tokens: float(np.mean(counts >= _HOT * tokens)),
            "never_active_share": lambda counts, tokens: float(np.mean(counts == 0)),
            "chance_reuse": lambda counts, tokens: chance_reuse(counts / max(tokens, 1)),
            "union_batch": lambda counts, tokens: batch_union(counts, tokens, UNION_SIZES),
        }
        return {
            **{name: jackknife(counted, statistic) for name, statistic in of_counts.items()},
            "reuse": jackknife((reuse.reused, reuse.active), _ratio),
            "union_consecutive": jackknife(
                (reuse.united, reuse.positions), lambda united, n: _ratio(united, n * self._neurons)
            ),
        }


class UnitStatistics:
    """Everything that is counted of one unit.

    Parameters
    ----------
    name : str
        For messages.
    down_norms : float32, shape (F,)
        ||W_down[:, i]||.
    eps : sequence of float
        Bounds on the neuron's output norm, one per CETT target; NaN where none is known.
    active_eps : float or None
        The bound of neurons that count as active; None: those that are not exactly zero. NaN: not known, and
        so is all that is counted of active neurons.
    groups : int
        Groups of windows.
    pair_neurons, seed : int
        Sample of neurons whose partners are counted.
    """

    def __init__(
        self,
        name: str,
        down_norms: NDArray[np.float32],
        eps: Sequence[float],
        *,
        active_eps: float | None,
        groups: int,
        pair_neurons: int,
        seed: int,
    ) -> None:
        neurons = len(down_norms)
        self._name = name
        self._down_norms = down_norms
        self._eps = [np.float32(value) for value in eps]
        self._active_eps = None if active_eps is None else np.float32(active_eps)
        self._values = np.zeros(groups, np.int64)
        self._zeros = np.zeros(groups, np.int64)
        self._closed_gates = np.zeros(groups, np.int64)
        self._kept = np.zeros((groups, len(self._eps)), np.int64)
        self._active = _ActiveCounts(neurons, groups)
        self._pairs = PairCounts(neurons, pair_neurons, seed)
        self._histograms = {kind: FloatHistogram() for kind in HISTOGRAMS}
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """Count the tokens seen.

        Returns
        -------
        int
            So far.
        """
        return self._tokens

    def start(self) -> None:
        """Begin a new window."""
        self._active.start()

    def add(self, gate: NDArray[np.float32], up: NDArray[np.float32], group: int) -> None:
        """Count tokens.

        Parameters
        ----------
        gate, up : float32, shape (T, F)
            f(gate) and g(up) of the tokens that follow those added before.
        group : int
            Where to count them.

        Raises
        ------
        CalibrationError
            When a value is NaN or infinite.
        """
        activations = gate * up
        norms = np.abs(activations)
        norms *= self._down_norms
        if not np.isfinite(norms.sum(dtype=np.float64)):
            raise CalibrationError(f"[{self._name}] expected finite activations, got NaN or Inf")
        self._values[group] += norms.size
        self._zeros[group] += norms.size - np.count_nonzero(activations)
        self._closed_gates[group] += np.count_nonzero(gate <= 0)
        for at, eps in enumerate(self._eps):
            self._kept[group, at] += np.count_nonzero(norms >= eps)
        active = activations != 0 if self._active_eps is None else norms >= self._active_eps
        self._active.add(active, group)
        self._pairs.add(active)
        every = slice(-self._tokens % _HISTOGRAM_STRIDE, None, _HISTOGRAM_STRIDE)
        for kind, values in zip(HISTOGRAMS, (gate, up, activations, norms), strict=True):
            self._histograms[kind].add(values[every])
        self._tokens += len(gate)

    @property
    def frequencies(self) -> NDArray[np.float64]:
        """Share of tokens on which each neuron was active.

        Returns
        -------
        float64, shape (F,)
            In the order of the model's neurons; NaN where it is not known which are active.
        """
        return self._active.frequencies if self._knows_active else np.full(len(self._down_norms), math.nan)

    @property
    def _knows_active(self) -> bool:
        return self._active_eps is None or not np.isnan(self._active_eps)

    @property
    def histograms(self) -> dict[str, FloatHistogram]:
        """Give the distributions of f(gate), g(up), their product, and norms of neuron outputs.

        Returns
        -------
        dict of str to FloatHistogram
            By `HISTOGRAMS`, of every eighth token.
        """
        return self._histograms

    def gap(self) -> CoactivationGap:
        """Judge the pairs.

        Returns
        -------
        CoactivationGap
            Of the sampled neurons.
        """
        return self._pairs.gap()

    def estimates(self) -> dict[str, Estimate]:
        """Give all numbers with what their standard errors need.

        Returns
        -------
        dict of str to Estimate
            Scalars, or one value per CETT target, window or batch size; NaN where the bound is.
        """
        unknown = np.where(np.isnan(self._eps), math.nan, 0.0)
        active = self._active.estimates()
        return {
            "exact_zeros": jackknife((self._zeros, self._values), _ratio),
            "gate_at_most_zero": jackknife((self._closed_gates, self._values), _ratio),
            "cett_sparsity": jackknife(
                (self._kept, self._values), lambda kept, n: 1 - _ratio(kept, n) + unknown
            ),
            **(active if self._knows_active else {name: _unknown(found) for name, found in active.items()}),
        }


class RoutingStatistics:
    """How evenly a layer's experts are used, and how often a token's experts are those of its neighbours.

    Parameters
    ----------
    experts : int
        E.
    groups : int
        Groups of windows.
    """

    def __init__(self, experts: int, groups: int) -> None:
        self._experts = experts
        self._active = _ActiveCounts(experts, groups)

    def start(self) -> None:
        """Begin a new window."""
        self._active.start()

    def add(self, chosen: NDArray[np.integer], group: int) -> None:
        """Count tokens.

        Parameters
        ----------
        chosen : int, shape (T, k)
            Experts of each token.
        group : int
            Where to count them.
        """
        active = np.zeros((len(chosen), self._experts), np.bool_)
        np.put_along_axis(active, chosen, True, axis=1)
        self._active.add(active, group)

    def record(self) -> dict[str, Any]:
        """Give all numbers.

        Returns
        -------
        dict
            ``load``: share of tokens per expert. ``entropy``: of the load, over its largest value log(E).
            ``largest_load``: over the mean load. ``entropy_se``, ``largest_load_se``: their standard errors.
            ``estimates``: as for units, with experts for neurons.
        """
        entropy = jackknife((self._active.counts,), _entropy)
        largest = jackknife((self._active.counts,), lambda counts: counts.max() / max(counts.mean(), 1e-300))
        return {
            "experts": self._experts,
            "load": self._active.frequencies.tolist(),
            "entropy": float(entropy.value),
            "entropy_se": float(entropy.standard_error),
            "largest_load": float(largest.value),
            "largest_load_se": float(largest.standard_error),
            "estimates": self._active.estimates(),
        }


def _entropy(counts: NDArray[np.float64]) -> float:
    """Of the shares, over its largest value."""
    shares = counts / max(counts.sum(), 1e-300)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return float(-(shares * logs).sum() / np.log(max(len(counts), 2)))


def _unknown(estimate: Estimate) -> Estimate:
    """The same shapes with NaN."""
    return Estimate(
        value=np.full_like(estimate.value, math.nan), replicates=np.full_like(estimate.replicates, math.nan)
    )


def _ratio(a: Any, b: Any) -> NDArray[np.float64]:
    """a / b; NaN where b is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.true_divide(a, b), np.float64)
