"""What the engine refuses, by class and text, and how it behaves when it is interrupted."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse._native import Model
from turbosparse.errors import ConfigError, ContextLengthError, EngineError, ModelFileError

IDS = np.arange(8, dtype=np.int32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny") / "model.gguf"
    make_tiny_model(path)
    return str(path)


@pytest.mark.parametrize(
    "settings", [{"threads": -1}, {"threads": 10_000}, {"isa": "sse9"}, {"transcode": "Q2_K"}], ids=str
)
def test_bad_settings(tiny: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\[\w+\] expected .+, got"):
        Model(tiny, **settings)


def test_a_file_cut_short_in_use(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model.gguf")
    session = Model(str(tmp_path / "model.gguf")).session(16)
    session.forward(IDS)
    os.truncate(tmp_path / "model.gguf", 4096)
    with pytest.raises(EngineError, match="expected as many bytes as when it was opened, got fewer"):
        session.forward(IDS)
    assert session.position == len(IDS)


def test_files_that_cannot_run(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, TinyModel(arch="falcon"))
    with pytest.raises(ModelFileError, match=r"\[general.architecture\] expected llama.*, got falcon"):
        Model(str(path))
    make_tiny_model(path, TinyModel(extra_metadata={"llama.expert_count": 4}))
    with pytest.raises(ModelFileError, match="expert_used_count"):
        Model(str(path))
    with pytest.raises(ModelFileError):
        Model(str(tmp_path / "absent.gguf"))


def test_bad_calls(tiny: str) -> None:
    model = Model(tiny)
    for context in (0, -5, 257):
        with pytest.raises(ConfigError, match=r"\[context\] expected 1 to 256"):
            model.session(context)
    session = model.session(10)
    calls: list[tuple[type[Exception], dict[str, Any]]] = [
        (ConfigError, {"ids": IDS[:0]}),
        (ConfigError, {"ids": np.array([-1], np.int32)}),
        (ConfigError, {"ids": np.array([267], np.int32)}),
        (ConfigError, {"ids": IDS, "mode": "fast"}),
        (ConfigError, {"ids": IDS, "logits": "some"}),
        (ModelFileError, {"ids": IDS, "mode": "exact"}),
        (ModelFileError, {"ids": IDS, "mode": "threshold"}),
        (ContextLengthError, {"ids": np.zeros(11, np.int32)}),
    ]
    for error, arguments in calls:
        with pytest.raises(error, match="expected"):
            session.forward(**arguments)
        assert session.position == 0
    with pytest.raises(ConfigError, match=r"\[layers\]"):
        session.capture(IDS, [2])
    with pytest.raises(ConfigError, match=r"\[layers\] expected each layer once, got 1 twice"):
        session.capture(IDS, [1, 0, 1])
    others: list[Any] = [IDS.astype(np.int64), IDS.astype(np.float32)]
    for ids in others:  # neither is wrapped or rounded
        with pytest.raises(TypeError):
            session.forward(ids)
    with pytest.raises(ConfigError, match=r"\[truncate\]"):
        session.truncate(1)
    assert session.forward(IDS, logits="none").shape == (0, 267)
    assert session.forward(IDS[:1]).shape == (1, 267)


@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        ("token_embd.weight", "token embedding"),
        ("blk.1.attn_k.weight", "attention of layer 1"),
        ("blk.0.attn_v.weight", "attention of layer 0"),
        ("blk.1.attn_output.weight", "attention of layer 1"),
        ("blk.0.ffn_down.weight", "FFN of layer 0"),
        ("output.weight", "output projection"),
    ],
)
@pytest.mark.parametrize("weight_type", ["F32", "Q8_0"])
@pytest.mark.parametrize("kv_cache", ["", "q8_0"])
def test_nan_is_named_by_where_it_began(
    tmp_path: Path, kv_cache: str, weight_type: str, tensor: str, place: str
) -> None:
    path = tmp_path / "model.gguf"
    make_tiny_model(path, TinyModel(hidden_size=128, tied=False, weight_type=weight_type))
    reader = gguf.GGUFReader(path, "r+")
    data = next(t for t in reader.tensors if t.name == tensor).data
    data[3] = np.nan if weight_type == "F32" else 0xFF  # a half of all ones is a NaN
    reader.data.flush()
    model = Model(str(path), kv_cache=kv_cache)
    for ids in (np.array([3], np.int32), np.array([1, 2, 3], np.int32)):
        session = model.session(8)
        with pytest.raises(EngineError, match=rf"\[{place}\] expected finite numbers"):
            session.forward(ids)
        assert session.position == 0


def slow_session(tmp_path: Path, tokens: int, hidden_size: int) -> Any:
    path = tmp_path / "model.gguf"
    spec = TinyModel(hidden_size=hidden_size, intermediate_size=4 * hidden_size, context_length=tokens)
    make_tiny_model(path, spec)
    return Model(str(path), isa="scalar", threads=1).session(tokens)


def test_ctrl_c_stops_a_long_prompt(tmp_path: Path) -> None:
    session = slow_session(tmp_path, 8192, 512)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        session.forward(np.zeros(8192, np.int32))
    assert time.monotonic() - start < 30  # the whole prompt takes minutes
    assert session.position == 0


def test_two_calls_at_once_are_refused(tmp_path: Path) -> None:
    session = slow_session(tmp_path, 1024, 192)
    started, stop = threading.Event(), threading.Event()

    def should_stop() -> bool:
        started.set()
        return stop.is_set()

    def run() -> None:
        with pytest.raises(EngineError, match="interrupted"):
            session.forward(np.zeros(1024, np.int32), should_stop=should_stop)

    worker = threading.Thread(target=run)
    worker.start()
    while not started.is_set():  # the GIL is free while the other thread computes
        time.sleep(0.001)
    for call in (lambda: session.forward(IDS), session.reset_counters, lambda: session.truncate(0)):
        with pytest.raises(EngineError, match="one call at a time"):
            call()
    with pytest.raises(EngineError, match="one call at a time"):
        _ = session.counters
    stop.set()
    worker.join()


def test_ids_that_change_while_they_are_read(tiny: str) -> None:
    ids = np.full(200, 5, np.int32)
    expected = Model(tiny).session(256).forward(ids)

    def overwrite() -> bool:
        ids[:] = 2**31 - 1
        return False

    np.testing.assert_array_equal(Model(tiny).session(256).forward(ids, should_stop=overwrite), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            "_native.read_bandwidth(4, 1 << 20, seconds=0.01)",
            r"\[threads\] expected a system that gives 4, got 1",
        ),
        (
            "_native.time_read_bursts(sys.argv[1], io='pread', read_bytes=4096, begin=0, end=8192, reads=1)",
            r"\[io pread\] expected a system that gives a thread to read with, got none",
        ),
    ],
)
def test_a_system_that_gives_no_threads(tiny: str, call: str, says: str) -> None:
    program = f"""
import resource, sys
from turbosparse import _native
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (64 << 20)  # less than the stack of one thread
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
{call}
"""

    def large_stacks() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (256 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))

    done = subprocess.run(
        [sys.executable, "-c", program, tiny],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=large_stacks,
    )
    assert done.returncode == 1, done.stderr
    assert re.search(rf"EngineError: {says}", done.stderr)
