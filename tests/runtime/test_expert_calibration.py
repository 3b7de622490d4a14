"""Calibration of models with experts: every expert meets the target on the tokens that reach it."""

import logging
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.test_calibration import TEXT, small, windows_of
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse import _native
from turbosparse.errors import ModelFileError
from turbosparse.runtime.calibration import calibrate
from turbosparse.runtime.captures import Captures
from turbosparse.runtime.ffns import FFN, down_t, ffns_of
from turbosparse.runtime.model_description import describe
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.model_file_copy import copy_with
from turbosparse.runtime.model_file_writer import TensorSource
from turbosparse.runtime.reference import ReferenceEngine
from turbosparse.runtime.sparse_file import Refinement
from turbosparse.sparsity.cett import dropped_error
from turbosparse.sparsity.thresholds import kept_neurons

EXPERTS, NEURONS, SHARED = 4, 64, 96
SPEC = TinyModel(arch="qwen2moe", experts=EXPERTS, intermediate_size=NEURONS, shared_intermediate_size=SHARED)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "plain.gguf", SPEC)
    return tmp_path / "plain.gguf"


def test_the_ffns_of_a_file(plain: Path) -> None:
    file = ModelFile(plain)
    ffns = ffns_of(file)
    assert ffns == ffns_of(_native.Model(str(plain)).info)
    assert [ffn.name for ffn in ffns[3:6]] == [
        "layer 0 expert 3",
        "layer 0 shared expert",
        "layer 1 expert 0",
    ]
    assert ffns[8] == FFN(
        layer=1, neurons=NEURONS, first_neuron=3 * NEURONS, suffix="_exps", expert=3, token_share=0.5
    )
    whole = file.dequantised("blk.1.ffn_down_exps.weight")
    np.testing.assert_array_equal(down_t(file, ffns[8]), whole[3].T)
    assert down_t(file, ffns[9]).shape == (SHARED, 64)


def test_every_expert_meets_the_target(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse.gguf"
    report = calibrate(plain, TEXT, out, small(cett=0.2))
    file, dense = ModelFile(out), ModelFile(plain)
    captures = Captures(_native.Model(str(plain), threads=1), windows_of(plain), memory_bytes=1 << 30)
    found = [captured for layer in captures.layers() for captured in layer]
    assert [len(each.tokens) for each in found] == report.ffn_tokens
    assert sum(report.ffn_tokens) == 2 * (2 + 1) * 128  # layers, experts of a token, tokens
    for (ffn, _, gate, up), own in zip(found, report.ffns, strict=True):
        thresholds = ffn.thresholds(file)
        assert thresholds is not None
        passed, kept = kept_neurons(gate, up, *thresholds)
        error = dropped_error(gate * up, down_t(dense, ffn), kept)
        assert error == pytest.approx(own.cett, rel=1e-4)
        assert error <= 0.2
        assert (passed.mean(), kept.mean()) == pytest.approx((own.gate_passed, own.active))
    assert report.mean("cett") > 0.19
    assert file.modes == ["dense", "threshold"]
    assert file.calibration()["ffn_tokens"] == report.ffn_tokens
    # The engine and the reference leave out the same.
    session, reference = _native.Model(str(out), threads=1).session(64), ReferenceEngine(out)
    window = windows_of(plain)[0]
    ours = session.forward(window, mode="threshold", logits="all")
    theirs = reference.forward(window, "threshold")
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
    shown = describe(file, tensors=False)["thresholds"]
    for layer in (0, 1):
        those = slice(5 * layer, 5 * layer + 5)
        weights = np.array(report.ffn_tokens[those]) * np.array([NEURONS] * EXPERTS + [SHARED])
        active = np.average([each.active for each in report.ffns[those]], weights=weights)
        assert shown[layer]["active_ratio"] == pytest.approx(active)


def test_an_expert_that_no_token_reaches_keeps_its_neurons(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = ModelFile(plain)
    name = "blk.0.ffn_gate_inp.weight"
    router = np.zeros((EXPERTS, 64), np.float32)  # of equal experts the first are chosen
    lonely = tmp_path / "lonely.gguf"
    copy_with(file, lonely, tensors=[TensorSource.of_array(name, router)])
    with caplog.at_level(logging.WARNING):
        report = calibrate(lonely, TEXT, tmp_path / "sparse.gguf", small(cett=0.2))
    assert report.ffn_tokens[:5] == [128, 128, 0, 0, 128]
    assert [record.message for record in caplog.records if "reached" in record.message] == [
        f"layer 0 expert {expert}: 0 tokens reached it, so it keeps all neurons" for expert in (2, 3)
    ]
    thresholds = ffns_of(file)[2].thresholds(ModelFile(tmp_path / "sparse.gguf"))
    assert thresholds is not None
    assert not thresholds[1].any()
    assert (report.ffns[2].active, report.ffns[2].cett) == (1.0, 0.0)
    assert report.active_ratio < 0.8  # experts without tokens do not count


def test_a_perplexity_budget(plain: Path, tmp_path: Path) -> None:
    report = calibrate(plain, TEXT, tmp_path / "sparse.gguf", small(ppl_budget=0.05))
    assert report.ppl.threshold <= 1.05 * report.ppl.source
    assert report.active_ratio < 0.95


def test_weights_in_two_parts_are_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"expected a model without experts, got 4 per layer"):
        calibrate(plain, TEXT, tmp_path / "x.gguf", small(cett=0.2, refine=Refinement(neurons=6)))
