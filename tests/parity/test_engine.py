"""What must not change results: threads, instruction sets, batches, repetition, an interrupted call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse._native import Model, available_isas, read_bandwidth
from turbosparse.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from turbosparse._native import Mode, Session

IDS = np.random.default_rng(6).integers(0, 260, 20).astype(np.int32)
MODES: list[Mode] = ["dense", "exact", "threshold", "predicted"]


def sparse_model(path: Path, weight_type: str = "F32", predictor: str | None = "low_rank") -> str:
    spec = TinyModel(
        activation="drelu",
        down_t=True,
        threshold=0.1,
        gate_threshold=0.05,
        weight_type=weight_type,
        predictor=predictor,
        predictor_threshold=-0.1,
    )
    make_tiny_model(path, spec)
    return str(path)


def step_by_step(session: Session, mode: Mode) -> NDArray[np.float32]:
    return np.concatenate([session.forward(IDS[i : i + 1], mode=mode) for i in range(len(IDS))])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight_type", ["F32", "F16", "Q8_0", "Q4_0"])
def test_threads_and_repetition_change_no_bit(tmp_path: Path, weight_type: str, mode: Mode) -> None:
    path = sparse_model(tmp_path / "model.gguf", weight_type)
    expected = None
    for threads in (1, 2, 3, 1):
        model = Model(path, threads=threads)
        result = (
            step_by_step(model.session(32), mode),
            model.session(32).forward(IDS, mode=mode, logits="all"),
        )
        expected = expected or result
        assert np.array_equal(result[0], expected[0])
        assert np.array_equal(result[1], expected[1])


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("mode", ["threshold", "predicted"])
@pytest.mark.parametrize("predictor", ["low_rank", "sign"])
def test_instruction_sets_agree(tmp_path: Path, predictor: str, mode: Mode, isa: str) -> None:
    path = sparse_model(tmp_path / "model.gguf", predictor=predictor)
    expected = step_by_step(Model(path, isa="scalar").session(32), mode)
    model = Model(path, isa=isa)
    assert model.isa == isa
    logits = step_by_step(model.session(32), mode)
    assert np.linalg.norm(logits - expected) < 1e-5 * np.linalg.norm(expected)


def test_long_prompts_are_cut_into_chunks(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, TinyModel(context_length=1024))
    ids = np.resize(IDS, 600).astype(np.int32)
    model = Model(str(path))
    whole = model.session(1024).forward(ids, logits="all")
    parts = model.session(1024)
    expected = np.concatenate([parts.forward(ids[i : i + 100], logits="all") for i in range(0, 600, 100)])
    assert np.linalg.norm(whole - expected) < 1e-5 * np.linalg.norm(expected)


def test_truncate_forgets(tmp_path: Path) -> None:
    session = Model(sparse_model(tmp_path / "model.gguf")).session(32)
    expected = session.forward(IDS[:12])
    session.forward(IDS[12:])
    session.truncate(0)
    assert np.array_equal(session.forward(IDS[:12]), expected)
    session.truncate(11)
    last = session.forward(IDS[11:12])
    assert np.linalg.norm(last - expected) < 1e-5 * np.linalg.norm(expected)


def test_should_stop_rolls_back(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, TinyModel(context_length=1024))
    session = Model(str(path)).session(1024)
    session.forward(IDS)
    before = session.counters
    answers = iter([False, True])
    with pytest.raises(EngineError, match="interrupted"):
        session.forward(np.resize(IDS, 600).astype(np.int32), should_stop=lambda: next(answers))
    assert session.position == len(IDS)
    assert session.counters == before


def test_an_error_in_should_stop_reaches_the_caller(tmp_path: Path) -> None:
    session = Model(sparse_model(tmp_path / "model.gguf")).session(32)

    def fail() -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session.forward(IDS, should_stop=fail)
    assert session.position == 0


def test_counters(tmp_path: Path) -> None:
    model = Model(sparse_model(tmp_path / "model.gguf", predictor=None))
    session = model.session(32)
    step_by_step(session, "dense")
    dense = session.counters
    assert dense["tokens"] == dense["decode_tokens"] == len(IDS)
    assert dense["candidates"] == dense["active"] == dense["gate_passed"] == [160 * len(IDS)] * 2
    cache = 2 * 2 * 32 * 4 * sum(range(1, len(IDS) + 1))  # layers, key and value, kv width, float, positions
    assert dense["bytes_read"] == model.info.weight_bytes * len(IDS) + cache
    session.reset_counters()
    session.truncate(0)
    session.forward(IDS, mode="exact")
    counters = session.counters
    assert counters["decode_tokens"] == counters["bytes_read"] == 0
    assert all(
        a < g < 160 * len(IDS) for a, g in zip(counters["active"], counters["gate_passed"], strict=True)
    )


def test_read_bandwidth_is_positive_and_checks_its_arguments() -> None:
    assert read_bandwidth(1, 1 << 22, seconds=0.01) > 1e6
    assert read_bandwidth(2, 1 << 22, row_bytes=4096, one_in=10, seconds=0.01) > 1e6
    for threads, size, options in [
        (1, 10, {}),
        (1, 1 << 22, {"row_bytes": 1 << 23}),
        (1, 1 << 22, {"row_bytes": 1 << 20, "one_in": 5}),
        (1, 1 << 22, {"one_in": 0}),
        (1, 1 << 22, {"seconds": -1.0}),
        (-1, 1 << 22, {}),
    ]:
        with pytest.raises(ConfigError, match="expected"):
            read_bandwidth(threads, size, **options)  # type: ignore[arg-type]
