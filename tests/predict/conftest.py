"""Tiny dReLU models on disk, one of their layers, and states of low dimension to fit on."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_hf import make_hf_model, make_texts, make_tokenizer
from turbosparse.models.activations import Activation
from turbosparse.models.registry import swap_activation
from turbosparse.predict.capture import CapturedInputs
from turbosparse.predict.layers import FFNLayer, layers_of

DRELU = Activation(name="drelu")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with models named by their type, and stories.txt and book.txt."""
    directory = tmp_path_factory.mktemp("predictors")
    for model_type in ("llama", "mixtral"):
        swap_activation(make_hf_model(model_type), DRELU).save_pretrained(directory / model_type)
        make_tokenizer().save_pretrained(directory / model_type)
    make_texts(directory)
    return directory


@pytest.fixture
def layer() -> FFNLayer:
    return next(iter(layers_of(swap_activation(make_hf_model(), DRELU), "F32").values()))


@pytest.fixture(scope="session")
def captured(tmp_path_factory: pytest.TempPathFactory) -> CapturedInputs:
    """1500 states of 32 numbers that span 6 dimensions, as real ones nearly do."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1500, 6, generator=generator) @ torch.randn(6, 32, generator=generator)
    files = {}
    for kind in ("ffn_norm", "residual"):
        files[kind] = tmp_path_factory.mktemp("captured") / f"{kind}.f16"
        states.numpy().astype(np.float16).tofile(files[kind])
    return CapturedInputs(files=files, hidden_size=32, tokens_seen=1500)
