"""The verb calibrate: what it prints and writes, and how it refuses."""

import json
from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_model
from turbosparse.cli.main import main
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.texts import CALIBRATION, read_text


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "plain.gguf")
    (tmp_path / "text.txt").write_text(read_text(CALIBRATION)[:1200])
    return tmp_path / "plain.gguf"


def calibrate(plain: Path, *options: str) -> int:
    out, text = plain.with_name("sparse.gguf"), plain.with_name("text.txt")
    return main(
        ["calibrate", str(plain), "-o", str(out), "--text", str(text), "--tokens", "128", "-t", "1", *options]
    )


def test_writes_a_sparse_file_and_says_what_it_cost(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(plain, "--cett", "0.2", "--json") == 0
    printed = capsys.readouterr().out
    assert "up rows read" in printed
    assert "perplexity, held-out part (64 tokens): dense " in printed
    record = json.loads(printed.splitlines()[-1])
    assert record["cett_target"] == 0.2
    assert record["output"].endswith("sparse.gguf")
    assert len(record["active_ratio"]) == len(record["cett"]) == 2
    assert max(record["cett"]) <= 0.2
    assert ModelFile(plain.with_name("sparse.gguf")).modes == ["dense", "threshold"]


def test_a_perplexity_budget_in_percent(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(plain, "--ppl-budget", "5%", "--json") == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["ppl_budget"] == 0.05
    assert record["ppl_threshold"] <= 1.05 * record["ppl_source"]


def test_a_type_is_spelled_in_either_case(plain: Path) -> None:
    assert calibrate(plain, "--cett", "0.2", "--down-type", "f16") == 0
    assert ModelFile(plain.with_name("sparse.gguf")).tensor("blk.0.ffn_down_t.weight").type_name == "F16"


def test_an_existing_file_needs_force(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain.with_name("sparse.gguf").write_bytes(b"mine")
    assert calibrate(plain, "--cett", "0.2") == 2
    assert "expected a new file, got one that exists (--force, " in capsys.readouterr().err
    assert calibrate(plain, "--cett", "0.2", "--force") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "one of the arguments --cett --ppl-budget is required"),
        (("--cett", "2"), "[calibration cett] expected above 0 and below 1, got 2.0"),
        (("--ppl-budget", "much"), "[--ppl-budget] expected a share as in 1% or 0.01, got 'much'"),
        (("--cett", "0.2", "--down-type", "Q9"), "expected one of F32"),
        (("--cett", "0.2", "--tokens", "1"), "expected at least 128, got 1"),
    ],
)
def test_wrong_usage_is_one_line(
    plain: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(plain, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not plain.with_name("sparse.gguf").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "white space"), (b"caf\xe9 " * 500, "expected UTF-8, got byte 0xe9 at position 3")],
)
def test_texts_that_are_none(
    plain: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain.with_name("text.txt").write_bytes(content)
    assert calibrate(plain, "--cett", "0.2") == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in plain.parent.iterdir()) == ["plain.gguf", "text.txt"]
