"""A Hugging Face model as a source of measurements, dense or with a mixture of experts (torch)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

from turbosparse.errors import ConfigError, TokenizerError
from turbosparse.measure.source import Watcher
from turbosparse.models.gated_ffn import GatedExperts, GatedFFN, PlainFFN, gated_ffns, replace_ffns
from turbosparse.models.registry import activation_of, load_model
from turbosparse.sparsity.selection import Selection

__all__ = ["HuggingFaceModel", "check_device", "open_hugging_face"]

_PIECE = 128  # tokens whose logits are handed over at once


@dataclass(frozen=True, kw_only=True)
class TorchUnit:
    """An FFN of a layer, or one of its experts."""

    name: str
    layer: int
    neurons: int
    expert: int | None = None
    token_share: float = 1.0


def check_device(device: str) -> None:
    """Refuse a device before a model is loaded.

    Parameters
    ----------
    device : str
        As torch names it.

    Raises
    ------
    ConfigError
        When torch does not know it or cannot compute there.
    """
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(
            f"[device] expected one that torch can use here, got {device!r}: {str(error).splitlines()[0]}"
        ) from error


def open_hugging_face(path: str | Path, *, device: str = "cpu") -> "HuggingFaceModel":
    """Load a model with its tokenizer.

    Parameters
    ----------
    path : str or Path
        A Hugging Face directory or model id.
    device : str
        Where it runs.

    Returns
    -------
    HuggingFaceModel
        In float32.

    Raises
    ------
    ConfigError
        When the model has no FFN of a known kind, or torch cannot use the device.
    TokenizerError
        When there is no tokenizer.
    """
    check_device(device)
    from transformers import AutoTokenizer  # noqa: PLC0415 -- only this way in needs it

    model = load_model(path, dtype=torch.float32).to(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise TokenizerError(
            f"[{path}] expected a tokenizer beside the model, got none that loads"
        ) from error
    return HuggingFaceModel(model, tokenizer, name=_name(Path(path)))


def _name(path: Path) -> str:
    """What a report calls a model; those that `sparsify` leaves are all RUN/STAGE/model."""
    return "/".join(path.parts[-3:-1]) if path.name == "model" and len(path.parts) > 2 else path.name


class HuggingFaceModel:
    """A causal language model whose FFNs can be watched and thinned out.

    Parameters
    ----------
    model : PreTrainedModel
        Its FFNs are replaced by `GatedFFN` modules that compute the same.
    tokenizer : PreTrainedTokenizer
        Of the model.
    name : str
        For reports.

    Attributes
    ----------
    model : PreTrainedModel
        The model itself.
    tokenizer : PreTrainedTokenizer
        Of the model.

    Raises
    ------
    ConfigError
        When the model has no FFN of a known kind.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._name = name
        if not gated_ffns(model):
            replace_ffns(model, activation_of(model), activation_of(model))
        self._ffns = gated_ffns(model)
        self._experts: dict[int, int] = {}
        self.units: list[TorchUnit] = []
        self._weights: list[tuple[GatedFFN | GatedExperts, int | None]] = []
        for full_name, ffn in self._ffns.items():
            self._add_units(full_name, ffn)

    def _add_units(self, full_name: str, ffn: GatedFFN | GatedExperts) -> None:
        place = re.search(r"layers?\.(\d+)\.(.*)", full_name)
        if place is None:
            raise ConfigError(f"[{full_name}] expected an FFN inside a numbered layer, got another place")
        layer = int(place[1])
        if isinstance(ffn, GatedFFN):
            shared = " shared expert" if "shared" in place[2] else ""
            neurons = ffn.down_proj.weight.shape[1]
            self.units.append(TorchUnit(name=f"layer {layer}{shared}", layer=layer, neurons=neurons))
            self._weights.append((ffn, None))
            return
        self._experts[layer] = ffn.num_experts
        for expert in range(ffn.num_experts):
            self.units.append(
                TorchUnit(
                    name=f"layer {layer} expert {expert}",
                    layer=layer,
                    neurons=ffn.down_proj.shape[2],
                    expert=expert,
                    token_share=self._experts_per_token() / ffn.num_experts,
                )
            )
            self._weights.append((ffn, expert))

    def _experts_per_token(self) -> int:
        return int(getattr(self.model.config, "num_experts_per_tok", 1))

    @property
    def description(self) -> dict[str, Any]:
        """Say what model this is.

        Returns
        -------
        dict
            Name, kind, activation, sizes, weight type.
        """
        config = self.model.config
        return {
            "name": self._name,
            "title": self._name,
            "kind": "Hugging Face model, torch",
            "architecture": str(config.model_type),
            "activation": str(activation_of(self.model)),
            "gated": not any(isinstance(ffn, PlainFFN) for ffn in self._ffns.values()),
            "hidden_size": config.hidden_size,
            "intermediate_size": max(unit.neurons for unit in self.units),
            "num_hidden_layers": config.num_hidden_layers,
            "num_experts": max(self._experts.values(), default=0),
            "experts_per_token": self._experts_per_token() if self._experts else 0,
            "weights": "F32",
            "bytes": sum(p.numel() * p.element_size() for p in self.model.parameters()),
        }

    @property
    def context_length(self) -> int:
        """Give the positions the model was trained for.

        Returns
        -------
        int
            Tokens.
        """
        return int(self.model.config.max_position_embeddings)

    @property
    def bos_id(self) -> int | None:
        """Give the token that windows begin with.

        Returns
        -------
        int or None
            Where the tokenizer puts one before every text.
        """
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None and self.tokenizer("a").input_ids[:1] == [bos] else None

    def text_ids(self, text: str) -> list[int]:
        """Turn a text into tokens.

        Parameters
        ----------
        text : str
            Any text.

        Returns
        -------
        list of int
            Token ids.
        """
        return list(self.tokenizer(text, verbose=False).input_ids)

    def experts(self, layer: int) -> int:
        """Count the experts of a layer.

        Parameters
        ----------
        layer : int
            Index.

        Returns
        -------
        int
            0 where it has none.
        """
        return self._experts.get(layer, 0)

    def down_t(self, unit: int) -> NDArray[np.float32]:
        """Give a unit's transposed down projection.

        Parameters
        ----------
        unit : int
            Index.

        Returns
        -------
        float32, shape (F, D)
            One row per neuron.
        """
        ffn, expert = self._weights[unit]
        weight = ffn.down_proj.weight if expert is None else ffn.down_proj[expert]  # [D, F]
        return np.ascontiguousarray(_array(weight.detach()).T)

    def capture(self, window: NDArray[np.int32], watcher: Watcher) -> None:
        """Run a window densely and show its FFNs.

        Parameters
        ----------
        window : int32, shape (T,)
            Token ids.
        watcher : Watcher
            Sees every layer as it is computed.
        """
        with self._probes(watcher, None), torch.no_grad():
            self.model(self._inputs(window), use_cache=False, logits_to_keep=1)

    def supports(self, selection: Selection) -> bool:
        """Say whether neurons can be left out this way.

        Parameters
        ----------
        selection : Selection
            Neurons to compute.

        Returns
        -------
        bool
            True: here any selection can be had.
        """
        del selection
        return True

    def predictions(
        self, window: NDArray[np.int32], selection: Selection | None
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
        """Predict the second half of a window.

        Parameters
        ----------
        window : int32, shape (T,)
            Token ids.
        selection : Selection or None
            Neurons to compute; all if None.

        Yields
        ------
        tuple
            Logits, float32 of shape (T, V), and the tokens that follow, int32 of shape (T,).
        """
        first = len(window) // 2
        with self._probes(None, selection), torch.no_grad():
            logits = self.model(
                self._inputs(window), use_cache=False, logits_to_keep=len(window) - first
            ).logits[0]
        for begin in range(first, len(window) - 1, _PIECE):
            end = min(begin + _PIECE, len(window) - 1)
            yield _array(logits[begin - first : end - first]), window[begin + 1 : end + 1]

    @contextmanager
    def thinned(self, selection: Selection | None) -> Iterator[None]:
        """Leave neurons out of whatever the model computes within this block.

        Parameters
        ----------
        selection : Selection or None
            Neurons to compute; all if None.
        """
        with self._probes(None, selection):
            yield

    def close(self) -> None:
        """Do nothing: there is nothing to remove."""

    def _inputs(self, window: NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(window[None].astype(np.int64)).to(self.model.device)

    @contextmanager
    def _probes(self, watcher: Watcher | None, selection: Selection | None) -> Iterator[None]:
        """Probes in all FFNs within this block; what was there before comes back."""
        before = {name: ffn.probe for name, ffn in self._ffns.items()}
        unit = 0
        for ffn in self._ffns.values():
            layer = self.units[unit].layer
            ffn.probe = _UnitProbe(unit, layer, watcher, selection)
            unit += ffn.num_experts if isinstance(ffn, GatedExperts) else 1
        try:
            # Torch's threads spin between two layers, and NumPy's would take their CPUs: twice the time.
            with threadpool_limits(1, user_api="blas"):
                yield
        finally:
            for name, probe in before.items():
                self._ffns[name].probe = probe


class _UnitProbe:
    """Shows the factors of an FFN to a watcher, and leaves out what a selection does not keep."""

    def __init__(self, unit: int, layer: int, watcher: Watcher | None, selection: Selection | None) -> None:
        self._unit = unit
        self._layer = layer
        self._watcher = watcher
        self._selection = selection

    def on_intermediate(self, intermediate: Tensor) -> None:
        """See nothing: `run` computes the FFN."""

    def run(self, ffn: GatedFFN | GatedExperts, x: Tensor, *routing: Tensor) -> Tensor:
        """Compute the FFN in parts."""
        if isinstance(ffn, GatedFFN):
            intermediate = self._intermediate(self._unit, *ffn.activation.factors(*ffn.project(x)))
            result: Tensor = ffn.down_proj(intermediate)
            return result
        chosen, weights = routing
        if self._watcher is not None:
            self._watcher.on_routing(self._layer, chosen.cpu().numpy())

        def run_expert(expert: int, token: Tensor) -> Tensor:
            factors = ffn.activation.factors(*ffn.project(x[token], expert))
            return functional.linear(self._intermediate(self._unit + expert, *factors), ffn.down_proj[expert])

        return ffn.mix(x, chosen, weights, run_expert)

    def _intermediate(self, unit: int, gate: Tensor, up: Tensor) -> Tensor:
        intermediate = gate * up
        flat = gate.flatten(0, -2)
        if not len(flat):  # an expert without tokens
            return intermediate
        if self._watcher is not None:
            self._watcher.on_ffn(unit, _array(flat), _array(up.flatten(0, -2)))
        if self._selection is None:
            return intermediate
        kept = self._selection.kept(unit, _array(flat), _array(intermediate.flatten(0, -2)))
        return intermediate * torch.from_numpy(kept).to(intermediate.device).view(intermediate.shape)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    """The tensor as NumPy has it; no copy on the CPU in float32."""
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array
