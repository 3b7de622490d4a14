"""A model that is slow enough to be interrupted and never ends by itself."""

from pathlib import Path

import pytest

from tests.tiny_model import TinyModel, make_tiny_model


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("endless") / "endless.gguf"
    shape = TinyModel(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, context_length=8192)
    make_tiny_model(path, shape)
    data = path.read_bytes()
    for name in (b"tokenizer.ggml.eos_token_id", b"<|im_end|>", b"<|endoftext|>"):
        data = data.replace(name, name.replace(b"e", b"E"))  # no longer names that end an answer
    path.write_bytes(data)
    return path
