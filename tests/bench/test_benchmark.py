"""The benchmark on tiny models, with our engine alone and with a stand-in for llama.cpp."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.bench.test_synthetic import MODEL
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse import _native
from turbosparse.bench import benchmark, runners
from turbosparse.bench.benchmark import BenchConfig, Row, bench_model, runs_per_model
from turbosparse.bench.filled_sessions import FilledSessions
from turbosparse.bench.one_at_a_time import bench_one_at_a_time
from turbosparse.bench.record import as_table, describe_machine, result_record, unused_path
from turbosparse.errors import ConfigError, EngineError
from turbosparse.tokenizer import Tokenizer

QUICK = BenchConfig(threads=(1,), prompt_tokens=8, generated_tokens=4, rounds=2)


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "sparse.gguf", TinyModel(down_t=True, threshold=0.05, gate_threshold=0.01))
    return tmp_path / "sparse.gguf"


@pytest.fixture
def fake_llama_cpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker that speaks the protocol and takes a millisecond per token."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, sys\n"
        "if 'broken' in sys.argv[1]:\n"
        "    print(json.dumps({'error': 'cannot read'}), flush=True)\n"
        "    sys.exit()\n"
        "print(json.dumps({'ready': True}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps({'seconds': len(json.loads(line)['timed']) / 1000}), flush=True)\n"
    )
    monkeypatch.setattr(runners, "WORKER", worker)
    monkeypatch.setattr(runners, "require_llama_cpp", lambda: "0.0.0")


def rows_of(path: Path, config: BenchConfig) -> dict[tuple[str, str, str], Row]:
    ticks: list[int] = []
    rows = list(bench_model(path, config, progress=lambda: ticks.append(1)))
    assert len(ticks) == runs_per_model(config, path)
    return {(row.backend, row.mode, row.test): row for row in rows}


def test_every_mode_and_test_has_a_row(sparse: Path) -> None:
    rows = rows_of(sparse, QUICK)
    assert set(rows) == {
        ("turbosparse", mode, test) for mode in ("dense", "threshold") for test in ("pp8", "tg4")
    }
    dense, threshold = (rows["turbosparse", mode, "tg4"] for mode in ("dense", "threshold"))
    assert dense.ratio_to_dense == 1.0
    assert threshold.ratio_to_dense is not None
    assert dense.active_ratio == 1.0
    assert threshold.active_ratio is not None
    assert 0 < threshold.active_ratio < 1
    assert dense.bytes_per_token is not None
    assert threshold.bytes_per_token is not None
    assert 0 < threshold.bytes_per_token < dense.bytes_per_token
    for row in rows.values():
        assert row.tok_per_s > 0
        assert len(row.rounds_tok_per_s) == 2
        assert row.ratio_to_baseline is None
        assert (row.bandwidth_share is None) == row.test.startswith("pp")
        assert (row.threads, row.quant, row.model) == (1, "F32", "sparse")
    share = dense.bytes_per_token * dense.tok_per_s / (dense.read_bandwidth_gb_per_s * 1e9)
    assert dense.bandwidth_share == pytest.approx(share)
    assert dense.bandwidth_gb_per_s == pytest.approx(dense.bytes_per_token * dense.tok_per_s / 1e9)
    assert not dense.synthetic


def test_depth_and_modes_are_as_asked(sparse: Path) -> None:
    config = BenchConfig(
        modes=("threshold",), threads=(1, 2), prompt_tokens=0, generated_tokens=2, depths=(5,), rounds=1
    )
    rows = list(bench_model(sparse, config, progress=lambda: None))
    assert [(row.threads, row.test, row.mode) for row in rows] == [
        (1, "tg2 @ d5", "threshold"),
        (2, "tg2 @ d5", "threshold"),
    ]
    assert rows[0].ratio_to_dense is None


def test_depths_are_compared_with_the_first(sparse: Path) -> None:
    config = BenchConfig(threads=(1,), prompt_tokens=0, generated_tokens=4, depths=(8, 200), rounds=2)
    rows = rows_of(sparse, config)
    for mode in ("dense", "threshold"):
        near, far = (rows["turbosparse", mode, f"tg4 @ d{depth}"] for depth in (8, 200))
        assert near.ratio_to_first_depth is None
        assert near.byte_ratio_to_first_depth is None
        pairs = zip(far.rounds_tok_per_s, near.rounds_tok_per_s, strict=True)
        assert far.ratio_to_first_depth == pytest.approx(sum(a / b for a, b in pairs) / 2)
        assert near.bytes_per_token is not None
        assert far.bytes_per_token is not None
        assert far.byte_ratio_to_first_depth == near.bytes_per_token / far.bytes_per_token < 1
    assert "bytes allow" in as_table(list(rows.values())).splitlines()[0]


def test_tokens_before_a_test_are_computed_once(sparse: Path) -> None:
    model = _native.Model(str(sparse), threads=1)
    cases = benchmark.cases_of(sparse, BenchConfig(prompt_tokens=6, generated_tokens=4, depths=(0, 9)), 256)
    sessions = FilledSessions(model, "dense", cases)
    session = sessions.after(cases[2].warm)
    assert (session.position, session.context) == (9, 15)
    first = session.forward(np.array(cases[2].timed, np.int32), mode="dense")
    session.reset_counters()
    again = sessions.after(cases[3].warm)
    assert again is session
    assert session.counters["tokens"] == 0
    np.testing.assert_array_equal(again.forward(np.array(cases[2].timed, np.int32), mode="dense"), first)
    assert sessions.after([]).position == 0


@pytest.mark.usefixtures("fake_llama_cpp")
def test_against_llama_cpp(sparse: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.gguf"
    make_tiny_model(plain, TinyModel(weight_type="Q8_0"))
    config = BenchConfig(
        threads=(1,),
        prompt_tokens=8,
        generated_tokens=4,
        rounds=2,
        against_llama_cpp=True,
        baseline_model=plain,
    )
    rows = rows_of(sparse, config)
    base = rows["llama.cpp", "dense", "tg4"]
    assert (base.model, base.quant) == ("plain", "Q8_0")
    assert base.tok_per_s == pytest.approx(1000)
    assert base.ratio_to_baseline is None
    assert base.active_ratio is None
    ours = rows["turbosparse", "dense", "tg4"]
    assert ours.ratio_to_baseline == pytest.approx(ours.tok_per_s / 1000, rel=0.5)


@pytest.mark.usefixtures("fake_llama_cpp")
def test_one_at_a_time_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[str] = []

    @contextmanager
    def progress(label: str) -> Iterator[Callable[[float], None]]:
        labels.append(label)
        yield lambda amount: None

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = BenchConfig(
        threads=(1,), prompt_tokens=0, generated_tokens=4, rounds=2, modes=("exact",), against_llama_cpp=True
    )
    ours, theirs = bench_one_at_a_time(MODEL, config, progress=progress)
    assert (ours.backend, ours.mode, theirs.backend) == ("turbosparse", "exact", "llama.cpp")
    assert ours.ratio_to_baseline == pytest.approx(ours.tok_per_s / 1000, rel=0.5)
    assert not list((tmp_path / "turbosparse" / "synthetic").iterdir())
    assert labels == ["making the synthetic model", "timing it", "making the plain model", "timing llama.cpp"]


@pytest.mark.usefixtures("fake_llama_cpp")
def test_llama_cpp_needs_a_file_it_can_read(sparse: Path, tmp_path: Path) -> None:
    against = BenchConfig(threads=(1,), rounds=1, against_llama_cpp=True)
    with pytest.raises(ConfigError, match="expected --baseline-model FILE"):
        list(bench_model(sparse, against, progress=lambda: None))
    make_tiny_model(tmp_path / "broken.gguf")
    with pytest.raises(EngineError, match="got: cannot read"):
        list(bench_model(tmp_path / "broken.gguf", against, progress=lambda: None))


def test_without_llama_cpp_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'turbosparse\[baseline\]'"):
        runners.require_llama_cpp()


def test_prompts_are_the_book_that_ships_with_the_package(sparse: Path) -> None:
    cases = benchmark.cases_of(sparse, BenchConfig(prompt_tokens=64, generated_tokens=32, depths=(8,)), 256)
    metadata = _native.GgufFile(str(sparse)).metadata
    text = Tokenizer.from_metadata(metadata).decode([*cases[0].warm, *cases[0].timed])
    assert text.startswith("Inner Workings of a Computer")
    assert [len(case.warm) for case in cases] == [8, 8]
    assert cases[0].timed[:32] == cases[1].timed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, r"\[bench rounds\] expected 1 to 1000, got 0"),
        ({"threads": ()}, "at least one thread count"),
        ({"threads": (-1,)}, r"\[bench threads\] expected 0 to \d+, got -1"),
        ({"threads": (1, 5000)}, r"\[bench threads\] expected 0 to \d+, got 5000"),
        ({"prompt_tokens": 0, "generated_tokens": 0}, "prompt or generated tokens above 0"),
        ({"depths": (-1,)}, r"\[bench depth\]"),
        ({"depths": ()}, r"\[bench depth\] expected different numbers, got \(\)"),
        ({"depths": (8, 8)}, r"\[bench depth\] expected different numbers, got \(8, 8\)"),
        ({"depths": (0, 8), "memory_budget": 1 << 30}, "expected one within a memory budget, got 2"),
        ({"baseline_model": Path("x")}, "--against llama.cpp together with"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchConfig(**settings)  # type: ignore[arg-type]


def test_what_the_file_cannot_do(sparse: Path) -> None:
    with pytest.raises(ConfigError, match=r"sparse\.gguf can run \(dense, threshold\), got exact"):
        list(bench_model(sparse, BenchConfig(modes=("exact",)), progress=lambda: None))
    with pytest.raises(ConfigError, match=r"at most 256 tokens at once \(the model's context\), got 300"):
        list(bench_model(sparse, BenchConfig(prompt_tokens=300), progress=lambda: None))


def test_table_and_record(sparse: Path, tmp_path: Path) -> None:
    rows = list(bench_model(sparse, QUICK, progress=lambda: None))
    lines = as_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("|")[1].strip() == "model"
    assert len(lines) == 2 + len(rows)
    assert " - " in lines[2]
    assert "vs dense" in lines[0]
    assert not any(column in lines[0] for column in ("vs llama.cpp", "recall", "predictor MB"))
    record = json.loads(json.dumps(result_record(rows, [], command="turbosparse bench", files=[sparse])))
    assert record["files"][0]["name"] == "sparse.gguf"
    assert len(record["files"][0]["sha256"]) == 64
    assert record["versions"]["llama_cpp_python"] is None
    asked = "test mode threads quant tok_per_s ratio_to_dense ratio_to_baseline active_ratio"
    assert set(f"{asked} bytes_per_token bandwidth_share".split()) <= set(record["rows"][0])
    assert str(tmp_path) not in json.dumps(record)
    assert set(describe_machine()) == {"cpu", "logical_cpus", "memory_gib", "system"}


def test_a_table_too_wide_becomes_several(sparse: Path) -> None:
    ours = list(bench_model(sparse, QUICK, progress=lambda: None))
    others = [
        dataclasses.replace(row, model="plain", backend="llama.cpp", active_ratio=None)
        for row in ours
        if row.mode == "dense"
    ]
    whole = as_table([*ours, *others])
    assert as_table([*ours, *others], width=1000) == whole
    said, *tables = as_table([*ours, *others], width=80).split("\n\n")
    assert said.splitlines()[0].startswith("turbosparse: model sparse ")
    assert "\nllama.cpp: model plain " in said
    columns: set[str] = set()
    for table in tables:
        lines = table.splitlines()
        assert len(lines[0]) <= 80
        assert len(lines) == 2 + len(ours) + len(others)
        names = [name.strip() for name in lines[0].split("|")[1:-1]]
        assert {"backend", "test", "mode"} <= set(names)
        columns |= set(names)
    constant = {"model", "size", "params", "threads"}
    assert columns == {name.strip() for name in whole.splitlines()[0].split("|")[1:-1]} - constant
    (alone, *_) = as_table(ours, width=80).split("\n\n")[1:]
    assert alone.startswith("| test ")


def test_results_of_one_day_do_not_overwrite_each_other(tmp_path: Path) -> None:
    first = unused_path(tmp_path, "tiny")
    first.touch()
    second = unused_path(tmp_path, "tiny")
    assert first.name.endswith("-tiny.json")
    assert second.name == first.name.replace("-tiny.json", "-tiny-2.json")
