"""Files whose experts are not as the keys say: one clear line each."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse import _native
from turbosparse.errors import ModelFileError
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.model_file_copy import copy_with
from turbosparse.runtime.model_file_writer import TensorSource

ARCH = "turbosparse-qwen2moe"
ROUTER, UP, DOWN = "ffn_gate_inp.weight", "ffn_up_exps.weight", "ffn_down_t_exps.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    spec = TinyModel(
        arch="qwen2moe",
        activation="drelu",
        down_t=True,
        experts=4,
        intermediate_size=64,
        shared_intermediate_size=96,
        threshold=0.1,
        predictor="low_rank",
        hot=(3, 255),
    )
    make_tiny_model(path, spec)
    return ModelFile(path)


def refused(path: Path, match: str) -> None:
    with pytest.raises(ModelFileError, match=rf"^\[{match}.*\] expected .+, got .+$"):
        _native.Model(str(path), threads=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", 0),
        ("expert_count", 3),
        ("expert_count", 2000),
        ("expert_used_count", None),
        ("expert_used_count", 0),
        ("expert_used_count", 5),
        ("expert_feed_forward_length", 65),
        ("expert_shared_feed_forward_length", 64),
        ("expert_gating_func", 3),
        ("expert_weights_scale", -1.0),
    ],
)
def test_odd_keys(source: ModelFile, key: str, value: Any, tmp_path: Path) -> None:
    keys = source.stored_metadata()
    keys.pop(f"{ARCH}.{key}", None)
    if value is not None:
        keys[f"{ARCH}.{key}"] = value
    copy_with(source, tmp_path / "odd.gguf", metadata=keys)
    shapes = {3: "blk.0.ffn_gate_inp", 65: "blk.0.ffn_gate_exps", 64: "blk.0.ffn_gate_shexp"}
    place = f"{ARCH}.{key}"
    if key != "expert_gating_func" and value in shapes and not isinstance(value, float):
        place = shapes[value]
    if (key, value) == ("expert_count", 3):
        place = "(blk.0|turbosparse.predictor)"
    refused(tmp_path / "odd.gguf", place)


@pytest.mark.parametrize(
    "name",
    [
        ROUTER,
        UP,
        DOWN,
        "ffn_gate_inp_shexp.weight",
        "ffn_up_shexp.weight",
        "ffn_threshold_exps",
        "ffn_threshold_shexp",
        "ffn_pred_a_exps.weight",
        "ffn_pred_b_shexp.weight",
    ],
)
def test_missing_tensors(source: ModelFile, name: str, tmp_path: Path) -> None:
    copy_with(source, tmp_path / "odd.gguf", drop=[f"blk.1.{name}"])
    refused(tmp_path / "odd.gguf", r"blk\.1\.ffn_")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (ROUTER, (4, 32)),
        (ROUTER, (5, 64)),
        (ROUTER, (256,)),
        (UP, (3, 64, 64)),
        (UP, (64, 64)),
        (DOWN, (4, 64, 32)),
        ("ffn_pred_a_exps.weight", (32, 64)),
        ("ffn_pred_b_exps.weight", (4, 64, 64)),
        ("ffn_threshold_exps", (64,)),
    ],
)
def test_odd_shapes(source: ModelFile, name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    full = f"blk.0.{name}"
    copy_with(
        source, tmp_path / "odd.gguf", tensors=[TensorSource.of_array(full, np.ones(shape, np.float32))]
    )
    refused(tmp_path / "odd.gguf", full.replace(".", r"\."))


def test_what_needs_one_ffn_per_layer_says_so(source: ModelFile) -> None:
    with pytest.raises(ModelFileError, match=r"^\[here: .*\] expected a model without experts, got 4"):
        source.require_no_experts("here")
