"""Weights in two parts: each mode equals its definition, the NumPy reference, one token or many at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.golden.test_engine import IDS, both, distance
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse import _native
from turbosparse._native import Model
from turbosparse.errors import ConfigError, ModelFileError
from turbosparse.runtime.ffns import FFN, down_t
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.model_file_copy import copy_with
from turbosparse.runtime.model_file_writer import TensorSource
from turbosparse.runtime.reference import FfnTrace, ReferenceEngine
from turbosparse.runtime.sparse_file import Refinement, SparseDraft
from turbosparse.runtime.weight_parts import rest_name, weights_in_parts


def model_in_parts(path: Path, *, neurons: float = 3.0, logits: float = 2.0, **settings: Any) -> Path:
    gate = 0.05 if settings.get("gated", True) else None
    spec: dict[str, Any] = {"down_t": True, "threshold": 0.1, "gate_threshold": gate, **settings}
    make_tiny_model(path, TinyModel(**spec))
    source = ModelFile(path)
    keys = {"turbosparse.refine.neurons": neurons, "turbosparse.refine.logits": logits}
    whole = source.stored_metadata() | keys
    copy_with(source, path, metadata=whole, tensors=weights_in_parts(source), overwrite=True)
    return path


@pytest.mark.parametrize(
    ("activation", "gated", "tied"),
    [("silu", True, True), ("silu", False, False), ("drelu", True, False), ("relu2", False, True)],
)
def test_threshold_mode_equals_the_reference(
    tmp_path: Path, activation: str, gated: bool, tied: bool
) -> None:
    path = model_in_parts(tmp_path / "m.gguf", activation=activation, gated=gated, tied=tied)
    trace: list[FfnTrace] = []
    expected = ReferenceEngine(path).forward(IDS, "threshold", trace=trace)
    for logits in both(path, "threshold"):
        assert distance(logits, expected) < 0.03
    # What the rests change is more than how far two ways of rounding are apart.
    assert distance(ReferenceEngine(path).forward(IDS, "dense"), expected) > 0.08
    for pieces in (1, len(IDS)):
        session = Model(str(path), threads=2).session(64)
        for ids in np.split(IDS, pieces):
            session.forward(ids, mode="threshold")
        refined, active = session.counters["refined"], session.counters["active"]
        assert all(0 < few < many for few, many in zip(refined, active, strict=True))
        assert active == pytest.approx([np.count_nonzero(ffn.product) for ffn in trace], rel=0.05)


def test_more_threads_than_parts_of_the_vocabulary(tmp_path: Path) -> None:
    """Two parts of 32 logits, all negative: a thread without any must not give 0 as its largest."""
    make_tiny_model(tmp_path / "whole.gguf", TinyModel(down_t=True, threshold=0.0, tied=False))
    whole = ModelFile(tmp_path / "whole.gguf")
    embedding = TensorSource.of_array("token_embd.weight", whole.dequantised("token_embd.weight")[:64])
    keys = {"turbosparse.refine.neurons": 1.0, "turbosparse.refine.logits": 1.0}

    def logits(output: Any, rest: Any, threads: int) -> Any:
        parts = [
            TensorSource.of_array("output.weight", output),
            TensorSource.of_array("output_rest.weight", rest),
        ]
        path = tmp_path / "m.gguf"
        metadata = whole.stored_metadata() | keys
        copy_with(whole, path, metadata=metadata, tensors=[embedding, *parts], overwrite=True)
        return Model(str(path), threads=threads).session(8).forward(IDS[:3] % 64, mode="threshold")[0]

    hidden = logits(np.eye(64), np.zeros((64, 64)), 1)
    direction = hidden / (hidden @ hidden)
    output = np.outer(np.linspace(-4.8, -5.2, 64), direction)
    rest = np.outer(0.3 * np.sin(np.arange(64)), direction)
    alone = logits(output, rest, 1)
    assert alone.max() < -4
    for threads in (2, min(4 * _native.thread_count(0), 8)):
        np.testing.assert_array_equal(logits(output, rest, threads), alone)


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_other_modes_compute_the_sum(tmp_path: Path, mode: Any) -> None:
    path = model_in_parts(tmp_path / "m.gguf", activation="relu")
    make_tiny_model(tmp_path / "whole.gguf", TinyModel(activation="relu", down_t=True))
    expected = ReferenceEngine(tmp_path / "whole.gguf").forward(IDS)
    for logits in both(path, mode):
        assert distance(logits, expected) < 0.03


def test_predicted_mode_computes_the_sum(tmp_path: Path) -> None:
    path = model_in_parts(tmp_path / "m.gguf", predictor="low_rank")
    expected = ReferenceEngine(path).forward(IDS, "predicted")
    for logits in both(path, "predicted"):
        assert distance(logits, expected) < 0.05


def test_refining_everything_is_the_threshold_mode_of_whole_weights(tmp_path: Path) -> None:
    """All active neurons and all logits: what is left is who is active, which the first part decides."""
    path = model_in_parts(tmp_path / "m.gguf", neurons=1, logits=1e3)
    spec = TinyModel(down_t=True, threshold=0.1, gate_threshold=0.05)
    make_tiny_model(tmp_path / "whole.gguf", spec)
    expected = ReferenceEngine(tmp_path / "whole.gguf").forward(IDS, "threshold")
    refined = both(path, "threshold")[0]
    coarse = both(model_in_parts(tmp_path / "c.gguf", neurons=1e6, logits=0), "threshold")[0]
    assert distance(refined, expected) < 0.5 * distance(coarse, expected)


@pytest.mark.parametrize("isa", ["scalar", ""])
def test_threads_and_batches_agree(tmp_path: Path, isa: str) -> None:
    path = model_in_parts(tmp_path / "m.gguf")
    results = []
    for threads in (1, 2, 3):
        session = Model(str(path), threads=threads, isa=isa).session(64)
        results.append(session.forward(IDS, mode="threshold", logits="all"))
        session.truncate(0)
        results.append(
            np.concatenate([session.forward(IDS[i : i + 1], mode="threshold") for i in range(len(IDS))])
        )
    assert np.array_equal(results[0], results[2])
    assert np.array_equal(results[1], results[3])
    assert np.array_equal(results[1], results[5])
    assert distance(results[0], results[1]) < 0.05


def test_bytes_are_those_of_the_rows_that_were_read(tmp_path: Path) -> None:
    path = model_in_parts(tmp_path / "m.gguf")
    session = Model(str(path), threads=1).session(64)
    read = {}
    for mode in ("dense", "threshold"):
        session.truncate(0)
        session.reset_counters()
        for i in range(8):
            session.forward(IDS[i : i + 1], mode=mode)
        read[mode] = session.counters
    row = 48  # two blocks: 32 bytes of nibbles, 4 of scales, 12 of padding
    saved = sum(
        count * row
        for dense, sparse in (
            ("candidates", "refined"),
            ("gate_passed", "gate_passed"),
            ("gate_passed", "refined"),
            ("active", "active"),
            ("active", "refined"),
        )
        for count in np.subtract(read["dense"][dense], read["threshold"][sparse])
    )
    vocabulary = 267 * 8 * row
    thresholds = 4 * sum(read["threshold"]["candidates"] + read["threshold"]["gate_passed"])
    difference = read["dense"]["bytes_read"] - read["threshold"]["bytes_read"]
    assert saved < difference + thresholds < saved + vocabulary


def test_parts_of_a_file_add_up(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "plain.gguf")
    plain = ModelFile(tmp_path / "plain.gguf")
    draft = SparseDraft(plain, tmp_path / "d.gguf", None, lambda share: None, refine=Refinement(neurons=6))
    assert draft.down_type == "Q4_0"
    for name in ("blk.0.ffn_gate.weight", "blk.1.ffn_up.weight"):
        values = plain.dequantised(name)
        first, rest = draft.file.dequantised(name), draft.file.dequantised(rest_name(name))
        assert np.linalg.norm(first - values) > 0.05 * np.linalg.norm(values)
        assert np.linalg.norm(first + rest - values) < 0.006 * np.linalg.norm(values)
    ffn = FFN(layer=1, neurons=plain.intermediate_size)
    down = down_t(plain, ffn)
    assert np.linalg.norm(down_t(draft.file, ffn) - down) < 0.006 * np.linalg.norm(down)
    # Made again from what it made, the parts stay.
    again = SparseDraft(
        draft.file, tmp_path / "a.gguf", None, lambda share: None, refine=Refinement(neurons=3)
    )
    assert again.file.metadata["turbosparse.refine.neurons"] == 3
    name = rest_name("output.weight")
    assert np.array_equal(again.file.tensor_bytes(name), draft.file.tensor_bytes(name))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("neurons", None, r"refine\.neurons\] expected a finite number of at least 1.* got no such key"),
        ("neurons", 0.5, r"refine\.neurons\] expected .* at least 1"),
        ("logits", -1.0, r"refine\.logits\] expected .* at least 0"),
        ("logits", float("nan"), r"refine\.logits\] expected .*got nan"),
        ("neurons", float("inf"), r"refine\.neurons\] expected .*got inf"),
    ],
)
def test_keys_that_do_not_fit(tmp_path: Path, key: str, value: float | None, message: str) -> None:
    file = ModelFile(model_in_parts(tmp_path / "m.gguf"))
    metadata: dict[str, Any] = dict(file.stored_metadata())
    del metadata[f"turbosparse.refine.{key}"]
    if value is not None:
        metadata[f"turbosparse.refine.{key}"] = value
    copy_with(file, tmp_path / "bad.gguf", metadata=metadata)
    with pytest.raises(ModelFileError, match=message):
        Model(str(tmp_path / "bad.gguf"))


def test_keys_without_parts_and_parts_that_do_not_fit(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "plain.gguf", TinyModel(extra_metadata={"turbosparse.refine.neurons": 2.0}))
    with pytest.raises(ModelFileError, match=r"expected no such key where no tensor has a rest, got 2"):
        Model(str(tmp_path / "plain.gguf"))
    file = ModelFile(model_in_parts(tmp_path / "m.gguf"))
    wrong = TensorSource.of_array("blk.0.ffn_up_rest.weight", np.zeros((32, 64), np.float32))
    copy_with(file, tmp_path / "bad.gguf", tensors=[wrong])
    with pytest.raises(ModelFileError, match=r"ffn_up_rest\.weight\] expected shape \[160, 64\]"):
        Model(str(tmp_path / "bad.gguf"))


@pytest.mark.parametrize(("neurons", "logits"), [(0.9, 8.0), (float("nan"), 8.0), (6.0, -1.0)])
def test_refinements_out_of_range(neurons: float, logits: float) -> None:
    with pytest.raises(ConfigError, match=r"\[refine"):
        Refinement(neurons=neurons, logits=logits)
