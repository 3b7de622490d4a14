"""Writing that goes wrong: nothing half-written stays, what was there stays, one clear line."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from turbosparse.errors import ModelFileError
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.model_file_writer import TensorSource, write_model_file

METADATA = {"general.architecture": "llama"}


def source(read: Callable[[], np.ndarray[Any, Any]], name: str = "b") -> TensorSource:
    return TensorSource(name=name, type_name="F32", shape=(4, 32), read=read)


def ones() -> np.ndarray[Any, Any]:
    return np.ones((4, 32), np.float32)


def raising(error: BaseException) -> Callable[[], np.ndarray[Any, Any]]:
    def read() -> np.ndarray[Any, Any]:
        raise error

    return read


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), SystemExit(143), ZeroDivisionError()])
def test_an_error_while_writing_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write_model_file(tmp_path / "m.gguf", METADATA, [source(ones, "a"), source(raising(error))])
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_replacing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model_file(path, METADATA, [source(ones, "old")])
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_model_file(path, METADATA, [source(raising(KeyboardInterrupt()))], overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr("turbosparse.runtime.model_file_writer.shutil.disk_usage", lambda path: Usage)
    with pytest.raises(ModelFileError, match="expected room for 512 bytes, got 100 bytes free"):
        write_model_file(tmp_path / "m.gguf", METADATA, [source(raising(AssertionError()))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["os.fsync", "GGUFWriter.close", "Path.replace"])
def test_a_disk_that_fills_up_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    closing = GGUFWriter.close

    def full(*args: Any) -> None:
        if step == "GGUFWriter.close":
            closing(*args)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(f"turbosparse.runtime.model_file_writer.{step}", full)
        with pytest.raises(
            ModelFileError, match="expected room for 512 bytes, got 'No space left on device'"
        ):
            write_model_file(tmp_path / "m.gguf", METADATA, [source(ones)])
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, signal, sys
import numpy as np
from turbosparse.runtime.model_file_writer import TensorSource, write_model_file
from turbosparse.errors import ModelFileError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
tensors = [TensorSource.of_array(name, np.ones((64, 32))) for name in "abc"]
try:
    write_model_file({path!r}, {{"general.architecture": "llama"}}, tensors)
except ModelFileError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [10, 100, 9000, 20000])
def test_no_room_at_any_place_in_the_file(tmp_path: Path, limit: int) -> None:
    """A limit on the size of files stands in for a full disk: in the header, the first tensor, the last."""
    code = LIMITED.format(limit=limit, path=str(tmp_path / "m.gguf"))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"[{tmp_path / 'm.gguf'}] expected room for 24576 bytes, got ")
    assert list(tmp_path.iterdir()) == []


SLOW = """
import sys, time, types
import numpy as np
from turbosparse.cli.main import VERBS, main
from turbosparse.runtime.model_file_writer import TensorSource, write_model_file
def read():
    print("writing", flush=True)
    time.sleep(60)
    return np.ones((4, 32), np.float32)
def run(args):
    source = TensorSource(name="a", type_name="F32", shape=(4, 32), read=read)
    write_model_file({path!r}, {{"general.architecture": "llama"}}, [source])
    return 0
sys.modules["a_verb"] = types.SimpleNamespace(__doc__="", run=run, add_arguments=lambda parser: None)
VERBS["try"] = ("a_verb", "")
sys.exit(main(["try"]))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_while_writing_leave_nothing(tmp_path: Path, number: signal.Signals, status: int) -> None:
    code = SLOW.format(path=str(tmp_path / "m.gguf"))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (status, "", "")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"\[b\] expected 512 bytes, got 8"):
        write_model_file(tmp_path / "m.gguf", METADATA, [source(lambda: np.ones(2, np.float32))])
    assert list(tmp_path.iterdir()) == []


def test_somebody_else_writing_the_same_file_wins(tmp_path: Path) -> None:
    """Without leave to overwrite, a file that appears meanwhile is not lost."""
    path = tmp_path / "m.gguf"

    def read() -> np.ndarray[Any, Any]:
        path.write_bytes(b"theirs")
        return ones()

    with pytest.raises(ModelFileError, match="expected a new file"):
        write_model_file(path, METADATA, [source(read)])
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_new_files_have_ordinary_permissions(tmp_path: Path) -> None:
    """Not those of temporary files, which nobody else may read."""
    mask = os.umask(0o022)
    try:
        write_model_file(tmp_path / "m.gguf", METADATA, [source(ones)])
    finally:
        os.umask(mask)
    assert (tmp_path / "m.gguf").stat().st_mode & 0o777 == 0o644


def test_only_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []

    def reader(name: str) -> Callable[[], np.ndarray[Any, Any]]:
        def read() -> np.ndarray[Any, Any]:
            order.append(f"read {name}")
            return ones()

        return read

    def progress(amount: float) -> None:
        order.append(f"wrote {amount:g}")

    sources = [source(reader(name), name) for name in "ab"]
    assert order == []
    write_model_file(tmp_path / "m.gguf", METADATA, sources, progress=progress)
    assert order == ["read a", "wrote 512", "read b", "wrote 512"]
    assert list(ModelFile(tmp_path / "m.gguf").tensors) == ["a", "b"]
