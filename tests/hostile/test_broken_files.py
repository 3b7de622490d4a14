"""Broken model files through the command line: one clear line, status 2, no crash."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.gguf_bytes import ARRAY, BOOL, STRING, UINT32, File, Tensor, array, entry, text
from turbosparse.cli.main import main

ARCHITECTURE = entry(b"general.architecture", STRING, text(b"llama"))
SOUND = File().build()
HUGE = 2**64 - 1


def with_key(bad: bytes) -> bytes:
    return File(metadata=[ARCHITECTURE, bad]).build()


def with_tensors(*tensors: Tensor) -> bytes:
    return File(tensors=list(tensors), data=bytes(4096)).build()


# Name: bytes of the file, and what the one line has to say.
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "one byte": (b"G", "expected magic 'GGUF', got 'G'"),
    "text": (b"Once upon a time", "got 'Once'"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "expected magic"),
    "zip": (b"PK\x03\x04" + bytes(100), "got 'PK\\x03\\x04'"),
    "PowerInfer": (File(magic=b"PWRI").build(), "PowerInfer"),
    "version 1": (File(version=1).build(), "version 2 or 3, got 1"),
    "version 99": (File(version=99).build(), "got 99"),
    "big-endian": (File(version=3 << 24).build(), "little-endian"),
    "magic alone": (b"GGUF", "bytes"),
    "truncated header": (SOUND[:20], "before the end of the file"),
    "truncated key": (SOUND[:40], "bytes left"),
    "truncated data": (SOUND[:-1], "inside the file"),
    "no data": (File(data=b"").build(), "a size within the file"),
    "tensor count": (File(tensor_count=2).build(), "expected"),
    "huge tensor count": (File(tensor_count=HUGE).build(), "tensor count"),
    "negative tensor count": (File(tensor_count=2**63).build(), "tensor count"),
    "huge metadata count": (File(metadata_count=HUGE).build(), "metadata count"),
    "metadata count": (File(metadata_count=2).build(), "expected"),
    "huge string": (with_key(text(b"k") + struct.pack("<IQ", STRING, 2**62)), "before the end of the file"),
    "huge array": (with_key(entry(b"k", ARRAY, array(UINT32, 2**62, b""))), "an array that fits"),
    "array of arrays": (
        with_key(entry(b"k", ARRAY, array(ARRAY, 1, array(UINT32, 0, b"")))),
        "array of arrays",
    ),
    "unknown kind": (with_key(entry(b"k", 13, b"")), "kind from 0 to 12, got 13"),
    "boolean 2": (with_key(entry(b"k", BOOL, b"\x02")), "boolean"),
    "key twice": (with_key(ARCHITECTURE), "each key once"),
    "empty key": (with_key(entry(b"", BOOL, b"\x01")), "a name"),
    "key not UTF-8": (with_key(entry(b"\xff\xfe", BOOL, b"\x01")), "UTF-8"),
    "value not UTF-8": (with_key(entry(b"k", STRING, text(b"\xc3"))), "UTF-8"),
    "alignment 0": (with_key(entry(b"general.alignment", UINT32, struct.pack("<I", 0))), "power of two"),
    "alignment 33": (with_key(entry(b"general.alignment", UINT32, struct.pack("<I", 33))), "power of two"),
    "alignment text": (with_key(entry(b"general.alignment", STRING, text(b"32"))), "an integer"),
    "architecture a number": (
        File(metadata=[entry(b"general.architecture", UINT32, bytes(4))]).build(),
        "expected a string, got 0",
    ),
    "no architecture": (File(metadata=[]).build(), "general.architecture"),
    "tensor twice": (with_tensors(Tensor(), Tensor(offset=512)), "each tensor once"),
    "tensors overlap": (with_tensors(Tensor(), Tensor(name=b"b", offset=480)), "do not overlap"),
    "no dimension": (with_tensors(Tensor(dims=())), "1 to 4 dimensions, got 0"),
    "five dimensions": (with_tensors(Tensor(dims=(1, 1, 1, 1, 1))), "got 5"),
    "dimension 0": (with_tensors(Tensor(dims=(32, 0))), "1 or more"),
    "negative dimension": (with_tensors(Tensor(dims=(HUGE,))), "1 or more"),
    "product overflows": (with_tensors(Tensor(dims=(2**32, 2**32, 4))), "a size within the file"),
    "unknown type": (with_tensors(Tensor(type_code=77)), "type code 77"),
    "row no block": (with_tensors(Tensor(dims=(33, 4), type_code=8)), "multiple of 32 values for type Q8_0"),
    "unaligned offset": (with_tensors(Tensor(offset=4)), "aligned to 32"),
    "offset outside": (with_tensors(Tensor(offset=2**40)), "inside the file"),
    "offset overflows": (with_tensors(Tensor(offset=2**64 - 32)), "inside the file"),
    "long tensor name": (with_tensors(Tensor(name=b"x" * 200)), "at most 127"),
    "escape in a name": (with_tensors(Tensor(name=b"\x1b[31m\n", type_code=77)), "'\\x1b[31m\\x0a'"),
}


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command gives before it leaves with status 2."""
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("turbosparse: error: [")
    assert shown.err.endswith("\n")
    assert shown.err.count("\n") == 1
    assert shown.err[:-1].isprintable()
    return shown.err


def test_the_sound_file_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(SOUND)
    assert main(["inspect", str(path)]) == 0
    assert "llama" in capsys.readouterr().out


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_give_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, says = BROKEN[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    line = refusal(["inspect", str(path)], capsys)
    assert str(path) in line
    assert says in line


def test_places_that_are_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases = {
        "absent": "No such file",
        "pipe": "regular",
        "dangling": "No such file",
        "loop": "symbolic links",
    }
    for name, says in cases.items():
        assert says in refusal(["inspect", str(tmp_path / name)], capsys)
    assert "a directory" in refusal(["inspect", str(tmp_path)], capsys)
    assert "regular" in refusal(["inspect", "/dev/null"], capsys)
    assert "name too long" in refusal(["inspect", str(tmp_path / ("x" * 300))], capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(SOUND)
    (tmp_path / "m.gguf").chmod(0)
    assert "Permission denied" in refusal(["inspect", str(tmp_path / "m.gguf")], capsys)


def test_a_path_that_is_not_text(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/m\xff.gguf"
    with open(path, "wb") as file:  # noqa: PTH123 -- pathlib has no bytes
        file.write(b"Once upon a time")
    command = [sys.executable.encode(), b"-m", b"turbosparse", b"inspect", path]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.count(b"\n") == 1
    assert b"expected magic 'GGUF', got 'Once'" in done.stderr


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    from turbosparse.errors import ModelFileError
    from turbosparse.runtime.model_file import ModelFile

    path = tmp_path / "m.gguf"
    for size in range(len(SOUND)):
        path.write_bytes(SOUND[:size])
        with pytest.raises(ModelFileError):
            ModelFile(path)
