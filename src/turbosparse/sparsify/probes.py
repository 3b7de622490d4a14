"""What watches the FFNs while they train: zeros, load of experts, L1, and regression against the original."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from turbosparse.measure.divergence import relative_error
from turbosparse.models.gated_ffn import GatedExperts, GatedFFN, gated_ffns
from turbosparse.sparsify.routing import load_entropy

__all__ = ["LayerCounts", "LayerProbe", "ProbeSet"]


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """What a probe has counted."""

    zeros: int = 0
    """Intermediate values that are exactly zero."""
    values: int = 0
    """All intermediate values."""
    load: Tensor | None = None
    """Tokens that each expert got, [E]; None where there are no experts."""


class LayerProbe:
    """Watches one FFN: counts zeros and tokens of experts, keeps the parts of the loss that arise here."""

    def __init__(self) -> None:
        self.reference: GatedFFN | GatedExperts | None = None
        self.teacher_forced = False
        self.linked = False
        self.keeps_l1 = False
        self.watching = False
        self.errors: list[Tensor] = []
        self._l1: list[Tensor] = []
        self._l1_values = 0
        self._zeros: Tensor | None = None
        self._values = 0
        self._load: Tensor | None = None

    def on_intermediate(self, intermediate: Tensor) -> None:
        """Count zeros of the input of the down projection, [..., F], and keep its magnitude."""
        if self.watching:
            zeros = intermediate.numel() - intermediate.detach().count_nonzero()
            self._zeros = zeros if self._zeros is None else self._zeros + zeros
            self._values += intermediate.numel()
        if self.keeps_l1 and torch.is_grad_enabled():
            # Under activation checkpointing this is computed again in the backward pass; it is kept once.
            l1 = intermediate.abs().float().sum()
            if self.watching:
                self._l1.append(l1)
                self._l1_values += intermediate.numel()

    def run(self, ffn: GatedFFN | GatedExperts, x: Tensor, *routing: Tensor) -> Tensor:
        """Run the FFN and compare it with the reference on the same input."""
        if self.watching and isinstance(ffn, GatedExperts):
            load = torch.bincount(routing[0].flatten(), minlength=ffn.num_experts)
            self._load = load if self._load is None else self._load + load
        if self.reference is None or not torch.is_grad_enabled():
            output: Tensor = ffn.compute(x, *routing)
            return output
        output = ffn.compute(x.detach() if self.teacher_forced else x, *routing)
        with torch.no_grad():
            expected: Tensor = self.reference.compute(x, *routing)
        error = relative_error(output, expected)
        if self.watching:
            self.errors.append(error)
        if not self.teacher_forced:
            return output
        expected = expected.to(output.dtype)
        return expected + 0.0 * output if self.linked else expected

    def take_l1(self) -> Tensor | None:
        """Return the mean magnitude since the last call, over all values of all experts."""
        l1 = torch.stack(self._l1).sum() / max(self._l1_values, 1) if self._l1 else None
        self._l1, self._l1_values = [], 0
        return l1

    def take_counts(self) -> LayerCounts:
        """Return what was counted since the last call."""
        zeros = 0 if self._zeros is None else int(self._zeros)
        counts = LayerCounts(zeros=zeros, values=self._values, load=self._load)
        self._zeros, self._values, self._load = None, 0, None
        return counts

    def put_counts(self, counts: LayerCounts) -> None:
        """Go on counting from what `take_counts` returned."""
        self._zeros, self._values, self._load = torch.tensor(counts.zeros), counts.values, counts.load


class ProbeSet:
    """The probes of all FFNs of a model, one per layer.

    Parameters
    ----------
    model : nn.Module
        A model with `GatedFFN` or `GatedExperts` modules; they are given probes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._ffns = gated_ffns(model)
        self._probes = {name: LayerProbe() for name in self._ffns}
        for name, ffn in self._ffns.items():
            ffn.probe = self._probes[name]

    def __iter__(self) -> Iterator[LayerProbe]:
        return iter(self._probes.values())

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count and keep within this block, not where activations are recomputed."""
        for probe in self:
            probe.watching = True
        try:
            yield
        finally:
            for probe in self:
                probe.watching = False

    def keep_l1(self) -> None:
        """Keep the mean |intermediate state| of each call for the loss."""
        for probe in self:
            probe.keeps_l1 = True

    def regress(self, teacher: nn.Module, *, teacher_forced: bool, linked: bool = False) -> None:
        """Compare each FFN with the teacher's on the same input.

        Parameters
        ----------
        teacher : nn.Module
            The original model, its FFNs replaced by `GatedFFN` modules that compute the original activation.
        teacher_forced : bool
            Pass the original output on, so that every layer sees the states of the original model and learns
            by itself.
        linked : bool, default False
            Keep the graph between the layers, with gradients of zero: full sharding gathers the weights of a
            layer when a gradient reaches its output.
        """
        references = gated_ffns(teacher)
        for name, probe in self._probes.items():
            probe.reference = references[name]
            probe.teacher_forced = teacher_forced
            probe.linked = linked

    def take_losses(self) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        """Return the mean L1, the mean FFN error and the errors per layer since the last call."""
        l1 = [value for probe in self if (value := probe.take_l1()) is not None]
        errors = [value for probe in self for value in probe.errors]
        for probe in self:
            probe.errors = []
        return _mean(l1), _mean(errors), [error.detach() for error in errors]

    def take_metrics(self) -> dict[str, Any]:
        """Return the share of exact zeros, and the entropy of the load of experts, since the last call.

        Returns
        -------
        dict
            ``zeros`` and, where there are experts, ``routing_entropy``: means over the layers;
            ``zeros_per_layer`` and ``routing_entropy_per_layer``.
        """
        counts = self.take_counts()
        zeros = [layer.zeros / max(layer.values, 1) for layer in counts]
        entropies = [load_entropy(layer.load) for layer in counts if layer.load is not None]
        metrics: dict[str, Any] = {}
        for name, shares in (("zeros", zeros), ("routing_entropy", entropies)):
            if shares:
                metrics[name] = sum(shares) / len(shares)
                metrics[f"{name}_per_layer"] = [round(share, 5) for share in shares]
        return metrics

    def take_counts(self) -> list[LayerCounts]:
        """Return what was counted in each layer since the last call."""
        return [probe.take_counts() for probe in self]

    def put_counts(self, counts: list[LayerCounts]) -> None:
        """Go on counting from what `take_counts` returned.

        Parameters
        ----------
        counts : list of LayerCounts
            One per layer.
        """
        for probe, count in zip(self, counts, strict=True):
            probe.put_counts(count)

    def set_progress(self, *, blend: float, threshold: float) -> None:
        """Set the share of the new activation and the share of its final threshold.

        Parameters
        ----------
        blend : float
            0 computes the original activation, 1 the new one.
        threshold : float
            Share of the final threshold, 0 to 1.
        """
        for ffn in self._ffns.values():
            ffn.blend = blend
            ffn.threshold_scale = threshold

    def remove(self) -> None:
        """Take the probes out of the model."""
        for ffn in self._ffns.values():
            ffn.probe = None


def _mean(values: list[Tensor]) -> Tensor | None:
    return torch.stack(values).mean() if values else None
