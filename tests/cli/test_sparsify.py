"""The verbs sparsify and train-control, from the command line."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from turbosparse.cli.main import main
from turbosparse.errors import ModelFileError

pytest.importorskip("torch")

from tests.tiny_hf import make_hf_model, make_texts, make_tokenizer
from turbosparse.models.registry import load_config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    make_hf_model().save_pretrained(directory / "model")
    make_tokenizer().save_pretrained(directory / "model")
    make_texts(directory)
    return directory


def quick(base: Path, output: Path) -> list[str]:
    settings = ["data.sequence_length=32", "threads=1", "precision=fp32", "data.held_out_percent=20"]
    return [
        f"--model={base / 'model'}",
        f"--text={base / 'stories.txt'}",
        f"--output={output}",
        "--tokens=2560",
        *(part for setting in settings for part in ("--set", setting)),
    ]


def test_a_run_without_a_recipe(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sparsify", *quick(base, tmp_path / "run")]) == 0
    model = Path(capsys.readouterr().out.splitlines()[-1])
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "turbosparse_llama"


def test_an_output_with_quotes(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / 'it\'s a \\ "run"'
    assert main(["sparsify", *quick(base, output), "--tokens=256"]) == 0
    assert Path(capsys.readouterr().out.splitlines()[-1]) == output / "distillation" / "model"


def test_the_control(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-control", *quick(base, tmp_path / "run")]) == 0
    model = Path(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((model / "config.json").read_text(encoding="utf-8"))["model_type"] == "llama"


def test_dry_run(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sparsify", "--dry-run", *quick(base, tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "distillation: 2,560 tokens in 10 steps" in text
    assert not (tmp_path / "run").exists()


def test_dry_run_names_a_missing_source(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [part.replace("stories.txt", "none.txt") for part in quick(base, tmp_path / "run")]
    assert main(["sparsify", "--dry-run", *arguments]) == 2
    captured = capsys.readouterr()
    assert "distillation: 2,560 tokens" in captured.out
    assert "none.txt] expected a file or a dataset id" in captured.err


def test_dry_run_tells_what_export_will_refuse(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sparsify", "--dry-run", *quick(base, tmp_path / "run"), "--activation"]
    assert main([*arguments, "fatrelu:0.1"]) == 0
    assert "export" not in capsys.readouterr().err
    assert main([*arguments, "shifted_relu:0.1"]) == 0
    assert "export will refuse the result: expected the name of an activation" in capsys.readouterr().err


def test_dry_run_of_a_fresh_model(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f"""output = "{tmp_path / "run"}"
[fresh]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
vocab_size = 300
context_length = 32
[data]
sequence_length = 32
sources = [{{ path = "{base / "stories.txt"}" }}]
[[stages]]
name = "one"
tokens = 1024
loss = {{ next_token = 1.0 }}
learning_rate = 1e-3
""",
        encoding="utf-8",
    )
    assert main(["sparsify", "--dry-run", str(recipe)]) == 0
    assert "one: 1,024 tokens" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["sparsify", "--model=m", "--output=o", "--text=t", "--tokens=0"],
            "[--tokens] expected at least 1, got 0",
        ),
        (["sparsify"], "expected a recipe file, or --model, --text and --output"),
        (["sparsify", "none.toml"], "expected a recipe file, got: No such file"),
        (["sparsify", "none.toml", "--tokens=5"], "expected a recipe or --text and --tokens, got both"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_missing_model(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = quick(base, tmp_path / "run")
    arguments[0] = f"--model={tmp_path / 'nowhere'}"
    assert main(["sparsify", *arguments]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_models_that_are_none(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    rest = ["--text", str(base / "stories.txt"), "--output", str(tmp_path / "run")]
    for command, says in (
        (["sparsify", "--model", "empty"], "[empty] expected the configuration of a model"),
        (
            ["sparsify", "--model", "m.gguf"],
            "[m.gguf] expected a Hugging Face directory or model id, got a file",
        ),
        (["study", "trade-off", "empty"], "[empty] expected a Hugging Face model (config.json)"),
    ):
        assert main([*command, *rest]) == 2
        [line] = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
        assert says in line


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(path: str) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nCheck your connection.")

    monkeypatch.setattr("turbosparse.models.registry.AutoConfig.from_pretrained", unreachable)
    with pytest.raises(
        ModelFileError, match=r"\[no/one\] expected a directory here, .* got neither \(We couldn't"
    ):
        load_config("no/one")


def test_seeds_out_of_range(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sparsify", *quick(base, tmp_path / "run"), "--set", "seed=-1"]) == 2
    assert "[seed] expected 0 to 2^32 - 1, got -1" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_amid_a_line_of_the_log(base: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Logging in the handler would enter the stream again, where it is buffered."""
    program = """
import io, os, signal, sys
from turbosparse.cli.main import main
from turbosparse.errors import ModelFileError

class Interrupted(io.RawIOBase):
    done = False
    def writable(self):
        return True
    def write(self, data):
        if b"step 3/" in bytes(data) and not self.done:
            self.done = True
            signal.raise_signal(int(sys.argv[1]))
        return len(data)

sys.stderr = io.TextIOWrapper(io.BufferedWriter(Interrupted()), line_buffering=True)
sys.exit(main(sys.argv[2:]))
"""
    command = ["sparsify", *quick(base, tmp_path / "run"), "--set", "log_steps=1"]
    done = subprocess.run(
        [sys.executable, "-c", program, str(int(number)), *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert f"{number.name}: a checkpoint follows at the end of this step" in done.stderr
    assert list((tmp_path / "run").glob("*/checkpoint-*"))
