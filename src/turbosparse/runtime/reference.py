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
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from turbosparse._native import GgufFile
from turbosparse.errors import ModelFileError
from turbosparse.runtime.bundle_rows import unbundled
from turbosparse.runtime.model_file import ARCHITECTURES, KEY_PREDICTOR, KEY_REFINE

__all__ = ["FfnTrace", "ReferenceEngine"]

Array = NDArray[np.float32]
Mode = Literal["dense", "exact", "threshold", "predicted"]
KvCache = Literal["f32", "f16", "q8_0"]
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


def _as_cached(x: Array, kind: KvCache) -> Array:
    """What is left of keys or values in the cache."""
    if kind == "f32":
        return x
    if kind == "f16":
        return x.astype(np.float16).astype(np.float32)
    stored = quantize(np.ascontiguousarray(x), GGMLQuantizationType.Q8_0)
    return np.asarray(dequantize(stored, GGMLQuantizationType.Q8_0), np.float32).reshape(x.shape)


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
    experts: int
    experts_used: int
    shared_expert: bool
    sigmoid_scores: bool
    normalized_scores: bool
    score_scale: float
    routes_before_attention: bool
    unrotated_layers: int  # layers 0, n, 2n ... do not rotate; 0: all do

    @classmethod
    def read(cls, metadata: dict[str, Any]) -> "_Shape":
        arch = metadata["general.architecture"]
        heads = metadata[f"{arch}.attention.head_count"]
        head_dim = metadata.get(f"{arch}.attention.key_length", metadata[f"{arch}.embedding_length"] // heads)
        linear = metadata.get(f"{arch}.rope.scaling.type", "none") == "linear"
        base = arch.removeprefix(PREFIX)
        thinker = base == "smallthinker"
        return cls(
            architecture=base,
            layers=metadata[f"{arch}.block_count"],
            heads=heads,
            kv_heads=metadata.get(f"{arch}.attention.head_count_kv", heads),
            head_dim=head_dim,
            rotary=metadata.get(f"{arch}.rope.dimension_count", head_dim),
            rope_base=metadata.get(f"{arch}.rope.freq_base", 10000.0),
            rope_scale=1 / metadata[f"{arch}.rope.scaling.factor"] if linear else 1.0,
            eps=metadata[f"{arch}.attention.layer_norm_rms_epsilon"],
            activation=metadata.get("turbosparse.activation", ARCHITECTURES.get(base, "silu")),
            activation_param=metadata.get("turbosparse.activation_param", 0.0),
            gated=metadata.get("turbosparse.gated", True),
            predictor=_keys_under(KEY_PREDICTOR, metadata),
            refine=_keys_under(KEY_REFINE, metadata),
            experts=metadata.get(f"{arch}.expert_count", 0),
            experts_used=metadata.get(f"{arch}.expert_used_count", 0),
            shared_expert=base == "qwen2moe",
            sigmoid_scores=metadata.get(f"{arch}.expert_gating_func") == 2,
            normalized_scores=metadata.get(f"{arch}.expert_weights_norm", base not in ("qwen2moe", "olmoe")),
            score_scale=metadata.get(f"{arch}.expert_weights_scale", 0.0) or 1.0,
            routes_before_attention=thinker,
            unrotated_layers=4 if thinker and metadata.get(f"{arch}.attention.sliding_window") else 0,
        )


@dataclass(frozen=True, kw_only=True)
class FfnTrace:
    """What the FFN of one layer, or one expert, computed for T tokens."""

    gate: Array  # [T, F] f(gate), after the activation; without a gate f(up)
    up: Array  # [T, F] g(up); without a gate ones
    candidates: NDArray[np.bool_]  # [T, F] neurons that the mode looked at
    product: Array  # [T, F] their product; 0 where the mode dropped the neuron
    out: Array  # [T, D]
    factor: Array  # [T, 1] of the output in the residual; 0 where the router did not choose the expert


class _Ffn:
    """The tensors of one FFN of a layer, by the part of their name after ``ffn_``."""

    PARTS = ("gate", "up", "down", "down_t", "gate_rest", "up_rest", "down_t_rest", "pred_a", "pred_b")

    def __init__(
        self, weights: dict[str, Array], block: str, suffix: str = "", expert: int | None = None
    ) -> None:
        names = {part: f"{block}_{part}{suffix}.weight" for part in self.PARTS}
        names |= {part: f"{block}_{part}{suffix}" for part in ("threshold", "gate_threshold")}
        which = slice(None) if expert is None else expert
        self.weights = {part: weights[name][which] for part, name in names.items() if name in weights}
        hot = weights.get(f"{block}_pred_hot{suffix}", np.zeros(0)).astype(np.int64)
        neurons = len(self.weights["up"])
        self.hot = hot if expert is None else hot[hot // neurons == expert] % neurons

    def matrix(self, part: str, *, whole: bool) -> Array:
        """A matrix, or where it is in two parts the first one; `whole`: their sum."""
        rest = self.weights.get(f"{part}_rest")
        return self.weights[part] + rest if whole and rest is not None else self.weights[part]


class ReferenceEngine:
    """A model and the KV cache of one sequence.

    Parameters
    ----------
    path : str or path-like
        GGUF file of an architecture that the engine knows (or turbosparse- before it).
    kv_cache : {"f32", "f16", "q8_0"}, optional
        What the KV cache holds; by default what the native engine keeps, which is f32 where the weights of
        keys are F32, else f16.

    Raises
    ------
    ModelFileError
        For a broken file and for another architecture.

    Notes
    -----
    All weights are held as float32: four bytes per weight.
    """

    def __init__(self, path: str | os.PathLike[str], *, kv_cache: KvCache | None = None) -> None:
        file = GgufFile(path)
        metadata = file.metadata
        self._shape = _Shape.read(metadata)
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
            if "ffn_bundles" in tensor.name:
                width = file.tensor("output_norm.weight").shape[0]
                self._weights |= unbundled(metadata, tensor.name, raw.reshape(tensor.shape), width)
                continue
            values = dequantize(raw.reshape(*tensor.shape[:-1], -1) if tensor.type > 1 else raw, tensor.type)
            self._weights[tensor.name] = np.asarray(values, np.float32).reshape(tensor.shape)
        exact = file.tensor("blk.0.attn_k.weight").type_name == "F32"
        self._kv_cache: KvCache = kv_cache or ("f32" if exact else "f16")
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
        empty = [np.zeros(shape, np.float32)] * self._shape.layers
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
            Where to append what the FFN of each layer computed; with experts each of them, then the shared
            one, for all tokens.

        Returns
        -------
        float32 array, shape (T, vocab_size)
            Logits.
        """
        shape, weights = self._shape, self._weights
        x = weights["token_embd.weight"][ids]  # [T, D]
        positions = self.position + np.arange(len(ids))
        for n in range(shape.layers):
            before = x
            x = x + self._attention(
                n, _rms_norm(x, weights[f"blk.{n}.attn_norm.weight"], shape.eps), positions
            )
            ffns = self._ffns(n, before, x, mode)
            x = x + sum(ffn.factor * ffn.out for ffn in ffns)
            if trace is not None:
                trace.extend(ffns)
        x = _rms_norm(x, weights["output_norm.weight"], shape.eps)
        output = "output.weight" if "output.weight" in weights else "token_embd.weight"
        logits = x @ weights[output].T
        if "output_rest.weight" not in weights:
            return logits
        refined = logits >= logits.max(axis=-1, keepdims=True) - np.float32(shape.refine["logits"])
        more = x @ weights["output_rest.weight"].T
        return np.asarray(logits + np.where(refined | (mode != "threshold"), more, 0), np.float32)

    def _ffns(self, layer: int, before_attention: Array, residual: Array, mode: Mode) -> list[FfnTrace]:
        """What each FFN of a layer computes: one, or all experts and the shared one."""
        shape, block = self._shape, f"blk.{layer}.ffn"
        x = _rms_norm(residual, self._weights[f"{block}_norm.weight"], shape.eps)
        always = np.ones((len(x), 1), np.float32)
        if shape.experts == 0:
            return [self._ffn(_Ffn(self._weights, block), layer, x, residual, always, mode)]
        factors = self._route(layer, before_attention if shape.routes_before_attention else x)  # [T, E]
        per_layer = shape.experts + shape.shared_expert
        traces = [
            self._ffn(
                _Ffn(self._weights, block, "_exps", e),
                layer * per_layer + e,
                x,
                residual,
                factors[:, e : e + 1],
                mode,
            )
            for e in range(shape.experts)
        ]
        if shape.shared_expert:
            gate = x @ self._weights[f"{block}_gate_inp_shexp.weight"]  # [T]
            factor = np.asarray(1 / (1 + np.exp(-gate[:, None])), np.float32)
            shared = _Ffn(self._weights, block, "_shexp")
            traces.append(self._ffn(shared, (layer + 1) * per_layer - 1, x, residual, factor, mode))
        return traces

    def _route(self, layer: int, x: Array) -> Array:
        """Factors [T, E] of the experts' outputs: 0 for those that were not chosen."""
        shape = self._shape
        logits = x @ self._weights[f"blk.{layer}.ffn_gate_inp.weight"].T  # [T, E]
        scores = (
            np.asarray(1 / (1 + np.exp(-logits)), np.float32) if shape.sigmoid_scores else _softmax(logits)
        )
        order = np.argsort(-scores, axis=1, kind="stable")
        np.put_along_axis(scores, order[:, shape.experts_used :], np.float32(0), axis=1)
        if shape.normalized_scores:
            scores = scores / scores.sum(axis=1, keepdims=True)
        return scores * np.float32(shape.score_scale)

    def _ffn(
        self, ffn: "_Ffn", number: int, x: Array, residual: Array, factor: Array, mode: Mode
    ) -> FfnTrace:
        gate, up = self._gate_and_up(ffn, x, whole=mode != "threshold")
        kept = candidates = np.ones(gate.shape, np.bool_)
        if mode == "predicted":
            read = residual if self._shape.predictor["input"] == "residual" else x
            kept = candidates = self._candidates(ffn, number, read)
        neuron = ffn.weights.get("threshold")
        if mode == "threshold" or (mode == "predicted" and neuron is not None):
            assert neuron is not None, "the engine refuses files without thresholds"
            first = ffn.weights.get("gate_threshold", np.zeros_like(neuron))
            kept = kept & (np.abs(gate) >= first) & (np.abs(gate * up) >= neuron)
        product = np.where(kept, gate * up, np.float32(0))
        if "down" in ffn.weights:
            out = product @ ffn.weights["down"].T
        else:
            out = product @ ffn.matrix("down_t", whole=mode != "threshold")
        if mode == "threshold" and self._shape.refine:
            assert neuron is not None, "the engine refuses files without thresholds"
            refined = kept & (np.abs(product) >= np.float32(self._shape.refine["neurons"]) * neuron)
            gate, up = self._gate_and_up(ffn, x, whole=True)
            changed = np.where(refined, gate * up, np.float32(0))
            unchanged = np.where(refined, np.float32(0), product)
            product = changed + unchanged
            out = unchanged @ ffn.matrix("down_t", whole=False)
            out += changed @ ffn.matrix("down_t", whole=True)
        return FfnTrace(gate=gate, up=up, candidates=candidates, product=product, out=out, factor=factor)

    def _gate_and_up(self, ffn: "_Ffn", x: Array, *, whole: bool) -> tuple[Array, Array]:
        """f(gate) and g(up), [T, F] each; without a gate f(up) and ones."""
        up = x @ ffn.matrix("up", whole=whole).T
        if not self._shape.gated:
            return self._activate(up), np.ones_like(up)
        gate = self._activate(x @ ffn.matrix("gate", whole=whole).T)
        # ReLU on both factors: Turbo Sparse, arXiv:2406.05955
        return gate, _relu(up) if self._shape.activation == "drelu" else up

    def _candidates(self, ffn: "_Ffn", number: int, x: Array) -> NDArray[np.bool_]:
        """Neurons [T, F] that the predictor of an FFN names for the states x [T, D]."""
        if self._shape.predictor["kind"] == "low_rank":
            scores = _relu(x @ ffn.weights["pred_a"].T) @ ffn.weights["pred_b"].T
        else:  # SparseInfer, arXiv:2411.12692
            names = ["gate" if self._shape.gated else "up"]
            names += ["up"] if self._shape.activation == "drelu" else []
            signs = [np.where(ffn.weights[name] > 0, 1.0, -1.0) for name in names]
            agreements = [(np.where(x > 0, 1.0, -1.0) @ rows.T) / x.shape[1] for rows in signs]
            scores = np.min(agreements, axis=0)
        candidates = np.asarray(scores, np.float32) >= np.float32(self._shape.predictor["threshold"][number])
        candidates[:, ffn.hot] = True
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
        if shape.unrotated_layers == 0 or layer % shape.unrotated_layers:
            q, k = self._rotate(q, positions), self._rotate(k, positions)
        k = _as_cached(k, self._kv_cache)
        self._keys[layer] = np.concatenate([self._keys[layer], k])
        self._values[layer] = np.concatenate([self._values[layer], _as_cached(v, self._kv_cache)])
        group = shape.heads // shape.kv_heads
        keys = np.repeat(self._keys[layer].astype(np.float32), group, axis=1)  # [positions, H, C]
        values = np.repeat(self._values[layer].astype(np.float32), group, axis=1)
        scores = np.einsum("thc,phc->htp", q, keys) / np.float32(np.sqrt(shape.head_dim))
        future = np.arange(len(keys))[None, :] > positions[:, None]  # [T, positions]
        scores = np.where(future, np.float32(-np.inf), scores)
        out = np.einsum("htp,phc->thc", _softmax(scores), values).reshape(len(x), -1)
        return np.asarray(out @ self._weights[f"blk.{layer}.attn_output.weight"].T, np.float32)

    def _project(self, layer: int, name: str, x: Array) -> Array:
        block = f"blk.{layer}.attn_{name}"
        y = x @ self._weights[f"{block}.weight"].T + self._weights.get(f"{block}.bias", np.float32(0))
        norm = self._weights.get(f"{block}_norm.weight")
        whole = self._shape.architecture == "olmoe"
        if norm is not None and whole:
            y = _rms_norm(y, norm, self._shape.eps)
        heads = y.reshape(len(x), -1, self._shape.head_dim)
        if norm is not None and not whole:  # qwen3
            heads = _rms_norm(heads, norm, self._shape.eps)
        return heads

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
