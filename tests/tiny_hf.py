"""Tiny Hugging Face models of every supported type, a byte-level tokenizer, and texts, made on the spot."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

__all__ = ["VOCABULARY", "make_hf_model", "make_texts", "make_tokenizer", "tiny_ids"]

END = "<|endoftext|>"
VOCABULARY = 260
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_SPECIAL: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,  # as in all that are published
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


def make_hf_model(model_type: str = "llama", **settings: Any) -> Any:
    """Build a seeded model with two layers, in evaluation mode."""
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **_SPECIAL.get(model_type, {}),
            **settings,
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # the usual 0.02 makes the FFN too quiet to matter
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_tokenizer() -> Any:
    """Build a tokenizer with one token per byte and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, bos_token=END)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_ids(rows: int = 2, length: int = 16) -> torch.Tensor:
    """Return seeded token ids, [rows, length]."""
    return torch.randint(1, VOCABULARY - 3, (rows, length), generator=torch.Generator().manual_seed(1))


def make_texts(directory: Path, *, documents: int = 60) -> dict[str, Path]:
    """Write a text, a jsonl and a held-out file of made-up sentences."""
    generator = random.Random(3)
    words = ["the", "cat", "and", "a", "hat", "sat", "on", "mat", "ran", "to", "see", "red", "blue"]

    def sentence(number: int) -> str:
        return f"{number}: " + " ".join(generator.choice(words) for _ in range(generator.randint(5, 25)))

    paths = {name: directory / file for name, file in _FILES.items()}
    paths["text"].write_text("\n\n\n".join(sentence(i) for i in range(documents)), encoding="utf-8")
    lines = [json.dumps({"text": sentence(1000 + i)}) for i in range(documents)]
    paths["jsonl"].write_text("\n".join(lines) + "\n", encoding="utf-8")
    paths["held_out"].write_text("\n\n\n".join(sentence(2000 + i) for i in range(10)), encoding="utf-8")
    return paths


_FILES = {"text": "stories.txt", "jsonl": "records.jsonl", "held_out": "book.txt"}
