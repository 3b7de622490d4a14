"""Tiny Hugging Face directories to export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_hf import make_hf_model, make_tokenizer
from turbosparse.models.activations import parse_activation
from turbosparse.models.registry import swap_activation

MERGES = ("t h", "th e")  # a model file has at least one

__all__ = ["MakeDirectory"]

MakeDirectory = Callable[..., Path]


@pytest.fixture
def make_directory(tmp_path: Path) -> MakeDirectory:
    """Save a tiny model with its tokenizer; one with an activation counts as trained on `tokens`."""

    def make(
        model_type: str = "llama",
        *,
        activation: str | None = None,
        tokens: int = 1000,
        shards: str = "1GB",
        **settings: Any,
    ) -> Path:
        directory = tmp_path / "model"
        model = make_hf_model(model_type, **{"intermediate_size": 64, **settings})
        if activation is not None:
            swap_activation(model, parse_activation(activation))
            model.config.turbosparse_training = {"tokens": tokens, "stage": "distillation"}
        model.save_pretrained(directory, max_shard_size=shards)
        make_tokenizer().save_pretrained(directory)
        _add_merges(directory / "tokenizer.json")
        return directory

    return make


def _add_merges(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    for merge in MERGES:
        model["vocab"][merge.replace(" ", "")] = len(model["vocab"])
        model["merges"].append(merge.split())
    path.write_text(json.dumps(content), encoding="utf-8")
