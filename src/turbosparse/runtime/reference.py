"""The engine once more, in plain NumPy: slow, readable, and what the native engine is tested against.

Weights are dequantised to float32 and every product is a float32 matrix product; there is no cache trick, no
thread and no kernel here. What it computes is the definition of each mode:

- ``dense``: every neuron of the feed-forward network (FFN).
- ``exact``: the same numbers, leaving out neurons whose activation is zero.
- ``threshold``: a neuron is dropped where ``|f(gate)| < ffn_gate_threshold`` or
  ``|f(gate) * g(up)| < ffn_threshold`` (a neuron that equals its threshold is kept). Where weights are in two
  parts, all of that is computed with the first ones, then the largest neurons and logits with both.
- ``predicted``: a neuron that is no candidate of the layer's predictor is dropped; of the others those that
  ``threshold`` drops, where the file has thresholds.
"""

import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from gguf.quants import dequantize
from numpy.typing import DTypeLike, NDArray

from turbosparse._native import GgufFile
from turbosparse.errors import ModelFileError
from turbosparse.runtime.model_file import ARCHITECTURES, KEY_PREDICTOR, KEY_REFINE

__all__ = ["FfnTrace", "ReferenceEngine"]

Array = NDArray[np.float32]
Mode = Literal["dense", "exact", "threshold", "predicted"]
PREFIX = "turbosparse-"


def _relu(x: Array) -> Array:
    return np.maximum(x, np.float32(0))


def _silu(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) may reach infinity, and x / infinity is right
        return np.asarray(x / (1 + np.exp(-x)), np.float32)


def _gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), np.float32)


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True), np.float32)


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return np.asarray(
        x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight, np.float32
    )


def _keys_under(prefix: str, metadata: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """Hyper-parameters under their names in the file."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    rope_base: float
    rope_scale: float
    eps: float
    activation: str
    activation_param: float
    gated: bool
    predictor: dict[str, Any]  # the keys turbosparse.predictor.*, without that
    refine: dict[str, Any]  # the keys turbosparse.refine.*, likewise

    @classmethod
    def read(cls, metadata: dict[str, Any]) -> "_Shape":
        arch = metadata["general.architecture"]
        heads = metadata[f"{arch}.attention.head_count"]
        head_dim = metadata.get(f"{arch}.attention.key_length", metadata[f"{arch}.embedding_length"] // heads)
        linear = metadata.get(f"{arch}.rope.scaling.type", "none") == "linear"
        return cls(
            architecture=arch.removeprefix(PREFIX),
            layers=metadata[f"{arch}.block_count"],
            heads=heads,
            kv_heads=metadata.get(f"{arch}.attention.head_count_kv", heads),
            head_dim=head_dim,
            rotary=metadata.get(f"{arch}.rope.dimension_count", head_dim),
            rope_base=metadata.get(f"{arch}.rope.freq_base", 10000.0),
            rope_scale=1 / metadata[f"{arch}.rope.scaling.factor"] if linear else 1.0,
            eps=metadata[f"{arch}.attention.layer_norm_rms_epsilon"],
            activation=metadata.get("turbosparse.activation", "silu"),
            activation_param=metadata.get("turbosparse.activation_param", 0.0),
            gated=metadata.get("turbosparse.gated", True),
            predictor=_keys_under(KEY_PREDICTOR, metadata),
            refine=_keys_under(KEY_REFINE, metadata),
        )


@dataclass(frozen=True, kw_only=True)
class FfnTrace:
    """What the FFN of one layer computed for T tokens."""

    gate: Array  # [T, F] f(gate), after the activation; without a gate f(up)
    up: Array  # [T, F] g(up); without a gate ones
    candidates: NDArray[np.bool_]  # [T, F] neurons that the mode looked at
    product: Array  # [T, F] their product; 0 where the mode dropped the neuron
    out: Array  # [T, D]


class ReferenceEngine:
    """A model and the KV cache of one sequence.

    Parameters
    ----------
    path : str or path-like
        GGUF file of architecture llama, qwen2 or qwen3 (or turbosparse- before it).
    cache_dtype : float16 or float32, optional
        What the KV cache holds; by default what the native engine keeps, which is float32 where the weights
        of keys are F32, else float16.

    Raises
    ------
    ModelFileError
        For a broken file and for another architecture.

    Notes
    -----
    All weights are held as float32: four bytes per weight.
    """

    def __init__(self, path: str | os.PathLike[str], *, cache_dtype: DTypeLike | None = None) -> None:
        file = GgufFile(path)
        self._shape = _Shape.read(file.metadata)
        if self._shape.architecture not in ARCHITECTURES:
            raise ModelFileError(
                f"[general.architecture] expected one of {', '.join(ARCHITECTURES)}, "
                f"got {self._shape.architecture}"
            )
        self._weights: dict[str, Array] = {}
        for tensor in file.tensors:
            raw = file.tensor_bytes(tensor.name)
            if tensor.type_name == "I32":
                self._weights[tensor.name] = raw.view(np.int32).astype(np.float32)
                continue
            values = dequantize(raw.reshape(*tensor.shape[:-1], -1) if tensor.type > 1 else raw, tensor.type)
            self._weights[tensor.name] = np.asarray(values, np.float32).reshape(tensor.shape)
        exact = file.tensor("blk.0.attn_k.weight").type_name == "F32"
        self._cache_dtype = np.dtype(cache_dtype or (np.float32 if exact else np.float16))
        self._keys: list[NDArray[Any]] = []
        self._values: list[NDArray[Any]] = []
        self.truncate(0)

    @property
    def position(self) -> int:
        """Count the tokens in the cache.

        Returns
        -------
        int
            Number of tokens.
        """
        return len(self._keys[0])

    def truncate(self, position: int) -> None:
        """Forget everything from a position on.

        Parameters
        ----------
        position : int
            Tokens to keep; 0 empties the cache.
        """
        shape = (0, self._shape.kv_heads, self._shape.head_dim)
        empty = [np.zeros(shape, self._cache_dtype)] * self._shape.layers
        self._keys = [keys[:position] for keys in self._keys or empty]
        self._values = [values[:position] for values in self._values or empty]

    def forward(
        self, ids: NDArray[np.int32], mode: Mode = "dense", *, trace: list[FfnTrace] | None = None
    ) -> Array:
        """Append tokens and compute the logits after each of them.

        Parameters
        ----------
        ids : int array, shape (T,)
            Token ids; they follow what is in the cache.
        mode : {"dense", "exact", "threshold"}
            Which neurons of the FFN count.
        trace : list of FfnTrace, optional
            Where to append what the FFN of each layer computed.

        Returns
        -------
        float32 array, shape (T, vocab_size)
            Logits.
        """
        shape, weights = self._shape, self._weights
        x = weights["token_embd.weight"][ids]  # [T, D]
        positions = self.position + np.arange(len(ids))
        for n in range(shape.layers):
            x = x + self._attention(
                n, _rms_norm(x, weights[f"blk.{n}.attn_norm.weight"], shape.eps), positions
            )
            ffn = self._ffn(n, x, mode)
            x = x + ffn.out
            if trace is not None:
                trace.append(ffn)
        x = _rms_norm(x, weights["output_norm.weight"], shape.eps)
        output = "output.weight" if "output.weight" in weights else "token_embd.weight"
        logits = x @ weights[output].T
        if "output_rest.weight" not in weights:
            return logits
        refined = logits >= logits.max(axis=-1, keepdims=True) - np.float32(shape.refine["logits"])
        more = x @ weights["output_rest.weight"].T
        return np.asarray(logits + np.where(refined | (mode != "threshold"), more, 0), np.float32)

    def _ffn(self, layer: int, residual: Array, mode: Mode) -> FfnTrace:
        block = f"blk.{layer}.ffn"
        x = _rms_norm(residual, self._weights[f"{block}_norm.weight"], self._shape.eps)
        gate, up = self._gate_and_up(block, x, whole=mode != "threshold")
        kept = candidates = np.ones(gate.shape, np.bool_)
        if mode == "predicted":
            read = residual if self._shape.predictor["input"] == "residual" else x
            kept = candidates = self._candidates(layer, read)
        neuron = self._weights.get(f"{block}_threshold")
        if mode == "threshold" or (mode == "predicted" and neuron is not None):
            assert neuron is not None, "the engine refuses files without thresholds"
            first = self._weights.get(f"{block}_gate_threshold", np.zeros_like(neuron))
            kept = kept & (np.abs(gate) >= first) & (np.abs(gate * up) >= neuron)
        product = np.where(kept, gate * up, np.float32(0))
        if f"{block}_down.weight" in self._weights:
            out = product @ self._weights[f"{block}_down.weight"].T
        else:
            out = product @ self._matrix(f"{block}_down_t", whole=mode != "threshold")
        if mode == "threshold" and self._shape.refine:
            assert neuron is not None, "the engine refuses files without thresholds"
            refined = kept & (np.abs(product) >= np.float32(self._shape.refine["neurons"]) * neuron)
            gate, up = self._gate_and_up(block, x, whole=True)
            changed = np.where(refined, gate * up, np.float32(0))
            unchanged = np.where(refined, np.float32(0), product)
            product = changed + unchanged
            out = unchanged @ self._matrix(f"{block}_down_t", whole=False)
            out += changed @ self._matrix(f"{block}_down_t", whole=True)
        return FfnTrace(gate=gate, up=up, candidates=candidates, product=product, out=out)

    def _matrix(self, name: str, *, whole: bool) -> Array:
        """A matrix, or where it is in two parts the first one; `whole`: their sum."""
        rest = self._weights.get(f"{name}_rest.weight")
        first = self._weights[f"{name}.weight"]
        return first + rest if whole and rest is not None else first

    def _gate_and_up(self, block: str, x: Array, *, whole: bool) -> tuple[Array, Array]:
        """f(gate) and g(up), [T, F] each; without a gate f(up) and ones."""
        up = x @ self._matrix(f"{block}_up", whole=whole).T
        if not self._shape.gated:
            return self._activate(up), np.ones_like(up)
        gate = self._activate(x @ self._matrix(f"{block}_gate", whole=whole).T)
        # ReLU on both factors: Turbo Sparse, arXiv:2406.05955
        return gate, _relu(up) if self._shape.activation == "drelu" else up

    def _candidates(self, layer: int, x: Array) -> NDArray[np.bool_]:
        """Neurons [T, F] that the layer's predictor names for the states x [T, D]."""
        block = f"blk.{layer}.ffn"
        if self._shape.predictor["kind"] == "low_rank":
            hidden = _relu(x @ self._weights[f"{block}_pred_a.weight"].T)
            scores = hidden @ self._weights[f"{block}_pred_b.weight"].T
        else:  # SparseInfer, arXiv:2411.12692
            names = ["gate" if self._shape.gated else "up"]
            names += ["up"] if self._shape.activation == "drelu" else []
            signs = [np.where(self._weights[f"{block}_{name}.weight"] > 0, 1.0, -1.0) for name in names]
            agreements = [(np.where(x > 0, 1.0, -1.0) @ rows.T) / x.shape[1] for rows in signs]
            scores = np.min(agreements, axis=0)
        candidates = np.asarray(scores, np.float32) >= np.float32(self._shape.predictor["threshold"][layer])
        candidates[:, self._weights.get(f"{block}_pred_hot", np.zeros(0)).astype(np.int64)] = True
        return candidates

    def _activate(self, gate: Array) -> Array:
        match self._shape.activation:
            case "silu":
                return _silu(gate)
            case "gelu":
                return _gelu(gate)
            case "relu" | "drelu":
                return _relu(gate)
            case "relu2":
                return _relu(gate) ** 2
            case "fatrelu":
                return np.where(gate >= np.float32(self._shape.activation_param), gate, np.float32(0))
            case other:
                raise ModelFileError(f"[turbosparse.activation] expected a known activation, got {other}")

    def _attention(self, layer: int, x: Array, positions: NDArray[np.int64]) -> Array:
        shape = self._shape
        q, k, v = (self._project(layer, name, x) for name in ("q", "k", "v"))  # [T, H | K, C]
        k = self._rotate(k, positions).astype(self._cache_dtype)
        self._keys[layer] = np.concatenate([self._keys[layer], k])
        self._values[layer] = np.concatenate([self._values[layer], v.astype(self._cache_dtype)])
        group = shape.heads // shape.kv_heads
        keys = np.repeat(self._keys[layer].astype(np.float32), group, axis=1)  # [positions, H, C]
        values = np.repeat(self._values[layer].astype(np.float32), group, axis=1)
        scores = np.einsum("thc,phc->htp", self._rotate(q, positions), keys) / np.float32(
            np.sqrt(shape.head_dim)
        )
        future = np.arange(len(keys))[None, :] > positions[:, None]  # [T, positions]
        scores = np.where(future, np.float32(-np.inf), scores)
        out = np.einsum("htp,phc->thc", _softmax(scores), values).reshape(len(x), -1)
        return np.asarray(out @ self._weights[f"blk.{layer}.attn_output.weight"].T, np.float32)

    def _project(self, layer: int, name: str, x: Array) -> Array:
        block = f"blk.{layer}.attn_{name}"
        y = x @ self._weights[f"{block}.weight"].T + self._weights.get(f"{block}.bias", np.float32(0))
        heads = y.reshape(len(x), -1, self._shape.head_dim)
        norm = self._weights.get(f"{block}_norm.weight")  # qwen3
        return heads if norm is None else _rms_norm(heads, norm, self._shape.eps)

    def _rotate(self, x: Array, positions: NDArray[np.int64]) -> Array:
        """Rotary embedding of x [T, heads, C]: llama turns pairs (2i, 2i + 1), others (i, i + rotary / 2)."""
        shape = self._shape
        half = shape.rotary // 2
        frequency = shape.rope_scale * shape.rope_base ** (-np.arange(half) / half)
        frequency = frequency / self._weights.get("rope_freqs.weight", np.float32(1))
        angle = (positions[:, None] * frequency)[:, None, :]  # [T, 1, half]
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        interleaved = shape.architecture == "llama"
        first = np.s_[..., 0 : shape.rotary : 2] if interleaved else np.s_[..., :half]
        second = np.s_[..., 1 : shape.rotary : 2] if interleaved else np.s_[..., half : shape.rotary]
        out = x.copy()
        out[first] = x[first] * cos - x[second] * sin
        out[second] = x[first] * sin + x[second] * cos
        return out
