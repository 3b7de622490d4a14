"""Memory that a process holds where no cgroup can be made: 64 MiB of it here, never the machine's."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.bundled_model import make_bundled
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.bench import benchmark, memory_hog, memory_limit, record, runners
from turbosparse.bench.benchmark import BenchConfig, bench_model
from turbosparse.bench.memory_hog import MemoryHog, choose_limit
from turbosparse.bench.memory_hog_worker import (
    PIECE,
    RESERVE,
    HeldMemory,
    main,
    pieces_missing,
    prefer_as_victim,
    taken_by,
)
from turbosparse.bench.memory_limit import LimitRecord, MemoryLimit, cgroup_refusal
from turbosparse.cli import bench
from turbosparse.cli.main import main as turbosparse
from turbosparse.errors import ConfigError, EngineError

pytestmark = pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")

MOST = 4 * PIECE
LIMIT = RESERVE  # so that there is something to hold on any machine


@pytest.fixture(autouse=True)
def meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the parent reads of the machine: no swap, whatever this one has."""
    path = tmp_path / "meminfo"
    path.write_text("MemTotal: 1000000 kB\nSwapTotal:       0 kB\n")
    monkeypatch.setattr(memory_hog, "_MEMINFO", path)
    return path


@pytest.fixture
def no_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_V1", "_V2"):
        monkeypatch.setattr(memory_limit, name, tmp_path / "none")


@pytest.fixture
def hog() -> Iterator[MemoryHog]:
    with MemoryHog("test", LIMIT, most=MOST) as hog:
        yield hog


def status_bytes(process: int, name: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def worker() -> subprocess.Popen[str]:
    command = [sys.executable, str(memory_hog.WORKER), str(LIMIT), str(MOST)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("left", "available", "pieces"),
    [
        (LIMIT + 10 * PIECE, LIMIT + 10 * PIECE, 10),
        (LIMIT + PIECE - 1, 1 << 40, 0),  # less than a piece either way
        (LIMIT - PIECE + 1, 1 << 40, 0),
        (LIMIT - 2 * PIECE, 1 << 40, -2),  # others took memory
        (LIMIT + 10 * PIECE, 0, -RESERVE // PIECE),  # whatever the side takes, some stays for all
    ],
)
def test_what_is_missing(left: int, available: int, pieces: int) -> None:
    assert pieces_missing(left, available, LIMIT) == pieces


def test_pieces_are_there_and_go() -> None:
    memory = HeldMemory()
    for _ in range(3):
        memory.add()
    assert memory.size == 3 * PIECE
    memory.release(-2)
    memory.release(1)
    assert memory.size == 2 * PIECE
    memory.release(9)
    assert memory.size == 0


def test_it_holds_and_says_so(hog: MemoryHog) -> None:
    process = hog._process.pid
    assert status_bytes(process, "VmRSS") >= MOST
    assert Path(f"/proc/{process}/oom_score_adj").read_text().strip() == "1000"
    record = hog.record()
    assert (record.kind, record.limit_bytes, record.held_bytes) == ("hog", LIMIT, MOST)
    assert record.locked == (status_bytes(process, "VmLck") >= MOST)
    assert record.left_bytes_min is not None and record.left_bytes_max is not None
    assert 0 < record.left_bytes_min <= record.left_bytes_max
    hog.close()
    assert not Path(f"/proc/{process}").exists()


def test_it_ends_with_its_parent() -> None:
    process = worker()
    assert process.stdin is not None and process.stdout is not None
    with process:
        assert json.loads(process.stdout.readline()) == {"ready": True}
        process.stdin.close()
        assert process.wait(60) == 0


def test_its_end_is_an_error(hog: MemoryHog) -> None:
    hog._process.kill()
    hog._process.wait()
    with pytest.raises(EngineError, match="stay held, got the end of the process that held it"):
        hog.record()


def test_a_side_that_takes_more_is_an_error(hog: MemoryHog) -> None:
    taken = b"1" * (LIMIT + 4 * PIECE)
    with pytest.raises(
        EngineError, match=r"expected test to take at most 64 MiB, got \d+ MiB"
    ):  # it may have looked in between
        for _ in range(100):  # it looks at least once between two questions
            hog.record()
    assert len(taken) > LIMIT


def test_children_count_for_the_side() -> None:
    before, _ = taken_by(os.getpid())
    code = "x = bytearray(64 << 20); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        size = status_bytes(child.pid, "RssAnon")
        assert size >= 64 << 20
        anonymous, mapped = taken_by(os.getpid())
        assert anonymous - before > size / 2
        assert mapped >= status_bytes(child.pid, "RssFile")
        child.communicate("\n")
    assert taken_by(1 << 30) == (0, 0)  # no such process


def test_nothing_to_hold() -> None:
    with pytest.raises(ConfigError, match=r"more free memory than the limit of 1073741824 MiB, got \d+ MiB"):
        MemoryHog("test", 1 << 50)


def test_swap_is_refused(meminfo: Path) -> None:
    meminfo.write_text("SwapTotal: 2097152 kB\n")
    with pytest.raises(ConfigError, match=r"got 2048 MiB; turn it off \(swapoff -a\), or .*MemoryMax=1234 "):
        MemoryHog("test", 1234)
    meminfo.unlink()
    with pytest.raises(ConfigError, match=r"expected cgroups or .*, got No such file"):
        MemoryHog("test", 1234)


def test_it_has_to_be_the_first_victim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="when memory runs out, got No such file"):
        prefer_as_victim(tmp_path / "none" / "oom_score_adj")
    monkeypatch.setattr(HeldMemory, "add", lambda self: pytest.fail("held memory first"))
    monkeypatch.setattr(
        "turbosparse.bench.memory_hog_worker.prefer_as_victim",
        functools.partial(prefer_as_victim, tmp_path / "none" / "oom_score_adj"),
    )
    main(LIMIT, MOST)
    assert "when memory runs out" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.usefixtures("no_cgroups")
def test_a_hog_is_the_choice_without_cgroups(meminfo: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_limit(LIMIT) == "hog"
    assert "right to make cgroups under" in caplog.text and "one side is timed after the other" in caplog.text
    with pytest.raises(ConfigError, match=r"more free memory than a side may have \(1073741824 MiB\)"):
        choose_limit(1 << 50)
    meminfo.write_text("SwapTotal: 2097152 kB\n")
    with pytest.raises(ConfigError, match="expected no swap"):
        choose_limit(LIMIT)


def test_a_cgroup_is_the_choice_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_hog, "cgroup_refusal", lambda: "")
    assert choose_limit(1 << 50) == "cgroup"


def test_a_plain_folder_is_no_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "_V1", tmp_path / "none")
    monkeypatch.setattr(memory_limit, "_V2", tmp_path)
    assert "right to make cgroups" in cgroup_refusal()
    with pytest.raises(ConfigError, match="got Operation not supported"):
        MemoryLimit("test", LIMIT)
    assert not list(tmp_path.glob("turbosparse-*"))


def test_two_sides_do_not_share_what_is_left(tmp_path: Path) -> None:
    config = BenchConfig(against_llama_cpp=True, memory_limit=LIMIT, limited_by="hog")
    with pytest.raises(ConfigError, match="expected one side at a time where memory is held"):
        list(bench_model(tmp_path / "any.gguf", config, progress=lambda: None))


@pytest.mark.usefixtures("no_cgroups")
def test_bench_times_one_side_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sides within what a hog leaves; llama.cpp is a stand-in that wants its weights mapped."""
    fake = tmp_path / "worker.py"
    fake.write_text(
        "import json, sys\n"
        "assert sys.argv[5:] == [''], sys.argv\n"
        "print(json.dumps({'ready': True}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps({'seconds': 0.001}), flush=True)\n"
    )
    monkeypatch.setattr(runners, "WORKER", fake)
    monkeypatch.setattr(runners, "require_llama_cpp", lambda: "0.0.0")
    monkeypatch.setattr(record, "_version", lambda package: "0.0.0")
    monkeypatch.setattr(benchmark, "MemoryHog", functools.partial(MemoryHog, most=MOST))
    shape = TinyModel(activation="drelu", down_t=True, weight_type="Q8_0", predictor="low_rank")
    make_tiny_model(tmp_path / "plain.gguf", TinyModel(weight_type="Q8_0"))
    make_tiny_model(tmp_path / "sparse.gguf", shape)
    model = make_bundled(tmp_path / "sparse.gguf", tmp_path / "bundled.gguf")
    command = [
        "bench",
        str(model),
        "--against",
        "llama.cpp",
        "--baseline-model",
        str(tmp_path / "plain.gguf"),
    ]
    options = ["--memory-budget", "64MiB", "-t", "1", "-p", "0", "-n", "4", "-r", "2", "--json"]
    assert turbosparse([*command, *options]) == 0
    shown = capsys.readouterr()
    assert "a process holds the other memory instead" in shown.err
    lines = shown.out.splitlines()
    assert lines[0].startswith(
        "no cgroup, but one side after the other while a process held all memory except"
    )
    assert lines[1].startswith("turbosparse was left ") and "(67.1 MB held, " in lines[1]
    assert lines[2].startswith("llama.cpp was left ")
    ours, theirs = json.loads(lines[-1])["rows"]
    assert (ours["backend"], theirs["backend"]) == ("turbosparse", "llama.cpp")
    assert ours["ratio_to_baseline"] == pytest.approx(ours["tok_per_s"] / theirs["tok_per_s"])
    for row in (ours, theirs):
        assert row["memory_limit"]["kind"] == "hog"
        assert row["memory_limit"]["limit_bytes"] == (64 + 256) << 20
        assert row["memory_limit"]["held_bytes"] == MOST


def test_the_verb_says_which_limit_it_was() -> None:
    cgroup = SimpleNamespace(backend="llama.cpp", memory_limit=LimitRecord(kind="cgroup", limit_bytes=10**9))
    assert bench._limit_text([cgroup]).startswith("each side in a cgroup of 1.0 GB, without swap: ")  # type: ignore[list-item]
