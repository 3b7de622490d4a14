"""FFN activations that produce exact zeros, and the dense ones they replace.

An activation is a function of the gate and the up projection together, because dReLU rectifies both:

========== ================================= ==========================================
name       intermediate                      source
========== ================================= ==========================================
silu       silu(gate) * up                   SwiGLU, arXiv 2002.05202
gelu       gelu(gate) * up (tanh form)       GeGLU, arXiv 2002.05202
relu       max(0, gate) * up                 ReGLU, arXiv 2002.05202
shifted_relu  max(0, gate - t) * up          arXiv 2310.04564
relu2      max(0, gate)^2 * up               arXiv 2402.03804
fatrelu    (gate if gate > t else 0) * up    ProSparse, arXiv 2402.13516
drelu      max(0, gate) * max(0, up)         Turbo Sparse, arXiv 2406.05955
========== ================================= ==========================================

``drelu`` also takes a threshold: FATReLU on both projections.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from turbosparse.errors import ConfigError

__all__ = ["ACTIVATIONS", "Activation", "parse_activation"]

ACTIVATIONS = ("silu", "gelu", "relu", "shifted_relu", "relu2", "fatrelu", "drelu")
_ALIASES = {"reglu": "relu", "swiglu": "silu", "geglu": "gelu", "gelu_pytorch_tanh": "gelu", "swish": "silu"}
_WITH_THRESHOLD = ("shifted_relu", "fatrelu", "drelu")
# What transformers calls the gate activation when it can compute the whole FFN by itself.
_HIDDEN_ACT = {"silu": "silu", "gelu": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}


def _fatrelu(x: Tensor, threshold: float) -> Tensor:
    return torch.relu(x) if threshold == 0 else torch.where(x > threshold, x, 0.0)


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An activation and its threshold; callable on the two projections of a gated FFN.

    Raises
    ------
    ConfigError
        If the name is unknown or the threshold does not fit it.

    Examples
    --------
    >>> import torch
    >>> Activation(name="drelu")(torch.tensor([-1.0, 2.0, 3.0]), torch.tensor([4.0, -5.0, 6.0]))
    tensor([ 0.,  0., 18.])
    """

    name: str
    """One of `ACTIVATIONS`."""
    threshold: float = 0.0
    """Cut-off of ``fatrelu`` and ``drelu`` or shift of ``shifted_relu``, in units of the projection's
    output; at least 0, and 0 for the others."""

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ConfigError(f"[activation] expected one of {', '.join(ACTIVATIONS)}, got {self.name!r}")
        if not 0 <= self.threshold < math.inf or (self.threshold and self.name not in _WITH_THRESHOLD):
            raise ConfigError(
                f"[activation] expected a threshold of 0 for {self.name}, or a finite one of at least 0 for "
                f"{', '.join(_WITH_THRESHOLD)}, got {self.threshold}"
            )

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the intermediate state of the FFN, the input of its down projection."""
        activated_gate, activated_up = self.factors(gate, up)
        return activated_gate * activated_up

    def factors(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the two factors of the intermediate state.

        Parameters
        ----------
        gate, up : Tensor of shape [..., F]
            The projections.

        Returns
        -------
        Tensor, Tensor
            f(gate) and g(up), each [..., F].
        """
        match self.name:
            case "silu":
                return functional.silu(gate), up
            case "gelu":
                return functional.gelu(gate, approximate="tanh"), up
            case "relu2":
                return torch.relu(gate).square(), up
            case "shifted_relu":
                return torch.relu(gate - self.threshold), up
            case "drelu":
                return _fatrelu(gate, self.threshold), _fatrelu(up, self.threshold)
            case _:  # relu, fatrelu
                return _fatrelu(gate, self.threshold), up

    def __str__(self) -> str:
        return f"{self.name}:{self.threshold:g}" if self.threshold else self.name

    @property
    def is_sparse(self) -> bool:
        """Whether the intermediate state holds exact zeros."""
        return self.name not in ("silu", "gelu")

    @property
    def hidden_act(self) -> str | None:
        """The name under which transformers itself computes this activation, or None."""
        return None if self.threshold else _HIDDEN_ACT.get(self.name)


def parse_activation(text: str) -> Activation:
    """Read an activation from ``name`` or ``name:threshold``.

    Parameters
    ----------
    text : str
        For example ``drelu``, ``fatrelu:0.01``; ``reglu`` and ``swiglu`` are understood as well.

    Returns
    -------
    Activation
        The activation.

    Raises
    ------
    ConfigError
        If the name is unknown or the threshold is not a number that fits it.

    Examples
    --------
    >>> parse_activation("fatrelu:0.01")
    Activation(name='fatrelu', threshold=0.01)
    """
    name, _, threshold = text.partition(":")
    try:
        value = float(threshold) if threshold else 0.0
    except ValueError:
        raise ConfigError(f"[activation] expected NAME or NAME:THRESHOLD, got {text!r}") from None
    return Activation(name=_ALIASES.get(name, name), threshold=value)
