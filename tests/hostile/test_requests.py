"""Sound models, impossible requests: every verb answers with one line and status 2."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.runtime.cpus import available_cpus
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.model_file_copy import copy_with
from turbosparse.runtime.model_file_writer import TensorSource

VERBS = {
    "run": ["-p", "the cat", "-n", "2"],
    "perplexity": ["--text", "{text}"],
    "bench": ["--prompt-tokens", "8"],
    "calibrate": ["--text", "{text}", "--cett", "0.2", "--tokens", "128", "-o", "{folder}/out.gguf"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that lack something, and texts that are none."""
    path = tmp_path_factory.mktemp("requests")
    make_tiny_model(path / "sound.gguf", TinyModel(down_t=True, threshold=0.1))
    sound = ModelFile(path / "sound.gguf")
    keys = sound.stored_metadata()
    without = {key: value for key, value in keys.items() if not key.startswith("tokenizer.")}
    copy_with(sound, path / "no_tokenizer.gguf", metadata=without)
    copy_with(sound, path / "no_output_norm.gguf", drop=["output_norm.weight"])
    nan = TensorSource.of_array("blk.1.ffn_up.weight", np.full((160, 64), np.nan))
    copy_with(sound, path / "nan.gguf", tensors=[nan])
    (path / "text.txt").write_text("the thing and the other thing in the end " * 100, encoding="utf-8")
    (path / "empty.txt").touch()
    (path / "binary.txt").write_bytes(os.urandom(64) + b"\xff" * 64)
    return path


def refusal(folder: Path, *arguments: str) -> str:
    """The one line that a command gives before it leaves with status 2."""
    before = sorted(folder.iterdir())
    command = [sys.executable, "-m", "turbosparse", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("turbosparse: error: ")
    assert "Traceback" not in done.stderr
    assert sorted(folder.iterdir()) == before
    return done.stderr.splitlines()[-1]


def options(verb: str, folder: Path, **replaced: str) -> list[str]:
    texts = {"text": str(folder / "text.txt"), "folder": str(folder)} | replaced
    return [option.format(**texts) for option in VERBS[verb]]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("absent.gguf", "No such file"),
        ("no_tokenizer.gguf", "tokenizer"),
        ("no_output_norm.gguf", "output_norm.weight"),
        ("text.txt", "expected magic 'GGUF'"),
    ],
)
def test_models_that_do_not_serve(folder: Path, verb: str, model: str, says: str) -> None:
    assert says in refusal(folder, verb, str(folder / model), *options(verb, folder))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("threads", ["-1", f"{available_cpus() + 1}", "two"])
def test_impossible_threads(folder: Path, verb: str, threads: str) -> None:
    line = refusal(folder, verb, str(folder / "sound.gguf"), *options(verb, folder), "--threads", threads)
    assert "threads" in line


@pytest.mark.parametrize("verb", ["perplexity", "calibrate"])
@pytest.mark.parametrize(
    ("text", "says"),
    [("absent.txt", "No such file"), ("empty.txt", "text"), ("binary.txt", "expected UTF-8")],
)
def test_texts_that_do_not_serve(folder: Path, verb: str, text: str, says: str) -> None:
    named = options(verb, folder, text=str(folder / text))
    assert says in refusal(folder, verb, str(folder / "sound.gguf"), *named)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-p", ""], "prompt"),
        (["-p", "the " * 2000], "expected"),
        (["-p", "the", "-n", "-1"], "expected"),
        (["-p", "the", "--mode", "exact"], "exact"),
        (["-p", "the", "--mode", "fast"], "invalid choice"),
        (["-p", "the", "--temp", "-1"], "temperature"),
        (["-p", "the", "--top-p", "2"], "top_p"),
        (["-p", "the", "--temp", "nan"], "temperature"),
        (["-p", "the", "--isa", "avx1024"], "avx1024"),
        (["-p", "the", "--context", "0"], "context"),
        (["-p", "the", "--context", "1000000000"], "context"),
        (["-f", "/nowhere/at/all"], "No such file"),
    ],
)
def test_requests_that_cannot_be_met(folder: Path, arguments: list[str], says: str) -> None:
    assert says in refusal(folder, "run", str(folder / "sound.gguf"), *arguments)


def test_numbers_that_explode_are_reported_not_printed(folder: Path) -> None:
    line = refusal(folder, "run", str(folder / "nan.gguf"), "-p", "the cat", "--raw")
    assert "expected finite" in line
