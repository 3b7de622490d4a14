"""Predicted mode equals its definition: the NumPy reference; exact mode where all neurons are candidates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gguf import GGUFReader

from tests.golden.test_engine import IDS, ZERO_ACTIVATIONS, both, distance, step_by_step
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse._native import Model
from turbosparse.errors import ConfigError, EngineError, ModelFileError
from turbosparse.runtime.predictors import candidate_quality
from turbosparse.runtime.reference import FfnTrace, ReferenceEngine

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOWEST = float(np.finfo(np.float32).min)


def model_with(path: Path, **settings: Any) -> Path:
    chosen: dict[str, Any] = {"activation": "drelu", "predictor": "low_rank", "down_t": True, **settings}
    if chosen["activation"] == "fatrelu":
        chosen["activation_param"] = 0.05
    make_tiny_model(path, TinyModel(**chosen))
    return path


def reference(path: Path) -> tuple[NDArray[np.float32], list[FfnTrace]]:
    trace: list[FfnTrace] = []
    return ReferenceEngine(path).forward(IDS, "predicted", trace=trace), trace


@pytest.mark.parametrize("reads", ["ffn_norm", "residual"])
@pytest.mark.parametrize("kind", ["low_rank", "sign"])
@pytest.mark.parametrize(
    ("activation", "gated"),
    [
        (activation, gated)
        for activation in ("silu", "gelu", *ZERO_ACTIVATIONS)
        for gated in (True, False)
        if gated or activation != "drelu"  # which is on both projections
    ],
)
def test_equals_the_reference(tmp_path: Path, activation: str, gated: bool, kind: str, reads: str) -> None:
    path = model_with(
        tmp_path / "m.gguf", activation=activation, gated=gated, predictor=kind, predictor_input=reads
    )
    expected, trace = reference(path)
    for logits in both(path, "predicted"):
        assert distance(logits, expected) < 1e-5
    assert distance(ReferenceEngine(path).forward(IDS), expected) > 1e-2
    for pieces in (1, len(IDS)):
        session = Model(str(path), threads=2).session(64)
        for ids in np.split(IDS, pieces):
            session.forward(ids, mode="predicted")
        counters = session.counters
        assert counters["candidates"] == [np.count_nonzero(ffn.candidates) for ffn in trace]
        assert counters["active"] == [np.count_nonzero(ffn.product) for ffn in trace]
        assert all(0.1 < count / (len(IDS) * 160) < 0.9 for count in counters["candidates"])


@pytest.mark.parametrize(
    ("weight_type", "bound"),
    [("F16", 1e-3), ("BF16", 1e-3), ("Q8_0", 0.05), ("Q4_0", 0.05), ("Q4_1", 0.06)],
)
def test_weight_types(tmp_path: Path, weight_type: str, bound: float) -> None:
    """With 8-bit states some scores cross the threshold; the rest is as close as in dense mode."""
    for reads in ("ffn_norm", "residual"):
        path = model_with(tmp_path / "m.gguf", weight_type=weight_type, predictor_input=reads)
        expected, trace = reference(path)
        candidates = np.stack([ffn.candidates for ffn in trace])
        session = Model(str(path)).session(64)
        logits = session.forward(IDS, mode="predicted", logits="all", candidates=candidates)
        assert distance(logits, expected) < bound
        for pieces in (1, len(IDS)):
            session = Model(str(path)).session(64)
            for ids in np.split(IDS, pieces):
                session.forward(ids, mode="predicted")
            named = np.array(session.counters["candidates"])
            assert np.allclose(named, candidates.sum(axis=(1, 2)), rtol=0.05)


@pytest.mark.parametrize("threshold", [LOWEST, -1e30])
@pytest.mark.parametrize("activation", ["silu", *ZERO_ACTIVATIONS])
def test_all_candidates_is_exact_or_dense_bit_by_bit(
    tmp_path: Path, activation: str, threshold: float
) -> None:
    path = model_with(tmp_path / "m.gguf", activation=activation, predictor_threshold=threshold)
    expected = both(path, "dense" if activation == "silu" else "exact")
    for logits, same in zip(both(path, "predicted"), expected, strict=True):
        assert np.array_equal(logits, same)


def test_thresholds_hold_among_candidates(tmp_path: Path) -> None:
    settings = {"activation": "silu", "threshold": 0.2, "gate_threshold": 0.1}
    path = model_with(tmp_path / "all.gguf", predictor_threshold=LOWEST, **settings)
    for logits, same in zip(both(path, "predicted"), both(path, "threshold"), strict=True):
        assert np.array_equal(logits, same)
    some = model_with(tmp_path / "some.gguf", **settings)
    expected, trace = reference(some)
    for logits in both(some, "predicted"):
        assert distance(logits, expected) < 1e-5
    session = Model(str(some)).session(64)
    step_by_step(session, IDS, "predicted")
    passed = [np.count_nonzero(ffn.candidates & (np.abs(ffn.gate) >= 0.1)) for ffn in trace]
    assert session.counters["gate_passed"] == passed


@pytest.mark.parametrize("kind", ["low_rank", "sign"])
def test_hot_neurons_are_always_candidates(tmp_path: Path, kind: str) -> None:
    hot = (0, 7, 31, 32, 100, 159)
    path = model_with(tmp_path / "m.gguf", predictor=kind, predictor_threshold=1e30, hot=hot)
    for session, one_by_one in ((Model(str(path), threads=t).session(64), o) for t in (1, 3) for o in (0, 1)):
        for ids in np.split(IDS, len(IDS) if one_by_one else 1):
            session.forward(ids, mode="predicted")
        assert session.counters["candidates"] == [len(hot) * len(IDS), 0]
    expected, _ = reference(path)
    for logits in both(path, "predicted"):
        assert distance(logits, expected) < 1e-5


@pytest.mark.parametrize(("weight_type", "bound"), [("F32", 1e-5), ("Q8_0", 0.02)])
@pytest.mark.parametrize(("activation", "gated"), [("drelu", True), ("silu", True), ("relu2", False)])
def test_few_candidates_are_computed_alone(
    tmp_path: Path, activation: str, gated: bool, weight_type: str, bound: float
) -> None:
    path = model_with(
        tmp_path / "m.gguf", activation=activation, gated=gated, weight_type=weight_type, threshold=0.01
    )
    candidates = np.random.default_rng(3).random((2, len(IDS), 160)) < 0.15
    results = []
    for threads, skipping in ((1, False), (1, True), (3, True)):
        session = Model(str(path), threads=threads).session(64)
        session.skipping = skipping
        logits = session.forward(IDS, mode="predicted", logits="all", candidates=candidates)
        results.append((logits, session.counters))
    whole, alone, threaded = results
    assert distance(alone[0], whole[0]) < bound
    assert np.array_equal(alone[0], threaded[0])
    assert alone[1]["candidates"] == whole[1]["candidates"]
    assert sum(whole[1]["wanted"]) > 0
    assert sum(alone[1]["wanted"]) == sum(alone[1]["found"]) == 0
    many = Model(str(path)).session(64)
    many.skipping = True
    many.forward(IDS, mode="predicted", candidates=candidates | (np.arange(160) < 40))
    assert sum(many.counters["wanted"]) > 0, "many candidates are one matrix product"


def test_the_true_set_given_as_candidates_is_exact(tmp_path: Path) -> None:
    path = model_with(tmp_path / "m.gguf", predictor=None)
    trace: list[FfnTrace] = []
    expected = ReferenceEngine(path).forward(IDS, trace=trace)
    truth = np.stack([ffn.product != 0 for ffn in trace])
    model = Model(str(path), threads=2)
    session = model.session(64)
    assert distance(session.forward(IDS, mode="predicted", logits="all", candidates=truth), expected) < 1e-5
    assert session.counters["candidates"] == session.counters["active"] == session.counters["found"]
    single = model.session(64)
    logits = [
        single.forward(IDS[t : t + 1], mode="predicted", candidates=np.ascontiguousarray(truth[:, t : t + 1]))
        for t in range(len(IDS))
    ]
    assert distance(np.concatenate(logits), expected) < 1e-5


def test_given_candidates_replace_the_predictor(tmp_path: Path) -> None:
    path = model_with(tmp_path / "m.gguf")
    expected, trace = reference(path)
    mask = np.stack([ffn.candidates for ffn in trace])
    session = Model(str(path)).session(64)
    assert distance(session.forward(IDS, mode="predicted", logits="all", candidates=mask), expected) < 1e-5
    with pytest.raises(
        ConfigError, match=r"\[candidates\] expected shape \(2, 24, 160\), got \(2, 23, 160\)"
    ):
        session.forward(IDS, mode="predicted", candidates=np.ascontiguousarray(mask[:, 1:]))
    with pytest.raises(ConfigError, match=r"\[candidates\] expected mode predicted, got exact"):
        session.forward(IDS, mode="exact", candidates=mask)


@pytest.mark.parametrize("pieces", [1, len(IDS)])
@pytest.mark.parametrize("gated", [True, False])
def test_neurons_chosen_layer_by_layer(tmp_path: Path, gated: bool, pieces: int) -> None:
    """The choice sees what was left out before, so choosing as the thresholds do is the threshold mode."""
    settings = {"activation": "silu", "predictor": None, "gated": gated, "threshold": 0.1}
    path = model_with(tmp_path / "m.gguf", **settings)
    plain = model_with(tmp_path / "plain.gguf", **{**settings, "threshold": None})
    seen: list[int] = []

    def choose(layer: int, gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.bool_]:
        seen.append(layer)
        kept: NDArray[np.bool_] = np.abs(gate * up) >= np.float32(0.1)
        return kept

    model = Model(str(plain), threads=2)
    session, expected = model.session(64), Model(str(path), threads=2).session(64)
    for ids in np.split(IDS, pieces):
        logits = session.forward(ids, mode="predicted", logits="all", choose=choose)
        assert distance(logits, expected.forward(ids, mode="threshold", logits="all")) < 1e-6
    assert seen == list(range(model.info.num_hidden_layers)) * pieces
    assert session.counters["active"] == expected.counters["active"]
    assert 0 < sum(session.counters["active"]) < 0.9 * len(IDS) * 160 * len(expected.counters["active"])


def test_a_choice_that_cannot_be(tmp_path: Path) -> None:
    session = Model(str(model_with(tmp_path / "m.gguf"))).session(64)

    def fails(layer: int, gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.bool_]:
        raise KeyError(layer)

    with pytest.raises(KeyError):
        session.forward(IDS, mode="predicted", choose=fails)
    with pytest.raises(ConfigError, match=r"\[choose\] expected a bool array of shape \(24, 160\), got some"):
        session.forward(IDS, mode="predicted", choose=lambda layer, gate, up: gate[1:] > 0)
    with pytest.raises(ConfigError, match=r"\[candidates\] expected mode predicted, got dense"):
        session.forward(IDS, mode="dense", choose=fails)
    assert session.position == 0


def test_recall_and_precision_are_counted(tmp_path: Path) -> None:
    path = model_with(tmp_path / "m.gguf", threshold=0.1, gate_threshold=0.05)
    _, trace = reference(path)
    model = Model(str(path))
    session = model.session(64)
    session.forward(IDS, mode="predicted")
    wanted = [(np.abs(ffn.gate) >= 0.05) & (np.abs(ffn.gate * ffn.up) >= 0.1) for ffn in trace]
    candidates = sum(np.count_nonzero(ffn.candidates) for ffn in trace)
    found = sum(np.count_nonzero(w & ffn.candidates) for w, ffn in zip(wanted, trace, strict=True))
    quality = candidate_quality(session.counters, model.info)
    assert quality is not None
    assert quality.recall == pytest.approx(found / sum(map(np.count_nonzero, wanted)))
    assert quality.precision == pytest.approx(found / candidates)
    assert quality.candidate_ratio == pytest.approx(candidates / (2 * 160 * len(IDS)))
    session.reset_counters()
    session.truncate(0)
    step_by_step(session, IDS, "predicted")
    assert candidate_quality(session.counters, model.info) is None


def test_bytes_of_a_predicted_token(tmp_path: Path) -> None:
    for kind, predictor in (("low_rank", 4 * (32 + 64) * (64 + 160)), ("sign", 2 * 2 * 160 * 8)):
        path = model_with(tmp_path / "m.gguf", predictor=kind, num_key_value_heads=4)
        session = Model(str(path)).session(64)
        session.forward(IDS[:1], mode="predicted", logits="none")
        counters = session.counters
        neurons = sum(sum(counters[name]) for name in ("candidates", "gate_passed", "active"))
        attention, cache = 2 * 4 * 64 * 64 * 4, 2 * 2 * 64 * 4
        assert counters["bytes_read"] == attention + cache + predictor + neurons * 64 * 4


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["ffn_pred_a", "ffn_pred_b"])
@pytest.mark.parametrize("threads", [1, 2])
def test_numbers_that_are_none_are_named_by_layer(
    tmp_path: Path, part: str, value: float, threads: int
) -> None:
    path = model_with(tmp_path / "m.gguf")
    reader = GGUFReader(path, "r+")
    data = next(t for t in reader.tensors if t.name == f"blk.1.{part}.weight").data
    data[5] = value
    reader.data.flush()
    model = Model(str(path), threads=threads)
    for ids in (IDS[:1], IDS):
        session = model.session(64)
        with pytest.raises(EngineError, match=r"\[predictor of layer 1\] expected finite numbers, got NaN"):
            session.forward(ids, mode="predicted")
        assert session.position == 0
        session.forward(ids, mode="exact")  # which reads no predictor


def test_states_that_are_none_do_not_vanish_in_signs(tmp_path: Path) -> None:
    path = model_with(tmp_path / "m.gguf", predictor="sign", predictor_threshold=1.0)
    reader = GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.name == "blk.1.ffn_norm.weight").data[3] = np.nan
    reader.data.flush()
    for ids in (IDS[:1], IDS):
        with pytest.raises(EngineError, match=r"\[predictor of layer 1\]"):
            Model(str(path)).session(64).forward(ids, mode="predicted")


def test_files_without_predictor_say_what_to_do(tmp_path: Path) -> None:
    path = model_with(tmp_path / "m.gguf", predictor=None)
    with pytest.raises(
        ModelFileError, match=r"\[mode predicted\] expected .*predictors \(turbosparse export"
    ):
        Model(str(path)).session(8).forward(IDS[:1], mode="predicted")
