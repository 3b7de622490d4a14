"""`turbosparse measure` as a user types it."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.bundled_model import make_bundled
from tests.measure.twins import TEXT
from tests.tiny_hf import make_hf_model, make_tokenizer
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.cli import measure_model
from turbosparse.cli.main import main
from turbosparse.cli.measure_model import labels
from turbosparse.errors import CalibrationError
from turbosparse.measure.page import _duration
from turbosparse.measure.summary import Cell, Table

OPTIONS = [
    "-t",
    "1",
    "--tokens",
    "256",
    "--context",
    "64",
    "--quality-tokens",
    "128",
    "--sample-tokens",
    "64",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measure")
    make_tiny_model(folder / "tiny.gguf", TinyModel(activation="drelu", down_t=True))
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def measure(folder: Path, model: str, output: str, *options: str) -> int:
    text = str(folder / "text.txt")
    return main(
        ["measure", str(folder / model), "--text", text, "-o", str(folder / output), *OPTIONS, *options]
    )


def read(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "measurement.json").read_text(encoding="utf-8"))
    assert isinstance(record, dict)
    return record


def test_a_report_of_a_model_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/turbosparse", "measure", "a model.gguf"])
    assert measure(folder, "tiny.gguf", "one", "--json") == 0
    out = capsys.readouterr().out
    assert "sparsity at CETT 0.1" in out
    brief = json.loads(out.splitlines()[-1])
    [model] = brief["models"]
    record = read(folder / "one")
    assert model["overall"] == record["overall"]
    assert 0.6 < record["overall"]["exact_zeros"]["value"] < 0.9
    assert record["text"]["name"] == "text.txt"
    assert record["run"]["command"] == "turbosparse measure 'a model.gguf'"
    assert {path.suffix for path in (folder / "one").iterdir()} >= {".json", ".html", ".png"}


def test_a_context_beyond_the_model_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(folder, "tiny.gguf", "long", "--context", "1000", "--tokens", "1000") == 0
    assert "windows of 256 tokens, the model's context, instead of 1000" in capsys.readouterr().err


def test_parquet_has_the_numbers_of_the_json(folder: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert measure(folder, "tiny.gguf", "table", "--quality-tokens", "64") == 0
    record = read(folder / "table")
    rows = parquet.read_table(folder / "table" / "measurement.parquet").to_pylist()
    values = {(row["section"], row["item"], row["number"]): row["value"] for row in rows}
    assert {row["model"] for row in rows} == {"tiny.gguf"}
    assert values["overall", "", "exact_zeros.value"] == record["overall"]["exact_zeros"]["value"]
    unit = record["units"][1]
    assert values["units", unit["name"], "cett_sparsity.value.0"] == unit["cett_sparsity"]["value"][0]
    point = record["quality"][0]
    assert values["quality", point["label"], "perplexity"] == point["perplexity"]


def test_the_page_needs_nothing_else(folder: Path) -> None:
    assert measure(folder, "tiny.gguf", "page", "--quality-tokens", "0") == 0
    page = (folder / "page" / "report.html").read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href)=['"]([^'"]{0,40})""", page)
    assert links
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert "http" not in re.sub(r"data:[^'\"]*", "", page)
    assert page.count("<figure") == len(list((folder / "page").glob("*.png")))
    assert "What leaving out neurons costs" not in page  # not asked for
    assert "nan" not in re.sub(r"data:[^'\"]*", "", page)


def test_side_by_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    model = make_hf_model("qwen3_moe", max_position_embeddings=128)
    model.save_pretrained(folder / "mixture")
    make_tokenizer().save_pretrained(folder / "mixture")
    assert measure(folder, "tiny.gguf", "first", "--quality-tokens", "0") == 0
    capsys.readouterr()
    others = [str(folder / "first"), str(folder / "mixture")]
    text = ["--text", str(folder / "text.txt"), "-o", str(folder / "both")]
    assert main(["measure", "--compare", *others, *text, *OPTIONS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("tiny.gguf" in line and "mixture" in line for line in lines)
    assert read(folder / "both" / "mixture")["model"]["num_experts"] == 4
    page = (folder / "both" / "report.html").read_text(encoding="utf-8")
    assert "Routing of mixture" in page
    assert not (folder / "both" / "measurement.json").exists()


def test_models_of_one_name_stay_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
        make_tiny_model(folder / name / "m.gguf", TinyModel(activation="relu" if name == "a" else "silu"))
    models = [str(folder / name / "m.gguf") for name in ("a", "b")]
    text = ["--text", str(folder / "text.txt"), "-o", str(folder / "apart"), "--quality-tokens", "0"]
    assert main(["measure", "--compare", *models, *OPTIONS, *text]) == 0
    zeros = {
        name: read(folder / "apart" / f"{name}-m.gguf")["overall"]["exact_zeros"]["value"] for name in "ab"
    }
    assert zeros["a"] > 0.1
    assert zeros["b"] == 0
    out = capsys.readouterr().out
    assert "a/m.gguf" in out
    assert "b/m.gguf" in out


def test_all_models_are_looked_for_first(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbosparse.cli.measure_model.measure", lambda *args: pytest.fail("measured"))
    for missing in ("nowhere.gguf", "text.txt"):
        compared = ["--compare", str(folder / "tiny.gguf"), str(folder / missing)]
        assert main(["measure", *compared, "-o", str(folder / "missing")]) == 2
        assert missing in capsys.readouterr().err


def test_labels_take_as_many_folders_as_needed() -> None:
    names = ["x/run1/s/model", "x/run2/s/model", "y/m.gguf", "y/m.gguf", "owner/other"]
    assert labels(names) == ["run1/s/model", "run2/s/model", "m.gguf", "m.gguf 2", "other"]


@pytest.mark.parametrize("model", ["dense", "tiny.gguf"])
def test_predictors(folder: Path, model: str) -> None:
    pytest.importorskip("torch")
    if model == "dense":
        make_hf_model("llama", max_position_embeddings=128).save_pretrained(folder / "dense")
        make_tokenizer().save_pretrained(folder / "dense")
    output = f"predicted-{model}"
    assert measure(folder, model, output, "--predict-layers", "1", "--tokens", "512") == 0
    signs, low_rank = read(folder / output)["predictability"]
    assert signs["predictor"] == "sign bits"
    assert low_rank["bytes"] == pytest.approx(signs["bytes"], rel=0.5)
    for curve in (signs, low_rank):
        assert curve["recall"][0] == 1
        assert curve["recall"][-1] == 0
        assert curve["recall_se"][0] == curve["recall_se"][-1] == 0
        assert 0 < curve["recall_se"][10] < 0.2
    assert (folder / output / "predictability.png").exists()


def test_predictors_of_experts_alone_are_refused_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    make_hf_model("mixtral", max_position_embeddings=128).save_pretrained(folder / "mixtral")
    make_tokenizer().save_pretrained(folder / "mixtral")
    monkeypatch.setattr("turbosparse.cli.measure_model.measure", lambda *args: pytest.fail("measured"))
    assert measure(folder, "mixtral", "no-predictors", "--predict-layers", "1") == 2
    assert "[predictability: mixtral] expected dense FFNs, got experts alone" in capsys.readouterr().err


def test_what_was_measured_is_kept_if_predictors_fail(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")

    def fail(*args: object, **options: object) -> None:
        raise CalibrationError("[predictability] expected one, got none")

    monkeypatch.setattr("turbosparse.cli.measure_model._predictability", fail)
    options = ["--predict-layers", "1", "--quality-tokens", "0"]
    assert measure(folder, "tiny.gguf", "kept", *options) == 2
    assert read(folder / "kept")["overall"]["exact_zeros"]["value"] > 0


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("tiny.gguf", ["--cett", "a"], "[--cett] expected numbers with commas between, got 'a'"),
        ("tiny.gguf", ["--active", "0.15"], "[active] expected one of the CETT targets"),
        ("tiny.gguf", ["--active", "0.1,0.2"], "[--active] expected 1 number at most, got '0.1,0.2'"),
        ("tiny.gguf", ["--memory-mib", "0"], "expected --memory-mib of at least 1"),
        ("tiny.gguf", ["--seed", "-1"], "[seed] expected 0 or more, got -1"),
        (
            "tiny.gguf",
            ["--context", "128", "--tokens", "100"],
            "[tokens] expected at least one window of 128",
        ),
        ("missing.gguf", [], "expected a model file, directory or model id, got no such file"),
        ("empty", [], "expected a Hugging Face model (config.json) or a measurement"),
        ("text.txt", [], "text.txt"),
    ],
)
def test_bad_input(
    folder: Path, capsys: pytest.CaptureFixture[str], model: str, options: list[str], message: str
) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    assert measure(folder, model, "bad", "--force", *options) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("turbosparse: error: ")
    assert message in line
    assert not list((folder / "bad").glob("*")) if (folder / "bad").exists() else True


@pytest.mark.parametrize(
    "verb",
    [
        "measure",
        "study trade-off",
        "calibrate --cett 0.2",
        "fit-predictor",
        "export --type q8_0",
        "export --down-type q8_0",
    ],
)
def test_files_in_bundles_are_refused(folder: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    if verb == "fit-predictor":
        pytest.importorskip("torch")
    path = folder / "bundles.gguf"
    if not path.exists():
        shape = TinyModel(activation="relu", down_t=True, experts=4, intermediate_size=64)
        make_tiny_model(folder / "experts.gguf", shape)
        make_bundled(folder / "experts.gguf", path)
    text = ["--text", str(folder / "text.txt")]
    assert main([*verb.split(), str(path), *text, "-o", str(folder / f"out-{verb[:3]}")]) == 2
    assert "expected a file without bundles, got one made by export" in capsys.readouterr().err


def test_files_without_gates_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_model(folder / "plain.gguf", TinyModel(activation="relu2", gated=False))
    assert measure(folder, "plain.gguf", "plain") == 2
    assert "got plain ones, which are measured in torch only" in capsys.readouterr().err


def test_a_device_that_torch_cannot_use_is_found_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr("turbosparse.cli.measure_model.measure", lambda *args: pytest.fail("measured"))
    make_hf_model("llama", max_position_embeddings=128).save_pretrained(folder / "elsewhere")
    compared = ["--compare", str(folder / "tiny.gguf"), str(folder / "elsewhere")]
    assert main(["measure", *compared, "-o", str(folder / "device"), "--device", "foo"]) == 2
    assert "[device] expected one that torch can use here, got 'foo': " in capsys.readouterr().err


@pytest.mark.parametrize("output", ["text.txt/report", "text.txt", "/proc/self"])
def test_where_nothing_can_be_written_is_found_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    if output.startswith("/proc") and not Path(output).is_dir():
        pytest.skip("there is no directory that not even root can write to")
    monkeypatch.setattr("turbosparse.cli.measure_model.measure", lambda *args: pytest.fail("measured"))
    assert measure(folder, "tiny.gguf", output) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"[{folder / output}] expected a directory that can be written to, got: " in line


def test_measurements_beside_a_comparison_are_not_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_model(folder / "second.gguf", TinyModel(activation="drelu", down_t=True))
    models = ["--compare", str(folder / "tiny.gguf"), str(folder / "second.gguf")]
    rest = ["--text", str(folder / "text.txt"), "-o", str(folder / "beside"), "--quality-tokens", "0"]
    (folder / "beside" / "second.gguf").mkdir(parents=True)
    there = folder / "beside" / "second.gguf" / "measurement.json"
    there.write_text("of before", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr("turbosparse.cli.measure_model.measure", lambda *args: pytest.fail("measured"))
        assert main(["measure", *models, *OPTIONS, *rest]) == 2
    error = capsys.readouterr().err
    assert "second.gguf] expected no report there, got measurement.json; --force replaces it" in error
    assert there.read_text(encoding="utf-8") == "of before"
    assert main(["measure", *models, *OPTIONS, *rest, "--force"]) == 0
    assert read(there.parent)["model"]["name"] == "second.gguf"


def test_a_report_is_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "there").mkdir()
    (folder / "there" / "measurement.json").write_text("{}", encoding="utf-8")
    assert measure(folder, "tiny.gguf", "there") == 2
    assert "expected no report there, got measurement.json; --force replaces it" in capsys.readouterr().err
    assert main(["measure", "--compare", str(folder / "there"), "-o", str(folder / "new")]) == 2
    assert "expected a measurement of version 1, got None" in capsys.readouterr().err
    (folder / "there" / "measurement.json").write_text('{"format_version": 1}', encoding="utf-8")
    assert main(["measure", "--compare", str(folder / "there"), "-o", str(folder / "new")]) == 2
    assert "expected the sections of a measurement, got none called model" in capsys.readouterr().err
    assert main(["measure", "-o", str(folder / "new")]) == 2
    assert "expected a MODEL or --compare, got neither" in capsys.readouterr().err


def test_a_table_becomes_several_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(measure_model, "console", lambda: Console(width=30, file=stream))
    cells = ["CETT-PPL-10%", "12.3 ± 0.4 %", "5.6 ± 0.7 %"]
    row = [Cell(text) for text in cells]
    measure_model.show(Table(title="Both", note="", header=["rule", "sparsity", "rise"], rows=[row, row]))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert lines[0] == "Both"
    assert lines[1].split() == ["rule", "sparsity"]
    assert [line.strip() for line in lines if "CETT-PPL-10%" in line] == [
        *["CETT-PPL-10%  12.3 ± 0.4 %"] * 2,
        *["CETT-PPL-10%  5.6 ± 0.7 %"] * 2,
    ]


@pytest.mark.parametrize(("seconds", "says"), [(95.4, "95 s"), (1500.0, "25 minutes"), (7920.0, "2.2 hours")])
def test_times_are_told_as_people_do(seconds: float, says: str) -> None:
    assert _duration(seconds) == says
