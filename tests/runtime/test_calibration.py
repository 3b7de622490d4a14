"""Calibration end to end on tiny models: the target holds in the file written, and bad input is refused."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.real_models import SMOLLM2, real_model
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse import _native
from turbosparse.errors import CalibrationError, ConfigError, ModelFileError, TextError
from turbosparse.runtime.calibration import calibrate
from turbosparse.runtime.calibration_report import CalibrationConfig, CalibrationReport
from turbosparse.runtime.captures import Captures
from turbosparse.runtime.ffns import down_t
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.model_file_copy import copy_with
from turbosparse.runtime.model_file_writer import TensorSource
from turbosparse.runtime.texts import CALIBRATION, read_text
from turbosparse.sparsity.cett import dropped_error
from turbosparse.sparsity.thresholds import kept_neurons
from turbosparse.tokenizer import Tokenizer

TEXT = read_text(CALIBRATION)[:1200]
small = functools.partial(CalibrationConfig, tokens=128, window=64, threads=1)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "plain.gguf")
    return tmp_path / "plain.gguf"


def calibrated(plain: Path, *, cett: float = 0.2, stages: int = 2) -> tuple[CalibrationReport, Path]:
    out = plain.with_name("sparse.gguf")
    return calibrate(plain, TEXT, out, small(cett=cett, stages=stages)), out


def windows_of(path: Path) -> list[np.ndarray[tuple[int, ...], np.dtype[np.int32]]]:
    ids = Tokenizer.from_metadata(ModelFile(path).metadata).encode(TEXT)[:192][:128]
    return [np.array(ids[begin : begin + 64], np.int32) for begin in (0, 64)]


@pytest.mark.parametrize("stages", [1, 2])
def test_thresholds_in_the_file_meet_the_target(plain: Path, stages: int) -> None:
    report, out = calibrated(plain, stages=stages)
    file = ModelFile(out)
    captures = Captures(_native.Model(str(plain), threads=1), windows_of(plain), memory_bytes=1 << 30)
    for layer, ((ffn, _, gate, up),) in enumerate(captures.layers()):
        thresholds = ffn.thresholds(file)
        assert thresholds is not None
        gate_threshold, threshold = thresholds
        passed, kept = kept_neurons(gate, up, gate_threshold, threshold)
        error = dropped_error(gate * up, down_t(ModelFile(plain), ffn), kept)
        assert 0.19 <= error <= 0.2
        assert error == pytest.approx(report.ffns[layer].cett, rel=1e-4)
        assert passed.mean() == pytest.approx(report.ffns[layer].gate_passed)
        assert kept.mean() == pytest.approx(report.ffns[layer].active)
        assert gate_threshold.any() == (stages == 2)


def test_the_engine_skips_what_the_report_says(plain: Path) -> None:
    report, out = calibrated(plain)
    model = _native.Model(str(out), threads=1)
    assert model.info.modes == ["dense", "threshold"]
    session = model.session(64)
    for window in windows_of(plain):
        session.truncate(0)
        session.forward(window, mode="threshold")
    neurons = session.counters["tokens"] * model.info.intermediate_size
    for layer, active, passed in zip(
        report.ffns, session.counters["active"], session.counters["gate_passed"], strict=True
    ):
        assert active / neurons == pytest.approx(layer.active, abs=0.03)
        assert passed / neurons == pytest.approx(layer.gate_passed, abs=0.03)


def test_dense_stays_what_it_was_and_thresholds_cost_little(plain: Path) -> None:
    report, out = calibrated(plain, cett=0.02)
    ids = windows_of(plain)[0]
    before, after = (
        _native.Model(str(path), threads=1).session(64).forward(ids, logits="all") for path in (plain, out)
    )
    assert np.linalg.norm(after - before) <= 1e-5 * np.linalg.norm(before)
    assert report.ppl.dense == pytest.approx(report.ppl.source, rel=1e-4)
    assert report.ppl.threshold == pytest.approx(report.ppl.source, rel=0.1)
    assert report.held_out_ppl.threshold == pytest.approx(report.held_out_ppl.source, rel=0.1)


def test_the_file_tells_how_it_was_made(plain: Path) -> None:
    report, out = calibrated(plain)
    record = ModelFile(out).calibration()
    assert record["cett_target"] == pytest.approx(0.2)
    assert (record["method"], record["stages"], record["window"]) == ("cett", 2, 64)
    assert (
        (record["tokens"], record["held_out_tokens"]) == (report.tokens, report.held_out_tokens) == (128, 64)
    )
    assert record["text_sha256"] == report.text_sha256
    assert record["active_ratio"] == pytest.approx([layer.active for layer in report.ffns])
    assert record["ppl_threshold"] == pytest.approx(report.ppl.threshold)
    assert record["tool"].startswith("turbosparse ")


def test_the_same_calibration_gives_the_same_bytes(plain: Path) -> None:
    _, out = calibrated(plain)
    first = out.read_bytes()
    out.unlink()
    calibrated(plain)
    assert out.read_bytes() == first


def test_little_memory_means_more_passes_and_the_same_arrays(plain: Path) -> None:
    model = _native.Model(str(plain), threads=1)
    roomy, tight = (Captures(model, windows_of(plain), memory_bytes=size) for size in (1 << 30, 1))
    assert (roomy.passes, tight.passes) == (1, 2)
    for _ in range(2):  # the second time from what was kept
        for (one,), (other,) in zip(roomy.layers(), tight.layers(), strict=True):
            assert one.ffn == other.ffn
            for ours, theirs in zip(one[1:], other[1:], strict=True):
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("activation", ["relu", "drelu"])
def test_exact_zeros_are_never_read(tmp_path: Path, activation: str) -> None:
    make_tiny_model(tmp_path / "plain.gguf", TinyModel(activation=activation))
    report, out = calibrated(tmp_path / "plain.gguf", cett=0.01)
    assert _native.Model(str(out), threads=1).info.modes == ["dense", "exact", "threshold"]
    for layer in report.ffns:
        assert layer.zeros > 0.4
        assert layer.active <= 1 - layer.zeros


def test_fatrelu_keeps_its_parameter(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "plain.gguf", TinyModel(activation="fatrelu", activation_param=0.25))
    _, out = calibrated(tmp_path / "plain.gguf")
    assert ModelFile(out).activation == "fatrelu"
    assert ModelFile(out).metadata["turbosparse.activation_param"] == 0.25


def test_perplexity_budget_is_kept(plain: Path) -> None:
    config = small(ppl_budget=0.05)
    report = calibrate(plain, TEXT, plain.with_name("sparse.gguf"), config)
    assert report.ppl.threshold <= 1.05 * report.ppl.source
    assert report.active_ratio < 0.95
    record = ModelFile(plain.with_name("sparse.gguf")).calibration()
    assert record["method"] == "cett-ppl"
    assert record["ppl_budget"] == pytest.approx(0.05)
    assert record["cett_target"] == pytest.approx(report.cett_target)


def test_a_sparse_file_can_be_calibrated_again(plain: Path) -> None:
    _, out = calibrated(plain, cett=0.2)
    again = plain.with_name("again.gguf")
    calibrate(out, TEXT, again, small(cett=0.05))
    direct = plain.with_name("direct.gguf")
    calibrate(plain, TEXT, direct, small(cett=0.05))
    assert ModelFile(again).calibration()["cett_target"] == pytest.approx(0.05)
    new, expected = (ModelFile(path).threshold_values("blk.1.ffn_threshold", 160) for path in (again, direct))
    assert new is not None
    assert expected is not None
    np.testing.assert_allclose(new, expected, rtol=0.02)
    with pytest.raises(ConfigError, match=r"expected F32, which the file has, got Q8_0"):
        calibrate(out, TEXT, plain.with_name("x.gguf"), small(cett=0.1, down_type="Q8_0"))


@pytest.mark.parametrize(
    ("weight_type", "asked", "got"),
    [("Q8_0", None, "Q8_0"), ("Q4_0", None, "Q8_0"), ("Q4_0", "Q4_0", "Q4_0"), ("F32", "Q8_0", "Q8_0")],
)
def test_type_of_the_down_projection(tmp_path: Path, weight_type: str, asked: str | None, got: str) -> None:
    make_tiny_model(tmp_path / "plain.gguf", TinyModel(weight_type=weight_type))
    config = small(cett=0.2, down_type=asked)
    report = calibrate(tmp_path / "plain.gguf", TEXT, tmp_path / "sparse.gguf", config)
    assert report.down_type == got
    assert ModelFile(tmp_path / "sparse.gguf").tensor("blk.0.ffn_down_t.weight").type_name == got


def test_a_layer_that_is_dead_is_named(plain: Path) -> None:
    zeros = np.zeros((160, 64), np.float32)
    dead = plain.with_name("dead.gguf")
    copy_with(ModelFile(plain), dead, tensors=[TensorSource.of_array("blk.1.ffn_up.weight", zeros)])
    with pytest.raises(CalibrationError, match=r"\[calibration layer 1\] .* not all zero"):
        calibrated(dead)
    assert sorted(path.name for path in plain.parent.iterdir()) == ["dead.gguf", "plain.gguf"]


def test_an_interrupt_leaves_nothing_behind(plain: Path) -> None:
    @contextmanager
    def interrupted(label: str) -> Iterator[Callable[[float], None]]:
        if label.startswith("perplexity of the sparse"):
            raise KeyboardInterrupt
        yield lambda amount: None

    out = plain.with_name("sparse.gguf")
    with pytest.raises(KeyboardInterrupt):
        calibrate(plain, TEXT, out, small(cett=0.2), progress=interrupted)
    assert [path.name for path in plain.parent.iterdir()] == ["plain.gguf"]


def test_progress_reaches_the_end_of_each_stage(plain: Path) -> None:
    done: dict[str, float] = {}

    @contextmanager
    def recorded(label: str) -> Iterator[Callable[[float], None]]:
        done[label] = 0.0

        def advance(amount: float) -> None:
            done[label] += amount

        yield advance

    out = plain.with_name("sparse.gguf")
    calibrate(plain, TEXT, out, small(cett=0.2), progress=recorded)
    assert len(done) == 4
    for label, share in done.items():
        assert share == pytest.approx(1.0, abs=0.05), label


def test_an_existing_file_is_not_replaced(plain: Path) -> None:
    out = plain.with_name("sparse.gguf")
    out.write_bytes(b"mine")
    with pytest.raises(ModelFileError, match="expected a new file"):
        calibrated(plain)
    assert out.read_bytes() == b"mine"
    calibrate(plain, TEXT, out, small(cett=0.2), overwrite=True)
    assert ModelFile(out).modes == ["dense", "threshold"]


@pytest.mark.parametrize(
    ("text", "message"), [("", "white space"), (" \n", "white space"), ("word " * 9, "192 tokens")]
)
def test_texts_that_are_too_short(plain: Path, text: str, message: str) -> None:
    with pytest.raises(TextError, match=message):
        calibrate(plain, text, plain.with_name("sparse.gguf"), CalibrationConfig(cett=0.2))


def test_a_text_shorter_than_asked_for_is_used_up(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = CalibrationConfig(cett=0.2, tokens=4096, window=64, threads=1)
    with caplog.at_level(logging.WARNING):
        report = calibrate(plain, TEXT, plain.with_name("sparse.gguf"), config)
    assert "fewer than the 6144 asked for" in caplog.text
    assert report.tokens == pytest.approx(2 * report.held_out_tokens, abs=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either a CETT target or a perplexity budget"),
        ({"cett": 0.1, "ppl_budget": 0.1}, "either a CETT target or a perplexity budget"),
        ({"cett": 1.0}, "expected above 0 and below 1, got 1.0"),
        ({"cett": float("nan")}, "expected above 0 and below 1"),
        ({"ppl_budget": 0.0}, "expected above 0 and below 10, got 0.0"),
        ({"cett": 0.1, "tokens": 5}, "expected at least 128, got 5"),
        ({"cett": 0.1, "window": 5}, "expected at least 32, got 5"),
        ({"cett": 0.1, "stages": 3}, "expected 1 or 2, got 3"),
        ({"cett": 0.1, "down_type": "Q4_K"}, "expected one of F32, .* got 'Q4_K'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CalibrationConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.slow
def test_on_a_real_model(tmp_path: Path) -> None:
    out = tmp_path / "sparse.gguf"
    config = CalibrationConfig(cett=0.2, tokens=1024)
    report = calibrate(real_model(SMOLLM2), read_text(CALIBRATION), out, config)
    assert 0.3 < report.active_ratio < 0.5
    assert report.active_ratio < report.gate_passed < 0.75
    assert 1.0 < report.held_out_ppl.threshold / report.held_out_ppl.source < 1.8
