"""FFN modules with an activation of choice, put in place of those of a built Hugging Face model.

A plain FFN is a gated one whose up projection is 1: what holds for gates holds for its only projection.

The modules adopt the projections of the module they replace under the same names, so that a state dict is the
same before and after. A *probe* may look at the input, the intermediate state and the output of each call;
training losses and sparsity counts are probes, the FFN itself knows nothing of them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from turbosparse.errors import ConfigError
from turbosparse.models.activations import Activation

__all__ = [
    "FFNProbe",
    "GatedExperts",
    "GatedFFN",
    "PlainFFN",
    "gated_ffns",
    "is_gated_ffn",
    "is_plain_ffn",
    "replace_ffns",
]


class FFNProbe(Protocol):
    """What may watch, and change, what one FFN computes."""

    def on_intermediate(self, intermediate: Tensor) -> None:
        """Look at the input of the down projection.

        Parameters
        ----------
        intermediate : Tensor of shape [..., F]
            What the activation returned.
        """

    def run(self, ffn: "GatedFFN | GatedExperts", x: Tensor, *routing: Tensor) -> Tensor:
        """Call ``ffn.compute(x, *routing)`` and return the output to pass on.

        Parameters
        ----------
        ffn : GatedFFN or GatedExperts
            The watched module.
        x : Tensor of shape [..., D]
            Its input.
        *routing : Tensor
            Indices and weights of experts.

        Returns
        -------
        Tensor of shape [..., D]
            What the module returns.
        """


class _ActivatedFFN(nn.Module):
    """What plain and expert FFNs share: activation, blend with the original one, probe."""

    def __init__(self, activation: Activation, original: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.original = original
        self.blend = 1.0  # share of `activation`; the rest is `original`
        self.threshold_scale = 1.0  # share of the activation's threshold
        self.probe: FFNProbe | None = None

    def _activate(self, gate: Tensor, up: Tensor) -> Tensor:
        activation = self.activation
        if self.threshold_scale != 1:
            activation = replace(activation, threshold=activation.threshold * self.threshold_scale)
        intermediate = activation(gate, up)
        if self.blend < 1:
            intermediate = torch.lerp(self.original(gate, up), intermediate, self.blend)
        if self.probe is not None:
            self.probe.on_intermediate(intermediate)
        return intermediate

    def extra_repr(self) -> str:
        """Say which activation this is when the model is printed."""
        return f"activation={self.activation}"


class GatedFFN(_ActivatedFFN):
    """``down_proj(activation(gate_proj(x), up_proj(x)))``, with a fused ``gate_up_proj`` where the model has
    one.

    Parameters
    ----------
    source : nn.Module
        The module to replace; its projections are adopted, not copied.
    activation : Activation
        What to compute.
    original : Activation
        What the model computed before, for blending.
    """

    def __init__(self, source: nn.Module, activation: Activation, original: Activation) -> None:
        super().__init__(activation, original)
        self.fused = hasattr(source, "gate_up_proj")
        for name in ("gate_up_proj",) if self.fused else ("gate_proj", "up_proj"):
            setattr(self, name, getattr(source, name))
        self.down_proj = source.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Compute the FFN.

        Parameters
        ----------
        x : Tensor of shape [..., D]
            Post-norm hidden state.

        Returns
        -------
        Tensor of shape [..., D]
            What is added to the residual.
        """
        return self.compute(x) if self.probe is None else self.probe.run(self, x)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gate and the up projection of `x`, each [..., F].

        Parameters
        ----------
        x : Tensor of shape [..., D]
            Post-norm hidden state.

        Returns
        -------
        gate, up : Tensor of shape [..., F]
            The projections, before any activation.
        """
        if self.fused:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            return gate, up
        return self.gate_proj(x), self.up_proj(x)

    def compute(self, x: Tensor) -> Tensor:
        """Compute the FFN without asking its probe.

        Parameters
        ----------
        x : Tensor of shape [..., D]
            Post-norm hidden state.

        Returns
        -------
        Tensor of shape [..., D]
            What is added to the residual.
        """
        return self.down_proj(self._activate(*self.project(x)))


class PlainFFN(GatedFFN):
    """``down_proj(activation(up_proj(x)))``: the gate is what the model calls up, and up is 1.

    Parameters
    ----------
    source : nn.Module
        The module to replace; its projections are adopted, not copied.
    activation : Activation
        What to compute.
    original : Activation
        What the model computed before, for blending.
    """

    def __init__(self, source: nn.Module, activation: Activation, original: Activation) -> None:
        _ActivatedFFN.__init__(self, activation, original)
        self.up_proj = source.up_proj
        self.down_proj = source.down_proj

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projection of `x` in the place of the gate, and ones for up, each [..., F].

        Parameters
        ----------
        x : Tensor of shape [..., D]
            Post-norm hidden state.

        Returns
        -------
        gate, up : Tensor of shape [..., F]
            The projection, before the activation, and ones that take no memory.
        """
        projected = self.up_proj(x)
        return projected, projected.new_ones(()).expand_as(projected)


class GatedExperts(_ActivatedFFN):
    """The fused experts of a mixture: ``gate_up_proj`` [E, 2F, D] and ``down_proj`` [E, D, F].

    Parameters
    ----------
    source : nn.Module
        The experts module to replace; its parameters are adopted.
    activation : Activation
        What to compute.
    original : Activation
        What the model computed before, for blending.
    """

    def __init__(self, source: nn.Module, activation: Activation, original: Activation) -> None:
        super().__init__(activation, original)
        self.num_experts = source.num_experts
        self.gate_up_proj = source.gate_up_proj  # [E, 2F, D]
        self.down_proj = source.down_proj  # [E, D, F]

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the weighted sum of each token's experts.

        Parameters
        ----------
        x : Tensor of shape [N, D]
            Post-norm hidden states.
        top_k_index : Tensor of shape [N, k]
            Experts chosen by the router.
        top_k_weights : Tensor of shape [N, k]
            Their weights.

        Returns
        -------
        Tensor of shape [N, D]
            What is added to the residual.
        """
        if self.probe is None:
            return self.compute(x, top_k_index, top_k_weights)
        return self.probe.run(self, x, top_k_index, top_k_weights)

    def compute(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the experts without asking the probe.

        Parameters
        ----------
        x : Tensor of shape [N, D]
            Post-norm hidden states.
        top_k_index : Tensor of shape [N, k]
            Experts chosen by the router.
        top_k_weights : Tensor of shape [N, k]
            Their weights.

        Returns
        -------
        Tensor of shape [N, D]
            What is added to the residual.
        """

        def _run_expert(expert: int, token: Tensor) -> Tensor:
            intermediate = self._activate(*self.project(x[token], expert))
            return functional.linear(intermediate, self.down_proj[expert])

        return self.mix(x, top_k_index, top_k_weights, _run_expert)

    def project(self, x: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        """Return the gate and the up projection of one expert.

        Parameters
        ----------
        x : Tensor of shape [n, D]
            Post-norm hidden states.
        expert : int
            Which expert.

        Returns
        -------
        gate, up : Tensor of shape [n, F]
            The projections, before any activation.
        """
        gate, up = functional.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return gate, up

    def mix(
        self,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        run_expert: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        """Add up what the experts make of their tokens.

        Parameters
        ----------
        x : Tensor of shape [N, D]
            Post-norm hidden states.
        top_k_index : Tensor of shape [N, k]
            Experts chosen by the router.
        top_k_weights : Tensor of shape [N, k]
            Their weights.
        run_expert : callable
            Given an expert and the indices [n] of its tokens, its outputs [n, D].

        Returns
        -------
        Tensor of shape [N, D]
            What is added to the residual.
        """
        output = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            # An expert without tokens still takes part, so that every process has the same graph.
            y = run_expert(expert, token) * top_k_weights[token, slot, None]
            output = output.index_add(0, token, y.to(output.dtype))
        return output


def is_gated_ffn(module: nn.Module) -> bool:
    """Whether a module of a Hugging Face model is a gated FFN or a set of fused gated experts.

    Parameters
    ----------
    module : nn.Module
        Any module.

    Returns
    -------
    bool
        Judged by the projections it has.
    """
    return _has_activation(module) and (
        hasattr(module, "gate_up_proj") or (hasattr(module, "gate_proj") and hasattr(module, "up_proj"))
    )


def is_plain_ffn(module: nn.Module) -> bool:
    """Whether a module of a Hugging Face model is an FFN of two projections with an activation between.

    Parameters
    ----------
    module : nn.Module
        Any module.

    Returns
    -------
    bool
        Judged by the projections it has.
    """
    return _has_activation(module) and hasattr(module, "up_proj") and not is_gated_ffn(module)


def _has_activation(module: nn.Module) -> bool:
    has_function = hasattr(module, "act_fn") or hasattr(module, "activation_fn")
    return has_function and hasattr(module, "down_proj")


def replace_ffns(model: nn.Module, activation: Activation, original: Activation) -> int:
    """Put `GatedFFN`, `PlainFFN` and `GatedExperts` in place of every FFN of a model, adopting its weights.

    Parameters
    ----------
    model : nn.Module
        A built Hugging Face model; changed in place.
    activation : Activation
        What the new modules compute.
    original : Activation
        What the model computed before.

    Returns
    -------
    int
        How many modules were replaced.

    Raises
    ------
    ConfigError
        If the model has no FFN of a known kind.
    """
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kind = None if isinstance(child, _ActivatedFFN) else _kind(child)
            if kind is None:
                continue
            setattr(parent, name, kind(child, activation, original).train(child.training))
            replaced += 1
    if not replaced:
        raise ConfigError(
            f"[{type(model).__name__}] expected a model with FFNs of gate_proj, up_proj and down_proj, a "
            "fused gate_up_proj, or up_proj and down_proj alone, got none"
        )
    return replaced


def _kind(module: nn.Module) -> type[GatedFFN | GatedExperts] | None:
    """What takes the place of a module."""
    if is_plain_ffn(module):
        return PlainFFN
    if not is_gated_ffn(module):
        return None
    return GatedExperts if isinstance(module.down_proj, nn.Parameter) else GatedFFN


def gated_ffns(model: nn.Module) -> dict[str, "GatedFFN | GatedExperts"]:
    """Return the replaced FFNs of a model by their names, in order of depth.

    Parameters
    ----------
    model : nn.Module
        A model that `replace_ffns` has been through.

    Returns
    -------
    dict of str to GatedFFN or GatedExperts
        Empty if nothing was replaced.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, _ActivatedFFN)}
