"""Studies that train: matched sizes, one tokenizer, results kept, failures told."""

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_hf import make_hf_model, make_texts, make_tokenizer
from turbosparse.config import fill, read_toml
from turbosparse.errors import CalibrationError, ConfigError, TextError, TrainingError
from turbosparse.measure.config import MeasureConfig
from turbosparse.measure.measurement import measure
from turbosparse.sparsify.run import RunResult, run_recipe
from turbosparse.study import training
from turbosparse.study.config import FromScratchStudy, RelufyStudy
from turbosparse.study.store import Store
from turbosparse.study.training_report import training_tables

EXAMPLES = Path(__file__).parents[2] / "examples" / "studies"
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 280,
    "context_length": 64,
}
MEASURE = MeasureConfig(
    tokens=128,
    context=32,
    cett_targets=(0.1, 0.2),
    ppl_budgets=(),
    top_k=(),
    quality_tokens=64,
    sample_tokens=32,
    pair_neurons=4,
)


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    texts = make_texts(folder)
    return {
        "output": str(folder / "study"),
        "seeds": [1],
        "predict_layers": 0,
        "threads": 1,
        "precision": "fp32",
        "evaluate_tokens": 256,
        "evaluation_sequences": 1,
        "data": {"sequence_length": 32, "sources": [{"path": str(texts["text"])}]},
        **changes,
    }


def stage() -> dict[str, Any]:
    return {
        "name": "short",
        "tokens": 512,
        "loss": {"next_token": 1.0},
        "learning_rate": 1e-3,
        "batch_sequences": 4,
        "micro_batch": 4,
    }


def from_scratch(folder: Path, **changes: Any) -> FromScratchStudy:
    fields = {"kinds": ["relu2", "drelu"], "sizes": [SHAPE], "training": stage(), **changes}
    return fill(FromScratchStudy, values(folder, **fields), "study")


def run(config: FromScratchStudy | RelufyStudy, text: str) -> dict[str, Any]:
    folder = Path(config.output)
    if isinstance(config, RelufyStudy):
        variants = training.relufied_variants(config, folder)
    else:
        variants = training.from_scratch_variants(config, folder)
    store = Store(folder, "test", training.training_settings(config, text))
    return training.run_variants(variants, text, store, MEASURE)


def text_of(folder: Path) -> str:
    return (folder / "book.txt").read_text(encoding="utf-8")


def test_kinds_from_scratch_have_as_many_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_scratch(tmp_path)
    record = run(config, text_of(tmp_path))
    plain, gated = record["runs"]
    assert plain["parameters"] == gated["parameters"]
    assert (plain["model"]["gated"], gated["model"]["gated"]) == (False, True)
    assert plain["model"]["intermediate_size"] == 1.5 * gated["model"]["intermediate_size"]
    assert [point["tokens"] for point in gated["curve"]] == [0, 256, 512]
    assert 0.3 < plain["overall"]["exact_zeros"]["value"] < 0.7
    assert gated["overall"]["exact_zeros"]["value"] > plain["overall"]["exact_zeros"]["value"]
    table, every = training_tables(record | {"baseline": "swiglu"})
    assert [row[0].text for row in table.rows] == ["relu2", "drelu"]
    assert [row[0].text for row in every.rows] == ["relu2 seed 1", "drelu seed 1"]

    def train_again(*args: Any, **options: Any) -> None:
        raise AssertionError("what is finished is not trained again")

    monkeypatch.setattr(training, "run_recipe", train_again)
    assert run(config, text_of(tmp_path)) == record


def test_a_failed_run_is_told_and_the_others_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_scratch(tmp_path)

    def fail_at_relu2(recipe: Any, **options: Any) -> RunResult:
        if recipe.activation == "relu2":
            raise TrainingError("[short] expected a finite loss, got nan at step 3")
        return run_recipe(recipe, **options)

    monkeypatch.setattr(training, "run_recipe", fail_at_relu2)
    record = run(config, text_of(tmp_path))
    assert [found["kind"] for found in record["runs"]] == ["drelu"]
    assert "relu2 seed 1 failed: [short] expected a finite loss, got nan at step 3" in record["notes"]
    monkeypatch.setattr(training, "run_recipe", run_recipe)
    assert [found["kind"] for found in run(config, text_of(tmp_path))["runs"]] == ["relu2", "drelu"]


def test_a_run_that_cannot_be_measured_is_told_and_the_others_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_scratch(tmp_path)

    def fail_at_drelu(source: Any, *args: Any) -> Any:
        if source.description["activation"] == "drelu":
            raise CalibrationError("[layer 1] expected finite activations, got NaN or Inf")
        return measure(source, *args)

    monkeypatch.setattr(training, "measure", fail_at_drelu)
    record = run(config, text_of(tmp_path))
    assert [found["kind"] for found in record["runs"]] == ["relu2"]
    assert "drelu seed 1 failed: [layer 1] expected finite activations, got NaN or Inf" in record["notes"]


@pytest.mark.parametrize("kind", ["fresh", "relufied"])
def test_too_little_text_is_told_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config: FromScratchStudy | RelufyStudy = from_scratch(tmp_path)
    if kind == "relufied":
        make_hf_model().save_pretrained(tmp_path / "model")
        make_tokenizer().save_pretrained(tmp_path / "model")
        config = fill(RelufyStudy, values(tmp_path, model=str(tmp_path / "model"), stages=[stage()]), "study")
    trained: list[Any] = []
    monkeypatch.setattr(training, "run_recipe", lambda *args, **options: trained.append(args))
    with pytest.raises(TextError, match="expected at least 32 tokens, one window, got"):
        run(config, "too short")
    assert not trained


def test_a_device_that_is_none_is_told_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "run_recipe", lambda *args, **options: pytest.fail("trained"))
    config = from_scratch(tmp_path)
    variants = training.from_scratch_variants(config, tmp_path)
    store = Store(tmp_path, "test", {})
    with pytest.raises(ConfigError, match="toaster"):
        training.run_variants(variants, text_of(tmp_path), store, MEASURE, device="toaster")


def test_a_signal_stops_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = RunResult(finished=False, model=tmp_path)
    monkeypatch.setattr(training, "run_recipe", lambda *args, **options: stopped)
    with pytest.raises(KeyboardInterrupt):
        run(from_scratch(tmp_path), text_of(tmp_path))


def test_one_model_swapped_and_its_control(tmp_path: Path) -> None:
    make_hf_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    fields = {"activations": ["drelu"], "initial_fit_tokens": 64, "stages": [stage()]}
    config = fill(RelufyStudy, values(tmp_path, model=str(tmp_path / "model"), **fields), "study")
    control, swapped = run(config, text_of(tmp_path))["runs"]
    assert (control["kind"], control["model"]["activation"]) == ("control", "silu")
    assert swapped["model"]["activation"] == "drelu"
    assert swapped["curve"][-1]["zeros"] > 0.5


def test_sizes_have_names_of_their_own(tmp_path: Path) -> None:
    config = from_scratch(tmp_path, sizes=[SHAPE, SHAPE | {"hidden_size": 48}], seeds=[1, 2])
    variants = training.from_scratch_variants(config, Path(config.output))
    assert len({variant.name for variant in variants}) == len(variants) == 8
    assert variants[2].group == "relu2 48x2"
    assert len({variant.recipe.fresh.tokenizer for variant in variants if variant.recipe.fresh}) == 1
    wider = from_scratch(tmp_path, sizes=[SHAPE, SHAPE | {"intermediate_size": 96}])
    names = [variant.name for variant in training.from_scratch_variants(wider, Path(wider.output))]
    assert names[::2] == ["relu2 32x2x64 seed 1", "relu2 32x2x96 seed 1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ["relu3"]}, r"\[kinds\] expected FFNs of relu, .*, got 'relu3'"),
        ({"seeds": [1, 1]}, r"\[seeds\] expected different seeds"),
        ({"kinds": ["drelu", "drelu"]}, r"\[kinds\] expected different ones, got drelu, drelu"),
        ({"sizes": [SHAPE, SHAPE | {"num_attention_heads": 2}]}, r"\[sizes\] expected .*, got 32x2x64 twice"),
        ({"sizes": []}, "expected at least one kind and one size, got 2 and 0"),
        ({"sizes": [SHAPE | {"hidden_size": 33}]}, r"\[fresh.hidden_size\] expected a multiple of twice"),
        ({"sizes": [SHAPE | {"vocab_size": 9}]}, r"\[fresh.vocab_size\] expected at least 257"),
        (
            {"predict_layers": 2, "sizes": [SHAPE | {"num_experts": 4}]},
            r"\[predict_layers\] expected 0 for mixtures of experts, got 2",
        ),
        ({"colour": 1}, r"\[study\] expected fields of .*, got colour"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_scratch(tmp_path, **changes)


def test_an_activation_has_one_run(tmp_path: Path) -> None:
    fields = {"model": "m", "activations": ["relu", "drelu", "reglu"], "stages": [stage()]}
    with pytest.raises(ConfigError, match="expected different ones, got relu and reglu, which are the same"):
        fill(RelufyStudy, values(tmp_path, **fields), "study")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_the_examples_are_valid(path: Path) -> None:
    kind = RelufyStudy if path.name.startswith("relufication") else FromScratchStudy
    assert fill(kind, read_toml(path), path.name).seeds
