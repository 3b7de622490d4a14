"""The verb export: what it prints and writes, its statuses and refusals."""

import json
from pathlib import Path

import pytest

from tests.bundled_model import make_bundled
from tests.export.conftest import MakeDirectory, make_directory
from tests.tiny_hf import make_texts
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.cli.main import main
from turbosparse.runtime.model_file import ModelFile

__all__ = ["make_directory"]  # a fixture

QUICK = ("--tokens", "64", "-t", "1")


def test_writes_checks_and_reports(make_directory: MakeDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_directory(activation="drelu")
    out = directory.parent / "out.gguf"
    assert main(["export", str(directory), "-o", str(out), *QUICK, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("perplexity ")
    assert lines[1].startswith("KL mean ")
    assert lines[2].startswith(f"wrote {out} (")
    record = json.loads(lines[-1])
    assert record["bytes"] == out.stat().st_size
    assert record["check"]["passed"]
    assert record["check"]["tokens"] == 64
    assert ModelFile(out).modes == ["dense", "exact"]


def test_a_name_is_found_where_none_is_given(
    make_directory: MakeDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = make_directory()
    monkeypatch.chdir(directory.parent)
    assert main(["export", "model", "--type", "F16", "--no-check"]) == 0
    assert capsys.readouterr().out.startswith("wrote model-f16.gguf (")
    assert main(["export", "model", "--type", "f16", "--no-check"]) == 2
    assert "expected a new file" in capsys.readouterr().err
    assert main(["export", "model", "--type", "f16", "--no-check", "--force"]) == 0


def test_dry_run_tells_the_size(make_directory: MakeDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_directory(activation="relu")
    out = directory.parent / "out.gguf"
    arguments = ["export", str(directory), "-o", str(out), "--type", "f32", "--no-check", "--json"]
    assert main([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "blk.1.ffn_down_t.weight" in printed
    assert f"would write {out}: turbosparse-llama, " in printed
    expected = json.loads(printed.splitlines()[-1])["bytes"]
    assert not out.exists()
    assert main(arguments) == 0
    assert out.stat().st_size == expected


def test_a_failed_check_is_status_1(
    make_directory: MakeDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("turbosparse.export.run.KL_LIMITS", {"F32": -1.0, "Q8_0": -1.0})
    directory = make_directory()
    out = directory.parent / "out.gguf"
    assert main(["export", str(directory), "-o", str(out), "--type", "f32", *QUICK]) == 1
    assert "something else, or rounding costs this model as much; kept" in capsys.readouterr().out
    assert not out.exists()
    assert out.with_suffix(".failed.gguf").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--type", "q2_k"), "invalid choice: 'q2_k'"),
        (("--tokens", "3"), "[tokens] expected at least 8, got 3"),
        (("--text", "none.txt"), "No such file"),
        (("--predictor", "none"), "predictors.safetensors] expected a file, got: No such file"),
        (("--thresholds", "none.gguf"), "none.gguf"),
        (("-o", "none/out.gguf"), "expected a folder to write into"),
        (("--type", "q8_0", "--down-type", "q4_0", "-o", "."), "not a regular file"),
        (("--gate-apart",), "[--gate-apart] expected --layout bundled beside it, got it alone"),
        (("--layout", "bundled", "--hotness-tokens", "-5"), "[hotness tokens] expected 0 or more, got -5"),
    ],
)
def test_refusals(
    options: tuple[str, ...],
    message: str,
    make_directory: MakeDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = make_directory()
    monkeypatch.chdir(directory.parent)
    assert main(["export", "model", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("turbosparse: error: ")
    assert [path.name for path in directory.parent.iterdir()] == ["model"]


def test_bundles_are_not_taken_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_model(tmp_path / "sparse.gguf", TinyModel(activation="drelu", down_t=True, weight_type="Q8_0"))
    made = make_bundled(tmp_path / "sparse.gguf", tmp_path / "bundled.gguf")
    command = ["export", str(made), "-o", str(tmp_path / "out.gguf"), "--no-check"]
    assert main([*command, "--layout", "plain"]) == 2
    assert "expected a file without bundles" in capsys.readouterr().err
    assert not (tmp_path / "out.gguf").exists()
    assert main([*command, "--name", "another"]) == 0
    assert ModelFile(tmp_path / "out.gguf").has_bundles


def test_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
    assert main(["export", str(tmp_path)]) == 2
    assert "config.json] expected a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "architecture"), [("sparsify", "turbosparse-llama"), ("train-control", "llama")]
)
def test_what_training_leaves(
    verb: str, architecture: str, make_directory: MakeDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_directory()
    folder, out = base.parent, base.parent / "out.gguf"
    text = make_texts(folder)["text"]
    settings = ("data.sequence_length=32", "threads=1", "precision=fp32", "data.held_out_percent=20")
    where = [f"--model={base}", f"--text={text}", f"--output={folder / 'run'}", "--tokens=2560"]
    assert main([verb, *where, *(part for item in settings for part in ("--set", item))]) == 0
    model = Path(capsys.readouterr().out.splitlines()[-1])
    for directory in (model, max(model.parent.glob("checkpoint-*"))):
        assert main(["export", str(directory), "-o", str(out), "--type", "f32", "--force", *QUICK]) == 0
        metadata = ModelFile(out).metadata
        assert metadata["general.architecture"] == architecture
        assert metadata["turbosparse.training.tokens"] == 2560
        assert metadata["turbosparse.training.stage"] == model.parent.name
