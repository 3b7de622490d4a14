"""The engine's own timing: off at first, complete when on, and without effect on what is computed."""

import time

import numpy as np
import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse._native import Model, Session

IDS = np.random.default_rng(6).integers(0, 260, 20).astype(np.int32)
PARTS = [
    "norm",
    "qkv",
    "kv_cache",
    "attention",
    "out",
    "router",
    "predictor",
    "gate",
    "up",
    "down",
    "disk",
    "lm_head",
    "barrier",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    spec = TinyModel(activation="drelu", down_t=True, predictor="low_rank", hidden_size=256, experts=4)
    make_tiny_model(path, spec)
    return Model(str(path), threads=1)


def run(session: Session, *, one_by_one: bool) -> float:
    begin = time.perf_counter_ns()
    for ids in np.split(IDS, len(IDS) if one_by_one else 1):
        session.forward(ids, mode="predicted", logits="all")
    return time.perf_counter_ns() - begin


@pytest.mark.parametrize(("phase", "other"), [("decode_ns", "batch_ns"), ("batch_ns", "decode_ns")])
def test_parts_add_up(model: Model, phase: str, other: str) -> None:
    session = model.session(32)
    assert not session.profiling
    run(session, one_by_one=phase == "decode_ns")
    assert session.counters[phase] == session.counters[other] == dict.fromkeys(PARTS, 0)
    session.truncate(0)
    session.profiling = True
    wall = run(session, one_by_one=phase == "decode_ns")
    times = session.counters[phase]
    assert list(times) == PARTS
    assert all(times[part] > 0 for part in PARTS if part != "disk")
    assert sum(times.values()) <= wall
    assert session.counters[other] == dict.fromkeys(PARTS, 0)
    session.reset_counters()
    assert session.counters[phase] == dict.fromkeys(PARTS, 0)
    assert session.profiling


def test_no_predictor_takes_no_time(model: Model) -> None:
    session = model.session(32)
    session.profiling = True
    for mode in ("dense", "exact"):
        session.forward(IDS[:1], mode=mode)
    assert session.counters["decode_ns"]["predictor"] == 0


def test_profiling_changes_no_bit(model: Model) -> None:
    logits = []
    for on in (False, True):
        session = model.session(32)
        session.profiling = on
        logits.append(session.forward(IDS, mode="predicted", logits="all"))
        session.truncate(10)
        logits.append(session.forward(IDS[10:11], mode="predicted"))
    assert np.array_equal(logits[0], logits[2])
    assert np.array_equal(logits[1], logits[3])
