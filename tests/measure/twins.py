"""The same tiny model for both columns, and text for it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.tiny_hf import make_hf_model
from tests.tiny_model import TinyModel, make_tiny_model, tiny_tokens
from turbosparse.measure.hugging_face import HuggingFaceModel
from turbosparse.models.activations import Activation
from turbosparse.models.registry import swap_activation
from turbosparse.runtime.model_file import ModelFile
from turbosparse.tokenizer import Tokenizer

__all__ = ["TEXT", "as_hugging_face", "byte_tokenizer", "make_twins"]

TEXT = "".join(
    f"{n}: the cat and the hat, the rat in the land of {n * n} other men and then some more. "
    for n in range(60)
)
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def byte_tokenizer() -> Any:
    """A stand-in for a Hugging Face tokenizer: a token is a byte."""

    class Bytes:
        bos_token_id = None

        def __call__(self, text: str, **options: object) -> SimpleNamespace:
            return SimpleNamespace(input_ids=list(text.encode()))

    return Bytes()


def make_twins(path: Path, activation: str = "silu") -> HuggingFaceModel:
    """Write a qwen2 model file and return the same model in torch, with the file's tokenizer."""
    shape = TinyModel(arch="qwen2", activation=activation)
    return as_hugging_face(path, shape, make_tiny_model(path, shape))


def as_hugging_face(path: Path, shape: TinyModel, weights: dict[str, Any]) -> HuggingFaceModel:
    """The weights of a model file in the Hugging Face class."""
    model = make_hf_model(
        "qwen2",
        vocab_size=len(tiny_tokens()),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context_length,
        rope_theta=shape.rope_freq_base,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    state = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
        "lm_head.weight": weights["token_embd.weight"],
    }
    for name, array in weights.items():
        if name.startswith("blk."):
            _, layer, stem, kind = name.split(".")
            state[f"model.layers.{layer}.{_NAMES[stem]}.{kind}"] = array
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in state.items()})
    if shape.activation != "silu":
        swap_activation(model, Activation(name=shape.activation))
    tokenizer = Tokenizer.from_metadata(ModelFile(path).metadata)

    class FileTokenizer:
        bos_token_id = None

        def __call__(self, text: str, **options: object) -> SimpleNamespace:
            return SimpleNamespace(input_ids=tokenizer.encode(text))

    return HuggingFaceModel(model, FileTokenizer(), name="twin")
