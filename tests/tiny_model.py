"""A tiny seeded model file with a tokenizer inside, written with the ``gguf`` package.

Small enough that every test can have its own, and varied enough to meet each branch of the engine:
architecture, weight type, activation, gate or none, tied or untied embeddings, biases, neuron-major down
projection, thresholds, predictors.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

__all__ = ["SPECIAL_TOKENS", "TinyModel", "make_tiny_model", "tiny_tokens"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "the"),
    ("i", "n"),
    ("a", "n"),
    ("an", "d"),
    ("Ġ", "and"),
    ("e", "r"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(kw_only=True)
class TinyModel:
    """What to write. All sizes are multiples of 32, so that every weight type fits."""

    arch: str = "llama"  # prefixed with "turbosparse-" unless the activation is the one it implies
    weight_type: str = "F32"  # name of a gguf.GGMLQuantizationType
    activation: str = ""  # empty: the one that the architecture implies
    activation_param: float | None = None
    gated: bool = True
    down_t: bool = False
    threshold: float | None = None  # ffn_threshold of all neurons
    gate_threshold: float | None = None
    predictor: str | None = None  # low_rank (random weights) or sign
    predictor_input: str = "ffn_norm"
    predictor_threshold: float = 0.0
    ranks: tuple[int, ...] = (32, 64)  # of the layers in turn
    hot: tuple[int, ...] = ()  # in layer 0
    tied: bool = True
    bias: bool | None = None  # None: as the architecture has it
    seed: int = 0
    hidden_size: int = 64
    intermediate_size: int = 160
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    context_length: int = 256
    rope_freq_base: float = 10000.0
    rope_scaling_factor: float | None = None  # linear
    rope_freqs: bool = False  # llama3's frequency factors
    neuron_order: NDArray[np.int64] | None = None  # permutation of the F neurons of every layer
    experts: int = 0
    experts_used: int = 2
    shared_intermediate_size: int = 0  # of a shared expert
    extra_metadata: dict[str, float | int | str] = field(default_factory=dict)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def __post_init__(self) -> None:
        implied = "relu" if self.arch == "smallthinker" else "silu"
        self.architecture = self.arch if self.activation in ("", implied) else f"turbosparse-{self.arch}"
        self.activation = self.activation or implied


def tiny_tokens() -> list[str]:
    """Byte-level BPE vocabulary: 256 bytes in GPT-2's printable spelling, the merges, the special tokens."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [*(spelling[byte] for byte in range(256)), *(a + b for a, b in MERGES), *SPECIAL_TOKENS]


def _ffn(
    model: TinyModel,
    layer: int,
    matrix: Callable[..., NDArray[np.float32]],
    end: str,
    experts: tuple[int, ...],
    inter: int,
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """One FFN of a layer, or its experts as one tensor each."""
    block, hidden = f"blk.{layer}.ffn_", model.hidden_size

    def matrices(rows: int, cols: int, gain: float = 1.0) -> NDArray[np.float32]:
        stack = [matrix(rows, cols, gain) for _ in range(experts[0] if experts else 1)]
        return np.stack(stack) if experts else stack[0]

    order = slice(None) if model.neuron_order is None else model.neuron_order
    if model.gated:
        yield f"{block}gate{end}.weight", matrices(inter, hidden, 1.5)[..., order, :]
    yield f"{block}up{end}.weight", matrices(inter, hidden, 1.5)[..., order, :]
    down = matrices(hidden, inter)[..., order]
    if model.down_t:
        yield f"{block}down_t{end}.weight", np.ascontiguousarray(down.swapaxes(-1, -2))
    else:
        yield f"{block}down{end}.weight", down
    if model.threshold is not None:
        yield f"{block}threshold{end}", np.full((*experts, inter), model.threshold, np.float32)
    if model.gate_threshold is not None:
        yield f"{block}gate_threshold{end}", np.full((*experts, inter), model.gate_threshold, np.float32)
    if model.predictor == "low_rank":
        rank = model.ranks[layer % len(model.ranks)]
        yield f"{block}pred_a{end}.weight", matrices(rank, hidden)
        yield f"{block}pred_b{end}.weight", matrices(inter, rank, 1.5)[..., order, :]


def _weights(model: TinyModel, vocab_size: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Matrices [rows, cols] and vectors by name, in file order; standard deviation 1/sqrt(cols)."""
    rng = np.random.default_rng(model.seed)
    hidden = model.hidden_size
    kv_rows = model.num_key_value_heads * model.head_dim

    def matrix(rows: int, cols: int, gain: float = 1.0) -> NDArray[np.float32]:
        return np.asarray(rng.standard_normal((rows, cols)) * (gain / np.sqrt(cols)), np.float32)

    def norm(size: int = hidden) -> NDArray[np.float32]:
        return np.asarray(1 + 0.1 * rng.standard_normal(size), np.float32)

    yield "token_embd.weight", matrix(vocab_size, hidden, 4.0)
    for n in range(model.num_hidden_layers):
        block = f"blk.{n}."
        yield block + "attn_norm.weight", norm()
        for name, rows in (("q", hidden), ("k", kv_rows), ("v", kv_rows)):
            yield f"{block}attn_{name}.weight", matrix(rows, hidden, 1.5)
            if model.bias if model.bias is not None else model.arch in ("qwen2", "qwen2moe"):
                yield f"{block}attn_{name}.bias", np.asarray(0.1 * rng.standard_normal(rows), np.float32)
            if model.arch.startswith("qwen3") and name != "v":
                yield f"{block}attn_{name}_norm.weight", norm(model.head_dim)
            if model.arch == "olmoe" and name != "v":
                yield f"{block}attn_{name}_norm.weight", norm(rows)
        yield block + "attn_output.weight", matrix(hidden, hidden)
        yield block + "ffn_norm.weight", norm()
        if model.experts:
            yield block + "ffn_gate_inp.weight", matrix(model.experts, hidden, 2.0)
            yield from _ffn(model, n, matrix, "_exps", (model.experts,), model.intermediate_size)
        else:
            yield from _ffn(model, n, matrix, "", (), model.intermediate_size)
        if model.shared_intermediate_size:
            yield block + "ffn_gate_inp_shexp.weight", matrix(1, hidden)[0]
            yield from _ffn(model, n, matrix, "_shexp", (), model.shared_intermediate_size)
    yield "output_norm.weight", norm()
    if not model.tied:
        yield "output.weight", matrix(vocab_size, hidden, 4.0)
    if model.rope_freqs:
        yield "rope_freqs.weight", np.linspace(1.0, 8.0, model.head_dim // 2, dtype=np.float32)


# gguf cannot quantise to these, so their blocks are random bytes: per type the bytes of a block of 256, and
# where its fp16 scales lie with values that give weights of about 1/16.
_RANDOM_BLOCKS = {
    "Q4_K": (144, {0: 3e-4, 2: 2.2e-3}),
    "Q5_K": (176, {0: 1.5e-4, 2: 2.3e-3}),
    "Q6_K": (210, {208: 4.5e-5}),
}


def _encode(array: NDArray[np.float32], kind: gguf.GGMLQuantizationType, seed: int) -> NDArray[np.generic]:
    """The rows of a matrix as a file holds them."""
    if kind.name not in _RANDOM_BLOCKS:
        return np.asarray(quantize(array, kind))
    nbytes, scales = _RANDOM_BLOCKS[kind.name]
    *rows, cols = array.shape
    blocks = np.random.default_rng(seed).integers(0, 256, (*rows, cols // 256, nbytes), np.uint8)
    for offset, scale in scales.items():
        blocks[..., offset : offset + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(*rows, -1)


def _add_metadata(writer: gguf.GGUFWriter, model: TinyModel, tokens: list[str]) -> None:
    writer.add_block_count(model.num_hidden_layers)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(model.rope_freq_base)
    if model.rope_scaling_factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope_scaling_factor)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(model.experts_used)
        writer.add_expert_feed_forward_length(model.intermediate_size)
    if model.shared_intermediate_size:
        writer.add_expert_shared_feed_forward_length(model.shared_intermediate_size)
    if model.activation != "silu" or model.down_t:
        writer.add_uint32("turbosparse.version", 1)
        writer.add_string("turbosparse.activation", model.activation)
        writer.add_bool("turbosparse.gated", model.gated)
        if model.activation_param is not None:
            writer.add_float32("turbosparse.activation_param", model.activation_param)
    if model.predictor is not None:
        writer.add_string("turbosparse.predictor.kind", model.predictor)
        writer.add_string("turbosparse.predictor.input", model.predictor_input)
        ffns = max(model.experts, 1) + (model.shared_intermediate_size > 0)
        thresholds = [model.predictor_threshold] * (model.num_hidden_layers * ffns)
        writer.add_array("turbosparse.predictor.threshold", thresholds)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokens])
    writer.add_token_merges([f"{a} {b}" for a, b in MERGES])
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template(CHAT_TEMPLATE)
    for key, value in model.extra_metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)


def make_tiny_model(path: Path, model: TinyModel | None = None) -> dict[str, NDArray[np.float32]]:
    """Writes the model file and returns its weights as they read back (dequantised), by tensor name."""
    model = model or TinyModel()
    tokens = tiny_tokens()
    writer = gguf.GGUFWriter(path, model.architecture)
    _add_metadata(writer, model, tokens)
    weight_type = gguf.GGMLQuantizationType[model.weight_type]
    stored = {}
    for seed, (name, array) in enumerate(_weights(model, len(tokens))):
        matrices = name.endswith(".weight") and array.ndim > 1 and "ffn_gate_inp" not in name
        kind = weight_type if matrices else gguf.GGMLQuantizationType.F32
        data = _encode(array, kind, seed)
        stored[name] = dequantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    if model.hot:
        writer.add_tensor(
            f"blk.0.ffn_pred_hot{'_exps' if model.experts else ''}", np.array(model.hot, np.int32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored
