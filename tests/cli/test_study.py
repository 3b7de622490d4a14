"""`turbosparse study` from the command line: a report, going on, and one line for what is wrong."""

import json
from pathlib import Path

import pytest

from tests.measure.twins import TEXT
from tests.tiny_hf import make_hf_model, make_tokenizer
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.cli.main import main

pytest.importorskip("torch")

SMALL = [
    *("--set", "tokens=64", "--set", "context=32", "--set", "sample_tokens=16"),
    *("--set", "cett_targets=[0.2]", "--set", "top_k=[0.5]", "--set", "gate_shares=[0.5]"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_tiny_model(folder / "tiny.gguf", TinyModel(activation="silu"))
    make_tiny_model(folder / "experts.gguf", TinyModel(experts=4, intermediate_size=64))
    make_hf_model("qwen3_moe", max_position_embeddings=64).save_pretrained(folder / "mixture")
    make_tokenizer().save_pretrained(folder / "mixture")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("kind", "model"), [("trade-off", "tiny.gguf"), ("experts", "mixture"), ("experts", "experts.gguf")]
)
def test_a_sweep_leaves_a_report(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str, model: str
) -> None:
    output = folder / f"{kind} of {model}"
    command = ["study", kind, str(folder / model), "--text", str(folder / "text.txt"), "-o", str(output)]
    assert main([*command, *SMALL]) == 0
    assert "What each rule loses" in capsys.readouterr().out
    record = json.loads((output / "study.json").read_text(encoding="utf-8"))
    labels = [point["label"] for point in record["quality"]]
    assert labels == ["CETT 0.2", "top 50 %", "gate, 50 %", "gate > 0", "nonzero"]
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure") == (4 if kind == "trade-off" else 5)
    assert "text.txt" in page
    assert sorted(path.name for path in output.glob(".turbo*")) == []
    begun = {path.name: path.stat().st_mtime_ns for path in (output / "results").iterdir()}
    assert main([*command, *SMALL, "--json"]) == 0  # nothing is run again
    assert {path.name: path.stat().st_mtime_ns for path in (output / "results").iterdir()} == begun
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["study"]["study"] == kind


def test_results_of_another_model_are_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_tiny_model(tmp_path / "m.gguf", TinyModel(activation="silu"))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    rest = ["--text", "text.txt", "-o", "out", *SMALL]
    assert main(["study", "trade-off", "m.gguf", *rest]) == 0
    begun = json.loads((tmp_path / "out" / "begun.json").read_text(encoding="utf-8"))
    assert main(["study", "trade-off", "./m.gguf", *rest]) == 0
    make_tiny_model(tmp_path / "m.gguf", TinyModel(activation="drelu"))
    assert main(["study", "trade-off", "m.gguf", *rest]) == 2
    assert "expected the model_fingerprint that this study began with" in capsys.readouterr().err
    del begun["settings"]["model_fingerprint"]  # as older versions wrote it
    (tmp_path / "out" / "begun.json").write_text(json.dumps(begun), encoding="utf-8")
    assert main(["study", "trade-off", "m.gguf", *rest]) == 0


def test_what_is_refused_begins_no_study(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("too short", encoding="utf-8")
    command = ["study", "trade-off", str(folder / "tiny.gguf"), "-o", str(tmp_path / "out"), *SMALL]
    assert main([*command, "--text", str(tmp_path / "text.txt")]) == 2
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert main([*command, "--text", str(tmp_path / "text.txt")]) == 0


@pytest.mark.parametrize("model", ["tiny.gguf", "hf"])
def test_tasks_are_asked_at_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """By the real harness, on a local file; leaving out nothing changes no score."""
    pytest.importorskip("lm_eval")
    from tests.bench.test_tasks import write_task

    if model == "hf":
        make_hf_model("llama", max_position_embeddings=64).save_pretrained(tmp_path / model)
        make_tokenizer().save_pretrained(tmp_path / model)
    else:
        make_tiny_model(tmp_path / model, TinyModel(activation="silu"))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    asked = [f"task_folder={write_task(tmp_path, monkeypatch)}", 'tasks=["tiny"]', "top_k=[1.0, 0.2]"]
    command = ["study", "trade-off", str(tmp_path / model), "--text", str(tmp_path / "text.txt")]
    settings = [part for setting in asked for part in ("--set", setting)]
    assert main([*command, "-o", str(tmp_path / "out"), *SMALL, *settings]) == 0
    record = json.loads((tmp_path / "out" / "study.json").read_text(encoding="utf-8"))
    points = {point["label"]: point["tasks"] for point in record["quality"]}
    assert all(len(tasks) == 1 and tasks[0]["questions"] == 3 for tasks in points.values())
    assert points["top 100 %"] == points["nonzero"] == record["dense_tasks"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 5
    assert "By lm-evaluation-harness." in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "trade-of", "m"], "invalid choice: 'trade-of'"),
        (["study", "trade-off", "-o", "out"], "[trade-off] expected the fields model, got none"),
        (["study", "activations", "-o", "out"], "[study activations] expected --recipe FILE, got none"),
        (["study", "trade-off", "nowhere.gguf", "-o", "out"], "[nowhere.gguf] expected a model file"),
        (["study", "trade-off", "m", "-o", "out", "--set", "colour=1"], "got colour"),
        (["study", "trade-off", "m", "-o", "out", "--train-only"], "expected a study that trains"),
        (["study", "experts", "tiny.gguf", "-o", "dense"], "expected a mixture of experts, got dense FFNs"),
    ],
)
def test_what_is_wrong_is_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    assert main(arguments) == 2
    [line] = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
    assert message in line


def test_sizes_have_to_fit_the_study(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[2] / "examples" / "studies" / "activations_small.toml"
    assert main(["study", "scale", "--recipe", str(recipe)]) == 2
    assert "[sizes] expected several sizes for study scale, got 1" in capsys.readouterr().err


def test_a_study_of_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "train.txt").write_text("\n\n\n".join([TEXT] * 4), encoding="utf-8")
    shape = "intermediate_size = 64\nnum_hidden_layers = 2\nnum_attention_heads = 4\nvocab_size = 280\n"
    (tmp_path / "recipe.toml").write_text(
        f"""
text = "text.txt"
output = "out"
kinds = ["swiglu", "drelu"]
seeds = [1]
predict_layers = 0
threads = 1
precision = "fp32"
evaluate_tokens = 256
evaluation_sequences = 1
measure = {{ tokens = 128, context = 32, cett_targets = [0.1], quality_tokens = 64, sample_tokens = 32 }}
data = {{ sequence_length = 32, sources = [{{ path = "train.txt" }}] }}
[training]
name = "short"
tokens = 512
loss = {{ next_token = 1.0 }}
learning_rate = 1e-3
batch_sequences = 4
micro_batch = 4
[[sizes]]
hidden_size = 32
context_length = 64
{shape}
[[sizes]]
hidden_size = 48
context_length = 64
{shape}
"""
    )
    command = ["study", "scale", "--recipe", "recipe.toml"]
    assert main([*command, "--dry-run"]) == 0
    assert "drelu 48x2 seed 1: 512 tokens" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main([*command, "--train-only", "--set", 'kinds=["drelu"]']) == 0
    assert main([*command, "--set", "training.learning_rate=1e-2"]) == 2  # would be told of the old models
    assert "expected the training that this study began with" in capsys.readouterr().err
    command += ["--set", "measure.tokens=96"]  # what is measured need not have been known
    assert main(command) == 0
    assert main([*command, "--set", "measure.tokens=64"]) == 2
    record = json.loads((tmp_path / "out" / "study.json").read_text(encoding="utf-8"))
    assert [run["group"] for run in record["runs"]] == [
        "swiglu 32x2",
        "drelu 32x2",
        "swiglu 48x2",
        "drelu 48x2",
    ]
    assert record["run"]["seconds"] >= sum(run["seconds"] for run in record["runs"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "less swiglu" in page
    assert (tmp_path / "out" / "gap_by_size.png").is_file()
    typed = [*command, "--set", "seeds=[1]"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/turbosparse", *typed])
    assert main(typed) == 0
    again = json.loads((tmp_path / "out" / "study.json").read_text(encoding="utf-8"))
    assert again["run"]["seconds"] >= sum(run["seconds"] for run in record["runs"])
    assert (
        again["run"]["command"]
        == "turbosparse study scale --recipe recipe.toml --set measure.tokens=96 --set 'seeds=[1]'"
    )
