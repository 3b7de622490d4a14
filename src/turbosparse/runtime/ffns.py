"""The FFNs of a model file: one per layer, or the experts of a mixture and the one that all tokens share.

Tensors of experts are fused, one row of matrices per layer; here an expert is an FFN like any other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.weight_parts import rest_name

__all__ = ["FFN", "FFNTokens", "down_t", "ffn_groups", "ffns_of", "tokens_of_ffns"]


class _Shape(Protocol):
    """What a model file or the engine says of a model's sizes."""

    @property
    def num_hidden_layers(self) -> int:
        """Layers."""

    @property
    def intermediate_size(self) -> int:
        """F, of an expert where there are experts."""

    @property
    def num_experts(self) -> int:
        """E, 0 where there are none."""

    @property
    def num_experts_per_tok(self) -> int:
        """Experts that a token is sent to."""

    @property
    def shared_intermediate_size(self) -> int:
        """F of the expert that all tokens share, 0 where there is none."""


@dataclass(frozen=True, kw_only=True)
class FFN:
    """One FFN of a layer."""

    layer: int
    neurons: int
    """F"""
    first_neuron: int = 0
    """Its place among the neurons of the layer's FFNs together."""
    suffix: str = ""
    """Of its tensors' names: ``_exps`` for an expert, ``_shexp`` for the shared one."""
    expert: int | None = None
    """Number of an expert; None for the shared one and where there are none."""
    token_share: float = 1.0
    """Share of the tokens that come here if all experts are used alike."""

    @property
    def name(self) -> str:
        """What people call it."""
        shared = " shared expert" if self.suffix == "_shexp" else ""
        return f"layer {self.layer}" + (shared if self.expert is None else f" expert {self.expert}")

    def tensor(self, part: str) -> str:
        """Name a tensor of weights, of all experts together where this is one.

        Parameters
        ----------
        part : str
            Such as ``"gate"`` or ``"down_t"``.

        Returns
        -------
        str
            ``blk.N.ffn_gate_exps.weight``.
        """
        return f"blk.{self.layer}.ffn_{part}{self.suffix}.weight"

    def values(self, file: ModelFile, name: str) -> NDArray[np.float32]:
        """Read this FFN's part of a tensor.

        Parameters
        ----------
        file : ModelFile
            The file.
        name : str
            The tensor's name.

        Returns
        -------
        float32
            Dequantised; without the dimension of the experts.
        """
        return file.dequantised(name, expert=self.expert)

    def thresholds(self, file: ModelFile) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Read this FFN's thresholds.

        Parameters
        ----------
        file : ModelFile
            The file.

        Returns
        -------
        tuple of float32 arrays, shape (F,), or None
            On \\|f(gate)\\|, 0 where the file has none of these, and on \\|f(gate) * g(up)\\|; None where
            the file has no thresholds.

        Raises
        ------
        ModelFileError
            When they have another type or shape, or are negative or not finite.
        """
        gate, neuron = (
            file.threshold_values(f"blk.{self.layer}.{name}{self.suffix}", self.neurons, expert=self.expert)
            for name in ("ffn_gate_threshold", "ffn_threshold")
        )
        if neuron is None:
            return None
        return np.zeros(self.neurons, np.float32) if gate is None else gate, neuron


def ffns_of(shape: _Shape) -> list[FFN]:
    """List the FFNs of a model.

    Parameters
    ----------
    shape : ModelFile or turbosparse._native.ModelInfo
        Its sizes.

    Returns
    -------
    list of FFN
        Layer by layer; in a layer the experts, then the shared one.
    """
    neurons, experts, shared = shape.intermediate_size, shape.num_experts, shape.shared_intermediate_size
    found = []
    for layer in range(shape.num_hidden_layers):
        if not experts:
            found.append(FFN(layer=layer, neurons=neurons))
            continue
        found += [
            FFN(
                layer=layer,
                neurons=neurons,
                first_neuron=expert * neurons,
                suffix="_exps",
                expert=expert,
                token_share=shape.num_experts_per_tok / experts,
            )
            for expert in range(experts)
        ]
        if shared:
            found.append(FFN(layer=layer, neurons=shared, first_neuron=experts * neurons, suffix="_shexp"))
    return found


def ffn_groups(ffns: Sequence[FFN]) -> list[list[FFN]]:
    """Put FFNs together whose weights are one tensor.

    Parameters
    ----------
    ffns : sequence of FFN
        As `ffns_of` lists them.

    Returns
    -------
    list of list of FFN
        All experts of a layer, or one FFN.
    """
    groups: dict[tuple[int, str], list[FFN]] = {}
    for ffn in ffns:
        groups.setdefault((ffn.layer, ffn.suffix), []).append(ffn)
    return list(groups.values())


def down_t(source: ModelFile, ffn: FFN) -> NDArray[np.float32]:
    """Give an FFN's down projection, one row per neuron, from either layout.

    Parameters
    ----------
    source : ModelFile
        File with ``ffn_down`` or ``ffn_down_t``.
    ffn : FFN
        One of its FFNs.

    Returns
    -------
    float32, shape (F, D)
        Dequantised.
    """
    name = ffn.tensor("down_t")
    if name in source.tensors:
        first, rest = ffn.values(source, name), rest_name(name)
        return first + ffn.values(source, rest) if rest in source.tensors else first
    return np.ascontiguousarray(ffn.values(source, ffn.tensor("down")).T)


class FFNTokens(NamedTuple):
    """What an FFN computed for the tokens that reached it."""

    ffn: FFN
    tokens: NDArray[np.intp]
    """[n], ascending."""
    gate: NDArray[np.float32]
    """[n, F], f(gate)."""
    up: NDArray[np.float32]
    """[n, F], g(up)."""


def tokens_of_ffns(
    ffns: Sequence[FFN],
    gate: NDArray[np.float32],
    up: NDArray[np.float32],
    chosen: NDArray[np.int32],
) -> Iterator[FFNTokens]:
    """Tell the FFNs of a layer apart in what the engine captured.

    Parameters
    ----------
    ffns : sequence of FFN
        All of one layer.
    gate, up : float32, shape (T, neurons of the layer)
        As `turbosparse._native.Session.capture` returns them.
    chosen : int32, shape (T, k)
        The experts of each token.

    Yields
    ------
    FFNTokens
        Copies where the layer has several FFNs.
    """
    for ffn in ffns:
        neurons = slice(ffn.first_neuron, ffn.first_neuron + ffn.neurons)
        if ffn.expert is None:
            tokens = np.arange(len(gate))
            yield FFNTokens(
                ffn, tokens, np.ascontiguousarray(gate[:, neurons]), np.ascontiguousarray(up[:, neurons])
            )
        else:
            tokens = np.flatnonzero((chosen == ffn.expert).any(axis=1))
            yield FFNTokens(ffn, tokens, gate[tokens, neurons], up[tokens, neurons])
