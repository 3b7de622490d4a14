"""What a Hugging Face ``config.json`` says, as a model file says it: sizes, rope, activation, training.

Each supported ``model_type`` becomes an architecture that the engine runs. Whatever would change the function
and has no key in the model file is refused here by its name.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import ModelFileError
from turbosparse.export.weight_files import read_json
from turbosparse.runtime.model_file import EXPERT_NORM

__all__ = ["MODEL_TYPES", "Experts", "Family", "HFConfig"]

_PREFIX = "turbosparse_"  # of the model types that `turbosparse sparsify` writes
_HIDDEN_ACTS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
_SWAPPED = ("silu", "gelu", "relu", "relu2", "fatrelu", "drelu")  # what the model file can name


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a model type is laid out."""

    architecture: str
    """Architecture in the model file."""
    permuted: bool
    """Whether rows of q and k are reordered, so that rope turns neighbours instead of halves of a head."""
    qkv_bias: bool = False
    """Whether q, k and v have biases."""
    qk_norm: bool = False
    """Whether each head of q and k is normalised before rope."""
    fused: bool = False
    """Whether q, k and v are one tensor, and gate and up another."""
    qk_norm_all: bool = False
    """Whether q and k are normalised as a whole before rope."""
    experts: "ExpertNames | None" = None
    """Where the experts are; None for a model that has none."""
    shared_expert: bool = False
    """Whether a shared expert with a gate of its own stands beside them."""
    normalized: bool = True
    """Whether readers make the factors of a token's experts add up to one."""


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """Names of the tensors of experts, below ``model.layers.N.``."""

    block: str = "mlp."
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, kw_only=True)
class Experts:
    """What a configuration says of its experts."""

    count: int
    used: int
    intermediate_size: int
    shared_intermediate_size: int
    """0 where there is no shared expert."""
    normalized: bool
    """Whether the factors of a token's experts add up to one."""


MODEL_TYPES = {
    "llama": Family(architecture="llama", permuted=True),
    "mistral": Family(architecture="llama", permuted=True),
    "qwen2": Family(architecture="qwen2", permuted=False, qkv_bias=True),
    "qwen3": Family(architecture="qwen3", permuted=False, qk_norm=True),
    "mixtral": Family(
        architecture="llama",
        permuted=True,
        experts=ExpertNames(block="block_sparse_moe.", gate="w1", up="w3", down="w2"),
    ),
    "qwen2_moe": Family(
        architecture="qwen2moe",
        permuted=False,
        qkv_bias=True,
        experts=ExpertNames(),
        shared_expert=True,
        normalized=False,
    ),
    "qwen3_moe": Family(architecture="qwen3moe", permuted=False, qk_norm=True, experts=ExpertNames()),
    "olmoe": Family(
        architecture="olmoe", permuted=False, qk_norm_all=True, experts=ExpertNames(), normalized=False
    ),
    "phi3": Family(architecture="llama", permuted=True, fused=True),
}


class HFConfig:
    """A directory's ``config.json``, checked.

    Parameters
    ----------
    directory : Path
        A Hugging Face directory.

    Attributes
    ----------
    family : Family
        Layout of its model type.
    activation : str
        Name of the activation, as in the model file.
    activation_param : float or None
        FATReLU's threshold.

    Raises
    ------
    ModelFileError
        When the model type, the activation or another setting is one that the engine does not compute.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / "config.json"
        self._values = read_json(self._file)
        written = self._values.get("model_type")
        self.model_type = str(written).removeprefix(_PREFIX)
        if self.model_type not in MODEL_TYPES:
            raise self._error("model_type", f"one of {', '.join(MODEL_TYPES)}", written)
        self.family = MODEL_TYPES[self.model_type]
        if self._values.get("quantization_config"):
            raise self._error("quantization_config", "weights that are not quantised", "a quantised model")
        self.hidden_size = self._size("hidden_size")
        self.intermediate_size = self._size("intermediate_size")
        self.num_hidden_layers = self._size("num_hidden_layers")
        self.num_attention_heads = self._size("num_attention_heads")
        self.num_key_value_heads = self._size("num_key_value_heads", self.num_attention_heads)
        self.head_dim = self._size("head_dim", self.hidden_size // self.num_attention_heads)
        self.vocab_size = self._size("vocab_size")
        self.tied_embeddings = bool(self._values.get("tie_word_embeddings", False))
        self.activation, self.activation_param = self._activation(str(written).startswith(_PREFIX))
        self._rope = self._read_rope()
        self.experts = None if self.family.experts is None else self._read_experts()

    def keys(self) -> dict[str, Any]:
        """Give the keys of the architecture.

        Returns
        -------
        dict
            ``general.architecture`` and everything under the architecture's name.
        """
        keys: dict[str, Any] = {
            "block_count": self.num_hidden_layers,
            "context_length": self._size("max_position_embeddings"),
            "embedding_length": self.hidden_size,
            "feed_forward_length": self.intermediate_size,
            "attention.head_count": self.num_attention_heads,
            "attention.head_count_kv": self.num_key_value_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": self._number("rms_norm_eps", 1e-6),
            "vocab_size": self.vocab_size,
            "rope.dimension_count": self.head_dim,
            "rope.freq_base": float(self._rope["rope_theta"]),
        }
        if self._rope["rope_type"] == "linear":
            keys["rope.scaling.type"] = "linear"
            keys["rope.scaling.factor"] = float(self._rope["factor"])
        window = self._values.get("sliding_window")
        if window is not None and self._values.get("use_sliding_window", True):
            keys["attention.sliding_window"] = self._size("sliding_window")
        if self.experts is not None:
            keys |= self._expert_keys(self.experts)
        architecture = self.family.architecture
        named = {f"{architecture}.{name}": value for name, value in keys.items()}
        return {"general.architecture": architecture, **named}

    def rope_factors(self) -> NDArray[np.float32] | None:
        """Give the factors that Llama 3 divides rope's frequencies by.

        Returns
        -------
        float32, shape (C / 2,), or None
            None where frequencies stay.
        """
        rope = self._rope
        if rope["rope_type"] != "llama3":
            return None
        factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        exponents = np.arange(0, self.head_dim, 2) / self.head_dim
        wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
        turns = float(rope["original_max_position_embeddings"]) / wavelengths  # within the first context
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return np.asarray(1 / ((1 - smooth) / factor + smooth), np.float32)

    def training(self) -> dict[str, Any] | None:
        """Give the record that ``sparsify`` and ``train-control`` leave.

        Returns
        -------
        dict or None
            ``tokens``, and where known ``stage`` and ``base_model``; None where nothing was trained.
        """
        record = self._values.get("turbosparse_training")
        if isinstance(record, dict):
            return record
        state = self._file.with_name("data_state.json")  # what a run has drawn until these weights
        if not state.is_file():
            return None
        drawn = read_json(state).get("drawn")
        counts = drawn.values() if isinstance(drawn, dict) else ()
        return {"tokens": sum(int(source.get("tokens", 0)) for source in counts)}

    @property
    def untrained(self) -> bool:
        """Whether the activation was swapped and nothing was trained since."""
        swapped = "turbosparse" in self._values or "turbosparse_training" in self._values
        return swapped and not (self.training() or {}).get("tokens")

    @property
    def name(self) -> str | None:
        """The model's name, where transformers kept it."""
        name = self._values.get("_name_or_path") or self._values.get("_model_name_or_path")
        return Path(name).name if isinstance(name, str) and name else None

    def token_ids(self, name: str) -> list[int]:
        """Give the ids of a special token.

        Parameters
        ----------
        name : str
            ``bos``, ``eos``, ``pad`` or ``unk``.

        Returns
        -------
        list of int
            None, one, or several where the model stops at each of them.
        """
        value = self._values.get(f"{name}_token_id")
        ids = value if isinstance(value, list) else [value]
        return [item for item in ids if type(item) is int and 0 <= item < self.vocab_size]

    def _activation(self, prefixed: bool) -> tuple[str, float | None]:
        recorded = self._values.get("turbosparse")
        if not prefixed and recorded is None:
            act = self._values.get("hidden_act")
            if act not in _HIDDEN_ACTS:
                raise self._error("hidden_act", f"one of {', '.join(_HIDDEN_ACTS)}", act)
            return _HIDDEN_ACTS[str(act)], None
        if not isinstance(recorded, dict) or recorded.get("name") not in _SWAPPED:
            got = recorded.get("name") if isinstance(recorded, dict) else recorded
            raise self._error("turbosparse", f"the name of an activation, {', '.join(_SWAPPED)}", got)
        name, threshold = str(recorded["name"]), recorded.get("threshold", 0.0)
        if name == "fatrelu":
            return name, float(threshold)
        if threshold:
            raise self._error("turbosparse.threshold", f"0 for {name}: a model file has no other", threshold)
        return name, None

    def _read_rope(self) -> dict[str, Any]:
        values = self._values
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise self._error("rope_parameters", "an object", rope)
        kind = rope.get("rope_type", rope.get("type", "default"))
        rope = {"rope_theta": values.get("rope_theta", 10000.0), **rope, "rope_type": kind}
        needed = {
            "default": (),
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }
        if kind not in needed:
            raise self._error("rope_type", f"one of {', '.join(needed)}", kind)
        for name in ("rope_theta", *needed[kind]):
            value = rope.get(name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
                raise self._error(f"rope_parameters.{name}", "a number above 0", value)
        partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
        if partial != 1:
            raise self._error("partial_rotary_factor", "1", partial)
        return rope

    def _read_experts(self) -> Experts:
        for name, allowed in (("mlp_only_layers", ([], None)), ("decoder_sparse_step", (1, None))):
            if self._values.get(name) not in allowed:
                raise self._error(name, "experts in every layer", self._values[name])
        if self._values.get("clip_qkv") is not None:
            raise self._error("clip_qkv", "none", self._values["clip_qkv"])
        count = self._size("num_local_experts", self._values.get("num_experts"))
        used = self._size("num_experts_per_tok")
        if used > count:
            raise self._error("num_experts_per_tok", f"at most {count}, the number of experts", used)
        shared = self.family.shared_expert
        return Experts(
            count=count,
            used=used,
            intermediate_size=self._size("moe_intermediate_size", self.intermediate_size),
            shared_intermediate_size=self._size("shared_expert_intermediate_size") if shared else 0,
            normalized=bool(self._values.get("norm_topk_prob", self.model_type == "mixtral")),
        )

    def _expert_keys(self, experts: Experts) -> dict[str, Any]:
        keys: dict[str, Any] = {
            "expert_count": experts.count,
            "expert_used_count": experts.used,
            "expert_feed_forward_length": experts.intermediate_size,
        }
        if experts.shared_intermediate_size:
            keys["expert_shared_feed_forward_length"] = experts.shared_intermediate_size
        if experts.normalized != self.family.normalized:
            keys[EXPERT_NORM] = experts.normalized
        return keys

    def _size(self, name: str, default: int | None = None) -> int:
        value = self._values.get(name)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise self._error(name, "an integer above 0", value)
        return value

    def _number(self, name: str, default: float) -> float:
        value = self._values.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
            raise self._error(name, "a number between 0 and 1", value)
        return float(value)

    def _error(self, name: str, expected: str, got: Any) -> ModelFileError:
        return ModelFileError(f"[{self._file}: {name}] expected {expected}, got {str(got)[:80]!r}")
