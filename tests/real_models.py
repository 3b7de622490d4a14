"""Where the slow tests find real models: the folder named by TURBOSPARSE_TEST_MODELS."""

import os
from pathlib import Path

import pytest

__all__ = ["QWEN", "SMOLLM2", "real_model"]

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
QWEN = "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"


def real_model(name: str) -> Path:
    """Path of a model file, or skips the test."""
    folder = os.environ.get("TURBOSPARSE_TEST_MODELS")
    if folder is None:
        pytest.skip("TURBOSPARSE_TEST_MODELS does not name a folder of models")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"{name} is not in {folder}")
    return path
