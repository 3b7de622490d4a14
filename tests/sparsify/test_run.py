"""Runs of a tiny model: they learn, resume exactly, stop safely and say what is wrong."""

import dataclasses
import errno
import itertools
import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped, unused-ignore]
from transformers import AutoConfig, TrainingArguments

from tests.sparsify.conftest import MakeRecipe
from tests.tiny_hf import make_hf_model, make_tokenizer
from turbosparse.errors import ConfigError, DataError, ModelFileError, TokenizerError, TrainingError
from turbosparse.measure.divergence import logit_divergence
from turbosparse.measure.held_out_loss import mean_loss
from turbosparse.models.activations import Activation
from turbosparse.models.registry import activation_of, load_model, swap_activation
from turbosparse.sparsify import run as run_module
from turbosparse.sparsify import trainer as trainer_module
from turbosparse.sparsify.callbacks import RunCallback
from turbosparse.sparsify.checkpoints import checkpoint_steps, latest_checkpoint
from turbosparse.sparsify.recipe import Recipe
from turbosparse.sparsify.run import control_recipe, run_recipe
from turbosparse.sparsify.stage import Stage
from turbosparse.sparsify.trainer import StageTrainer

REGRESSION = {"loss": {"ffn_output": 1.0}}
DISTILLATION = {"loss": {"logits": 1.0}}
BALANCED = {"loss": {"logits": 1.0, "router_balance": 0.01}}


def metrics(recipe: Recipe, *, event: str | None = None) -> list[dict[str, Any]]:
    lines = (Path(recipe.output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        line for line in map(json.loads, lines) if line.get("event") == event and "train_loss" not in line
    ]


def losses(recipe: Recipe) -> list[float]:
    return [line["loss"] for line in metrics(recipe)]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(path).state_dict())


def interrupt_at(
    monkeypatch: pytest.MonkeyPatch, step: int, *, times: int = 1, number: signal.Signals = signal.SIGTERM
) -> None:
    original = RunCallback.on_step_end

    def on_step_end(self: RunCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == step:
            for _ in range(times):
                signal.raise_signal(number)
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunCallback, "on_step_end", on_step_end)


def test_signals_that_torchrun_repeats(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(DISTILLATION)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, times=3)
        assert not run_recipe(recipe).finished
    assert checkpoint_steps(Path(recipe.output) / "stage0") == [2]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 4, times=2, number=signal.SIGINT)
        patch.setattr(signal, "SIG_DFL", signal.default_int_handler)
        run_recipe(recipe)


def test_two_stages_learn_and_leave_a_model(make_recipe: MakeRecipe) -> None:
    longer = {"tokens": 32 * 4 * 30}
    recipe = make_recipe(
        REGRESSION | longer,
        DISTILLATION | longer | {"trainable": "all_but_embeddings"},
        tensorboard=True,
        license="mit",
    )
    result = run_recipe(recipe)
    assert result.finished
    found = losses(recipe)
    assert len(found) == 60
    assert sum(found[25:30]) < 0.8 * sum(found[:5])
    assert sum(found[55:]) < 0.8 * sum(found[30:35])
    assert activation_of(load_model(result.model)) == Activation(name="drelu")
    line = metrics(recipe)[-1]
    assert len(line["zeros_per_layer"]) == 2
    assert 0.5 < line["zeros"] < 1
    evaluations = metrics(recipe, event="evaluation")
    assert [line["tokens"] for line in evaluations] == [0, 3840, 0, 3840]
    assert evaluations[-1]["perplexity_book"] < evaluations[0]["perplexity_book"]
    assert {"perplexity_book", "perplexity_stories", "perplexity_records"} <= set(evaluations[0])
    drawn = json.loads((Path(recipe.output) / "stage1" / "data_drawn.json").read_text(encoding="utf-8"))
    assert sum(source["tokens"] for source in drawn.values()) == 60 * 4 * 32
    drawn = EventAccumulator(str(Path(recipe.output) / "tensorboard" / "stage1"))
    drawn.Reload()
    points = {name: [event.value for event in drawn.Scalars(name)] for name in drawn.Tags()["scalars"]}
    assert points["evaluation/perplexity_book"] == pytest.approx(
        [line["perplexity_book"] for line in evaluations[2:]], rel=1e-5
    )
    assert points["train/zeros_per_layer/1"][-1] == pytest.approx(line["zeros_per_layer"][1], rel=1e-5)
    record = json.loads((Path(recipe.output) / "stage0" / "run.json").read_text(encoding="utf-8"))
    assert all(len(digest) == 64 for digest in record["sources"].values())
    card = ModelCard.load(result.model / "README.md")
    assert card.data.license == "mit"
    assert "drelu" in card.data.tags
    assert f"{2 * 3840:,} tokens" in card.text
    assert f"| {evaluations[-1]['perplexity_book']:.2f} |" in card.text
    assert "| stories | CC0 |" in card.text
    assert "| records | not stated |" in card.text
    assert str(Path(recipe.model).parent) not in card.text
    training = load_model(result.model).config.turbosparse_training
    assert training == {"stage": "stage1", "tokens": 2 * longer["tokens"]}


def test_a_mixture_of_the_second_stage_is_in_another_order(make_recipe: MakeRecipe) -> None:
    shared = make_recipe(DISTILLATION, DISTILLATION)
    own = {"data": dataclasses.asdict(shared.data)}

    def begin(recipe: Recipe, index: int) -> list[list[int]]:
        stage = Stage(recipe, recipe.stages[index], Path(recipe.output), None, None, control=False)
        return [sequence.input_ids for sequence in itertools.islice(stage.mixture, 8)]

    recipe = make_recipe(DISTILLATION, DISTILLATION | own)
    assert begin(recipe, 0) == begin(shared, 0) == begin(shared, 1)
    assert begin(recipe, 1) == begin(recipe, 1) != begin(recipe, 0)


def test_a_stage_with_windows_of_its_own_evaluates_the_original_on_them(make_recipe: MakeRecipe) -> None:
    data = dataclasses.asdict(make_recipe(DISTILLATION).data)
    recipe = make_recipe(DISTILLATION, DISTILLATION | {"data": data | {"sequence_length": 16}})
    run_recipe(recipe)
    originals = metrics(recipe, event="original")
    assert [line["stage"] for line in originals] == ["stage0", "stage1"]
    assert originals[0]["perplexity_book"] != originals[1]["perplexity_book"]


def test_texts_of_one_name_are_all_evaluated(make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("x/train.txt", "y/train.txt", "y/train.jsonl")}
    for path, source in zip(paths.values(), ("stories.txt", "book.txt", "records.jsonl"), strict=True):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(base / source, path)
    sources = [{"path": str(paths[name])} for name in ("x/train.txt", "y/train.jsonl", "y/train.jsonl")]
    data = {
        "sequence_length": 32,
        "held_out_percent": 10.0,
        "sources": [*sources, {"path": str(base / "records.jsonl")}],
        "held_out": [{"path": str(paths["y/train.txt"])}],
    }
    recipe = make_recipe(DISTILLATION, data=data)
    stage = Stage(recipe, recipe.stages[0], Path(recipe.output), None, None, control=False)
    expected = {"y/train.txt", "x/train.txt", "train.jsonl#3", "train.jsonl#4", "records"}
    assert set(stage.evaluation) == expected


def test_the_initial_fit_loses_less(make_recipe: MakeRecipe) -> None:
    plain, fitted = (
        make_recipe(DISTILLATION),
        make_recipe(DISTILLATION, output="fit", initial_fit_tokens=2048),
    )
    for recipe in (plain, fitted):
        run_recipe(recipe)
    before = [metrics(recipe, event="evaluation")[0]["perplexity_book"] for recipe in (plain, fitted)]
    assert before[1] < before[0]
    assert losses(fitted)[0] < 0.9 * losses(plain)[0]


def test_embeddings_stay_when_told(make_recipe: MakeRecipe, base: Path) -> None:
    result = run_recipe(make_recipe(DISTILLATION | {"trainable": "all_but_embeddings"}))
    before, after = weights(base / "model"), weights(result.model)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(
        before["model.layers.0.self_attn.q_proj.weight"], after["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.parametrize(
    ("stage", "model"),
    [
        pytest.param(REGRESSION, {}, id="regression"),
        pytest.param(DISTILLATION, {}, id="distillation"),
        pytest.param(DISTILLATION, {"tie_word_embeddings": True}, id="tied"),
        pytest.param(REGRESSION, {"model_type": "mixtral"}, id="mixtral-regression"),
        pytest.param(BALANCED, {"model_type": "mixtral", "tie_word_embeddings": True}, id="mixtral-tied"),
        pytest.param(BALANCED, {"model_type": "qwen2_moe"}, id="qwen2_moe"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stage: dict[str, Any],
    model: dict[str, Any],
) -> None:
    make_hf_model(**model).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    schedule = {"warmup_tokens": 256, "decay_tokens": 384, "average_tokens": 256}
    whole, broken = (
        make_recipe(stage | schedule, model=str(tmp_path / "model"), output=name)
        for name in ("whole", "broken")
    )
    run_recipe(whole)
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        result = run_recipe(broken)
    assert not result.finished
    assert checkpoint_steps(Path(broken.output) / "stage0") == [3]
    assert len(losses(broken)) == 3
    with (Path(broken.output) / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"stage": "stage0", "step": 4, "loss": 9.0}\n{"stage": "sta')  # what a crash leaves
    assert signal.getsignal(signal.SIGTERM) == handler
    assert run_recipe(broken).finished
    assert losses(broken) == losses(whole)
    parts = [
        [{name: line[name] for name in line if name.startswith("loss_")} for line in metrics(recipe)]
        for recipe in (broken, whole)
    ]
    assert parts[0] == parts[1]
    rates = [[line["learning_rate"] for line in metrics(recipe)] for recipe in (broken, whole)]
    assert rates[0] == rates[1]
    one, two = (weights(Path(recipe.output) / "stage0" / "model") for recipe in (whole, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_stages_with_other_data_are_all_in_the_card(make_recipe: MakeRecipe) -> None:
    """The second stage's texts are compared with the original too, and no source is forgotten."""
    base = make_recipe(DISTILLATION)
    (first, second), (book,) = base.data.sources, base.data.held_out
    own = {"sequence_length": 32, "held_out_percent": 10.0, "shuffle_documents": 10}
    data = [
        own | {"sources": [{"path": first.path}], "held_out": [{"path": book.path}]},
        own | {"sources": [{"path": first.path}, {"path": second.path}], "held_out": [{"path": book.path}]},
    ]
    recipe = make_recipe(*(DISTILLATION | {"data": each} for each in data))
    card = (run_recipe(recipe).model / "README.md").read_text(encoding="utf-8")
    originals = [set(line) - {"stage", "step", "time", "event"} for line in metrics(recipe, event="original")]
    assert originals == [
        {"perplexity_book", "perplexity_stories"},
        {"perplexity_book", "perplexity_stories", "perplexity_records"},
    ]
    quality, drawn = card.split("## Data")
    assert " - " not in quality  # where the original is unknown
    files = [Path(recipe.output) / name / "data_drawn.json" for name in ("stage0", "stage1")]
    counts = [json.loads(file.read_text(encoding="utf-8"))[first.path]["tokens"] for file in files]
    assert f"| {sum(counts):,} |" in drawn
    assert "| records |" in drawn


def test_a_finished_run_is_not_run_again(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(REGRESSION)
    run_recipe(recipe)
    before = (Path(recipe.output) / "metrics.jsonl").read_bytes()
    assert run_recipe(recipe).finished
    assert (Path(recipe.output) / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_of_another_kind_is_refused(
    make_recipe: MakeRecipe, tmp_path: Path, base: Path
) -> None:
    recipe = make_recipe(DISTILLATION)
    run_recipe(recipe)
    data = {"sequence_length": 32, "sources": [{"path": str(base / "stories.txt")}]}
    others = [
        (make_recipe(DISTILLATION, activation="relu2"), "activation relu2, got drelu"),
        (make_recipe(DISTILLATION, model=str(tmp_path)), "model .*, got .*/model"),
        (make_recipe(DISTILLATION, data=data), "data .*, got .*records"),
        (make_recipe(DISTILLATION | {"tokens": 256}), "tokens 256, got 768"),
    ]
    for other, message in others:
        with pytest.raises(TrainingError, match=f"expected a finished stage with {message}"):
            run_recipe(other)
    with pytest.raises(TrainingError, match="expected a finished stage with control True, got False"):
        run_recipe(recipe, control=True)
    directory = Path(recipe.output) / "stage0"
    (directory / "run.json").unlink()  # as where the model was put there by hand
    assert run_recipe(others[0][0]).finished


def test_a_finished_run_is_made_longer(make_recipe: MakeRecipe) -> None:
    run_recipe(make_recipe(DISTILLATION))
    longer = make_recipe(DISTILLATION | {"tokens": 32 * 4 * 8})
    assert run_recipe(longer).finished
    assert [line["step"] for line in metrics(longer)] == list(range(1, 9))
    assert sorted(path.name for path in (Path(longer.output) / "stage0").glob("model*")) == [
        "model",
        "model-6",
    ]
    run_recipe(make_recipe(DISTILLATION | {"tokens": 32 * 4 * 8}, DISTILLATION))
    with pytest.raises(TrainingError, match="expected as many as before, since stage stage1 began"):
        run_recipe(make_recipe(DISTILLATION | {"tokens": 32 * 4 * 10}, DISTILLATION))


def test_a_decayed_copy_from_a_checkpoint(make_recipe: MakeRecipe) -> None:
    stable = make_recipe(DISTILLATION, output="stable")
    run_recipe(stable)
    checkpoint = latest_checkpoint(Path(stable.output) / "stage0")
    longer = DISTILLATION | {"tokens": 32 * 4 * 9, "decay_tokens": 32 * 4 * 3}
    decayed = make_recipe(longer, output="decayed")
    assert run_recipe(decayed, from_checkpoint=checkpoint).finished
    lines = metrics(decayed)
    assert [line["step"] for line in lines] == [7, 8, 9]
    assert lines[-1]["learning_rate"] < lines[0]["learning_rate"]
    assert len(metrics(decayed, event="original")) == 1  # what the copy is compared with


def test_a_checkpoint_at_the_end_is_not_trained_further(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(DISTILLATION | {"average_tokens": 256})
    model = run_recipe(recipe).model
    before, lines = weights(model), metrics(recipe)
    model.rename(model.with_name("lost"))  # as after a crash between the last checkpoint and the model
    assert run_recipe(recipe).finished
    assert metrics(recipe) == lines
    assert len(metrics(recipe, event="evaluation")) == 2
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    shorter = make_recipe(DISTILLATION | {"tokens": 32 * 4 * 4, "average_tokens": 256}, output="shorter")
    found = weights(run_recipe(shorter, from_checkpoint=model.parent / "checkpoint-6").model)
    assert all(torch.equal(value, before[name]) for name, value in found.items())
    assert [line["step"] for line in metrics(shorter, event="evaluation")] == [6]


def test_the_recipe_decides_the_learning_rate_of_a_resumed_run(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        run_recipe(make_recipe(DISTILLATION))
    recipe = make_recipe(DISTILLATION | {"learning_rate": 1e-4, "beta2": 0.99})
    run_recipe(recipe)
    assert [line["learning_rate"] for line in metrics(recipe)] == [3e-3] * 2 + [1e-4] * 4


def test_checkpoints_by_time_and_only_the_last_are_kept(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(REGRESSION, checkpoint_minutes=1e-9, keep_checkpoints=2)
    run_recipe(recipe)
    assert checkpoint_steps(Path(recipe.output) / "stage0") == [5, 6]


def test_evaluations_do_not_depend_on_stops(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(REGRESSION, evaluate_tokens=32 * 4 * 2)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        run_recipe(recipe)
    run_recipe(recipe)
    assert [line["step"] for line in metrics(recipe, event="evaluation")] == [0, 2, 4, 6]


def test_control_trains_the_original_activation_on_the_same_tokens(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(REGRESSION, DISTILLATION, output="control")
    result = run_recipe(recipe, control=True)
    assert activation_of(load_model(result.model)) == Activation(name="silu")
    sparse = make_recipe(REGRESSION, DISTILLATION, output="sparse")
    run_recipe(sparse)
    drawn = [
        json.loads((Path(each.output) / "stage1" / "data_drawn.json").read_text(encoding="utf-8"))
        for each in (recipe, sparse)
    ]
    assert drawn[0] == drawn[1]
    assert "loss_next_token" in metrics(recipe)[0]


def test_control_trains_the_same_weights(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(
        DISTILLATION | {"trainable": "all_but_embeddings"}, REGRESSION | {"trainable": "ffn"}
    )
    stages = control_recipe(recipe).stages
    assert [stage.trainable for stage in stages] == ["all_but_embeddings", "all"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        patch.setattr(run_module, "control_recipe", lambda recipe: _all_trained(control_recipe(recipe)))
        run_recipe(recipe, control=True)
    file = Path(recipe.output) / "stage0" / "checkpoint-2" / "turbosparse_run.json"
    identity = json.loads(file.read_text(encoding="utf-8"))
    assert identity.pop("trainable") == "all"
    file.write_text(json.dumps(identity), encoding="utf-8")  # as earlier versions wrote it
    assert run_recipe(recipe, control=True).finished


def _all_trained(recipe: Recipe) -> Recipe:
    stages = tuple(dataclasses.replace(stage, trainable="all") for stage in recipe.stages)
    return dataclasses.replace(recipe, stages=stages)


def test_all_losses_together(make_recipe: MakeRecipe) -> None:
    stage = {
        "loss": {
            "next_token": 0.5,
            "logits": 1.0,
            "ffn_output": 0.1,
            "hidden_states": 0.1,
            "activation_l1": 0.01,
        },
        "l1_ramp_tokens": 512,
        "blend_tokens": 512,
        "threshold_tokens": 512,
        "top_k": 10,
        "temperature": 2.0,
        "gradient_checkpointing": True,
    }
    recipe = make_recipe(stage, activation="drelu:0.05")
    run_recipe(recipe)
    lines = metrics(recipe)
    for line in lines:
        done = line["tokens"] - 128
        ramped = 0.5 * (1 - math.cos(math.pi * min(done / 512, 1)))
        total = 0.5 * line["loss_next_token"] + line["loss_logits"] + 0.1 * line["loss_ffn_output"]
        total += 0.1 * line["loss_hidden_states"] + 0.01 * ramped * line["loss_activation_l1"]
        assert line["loss"] == pytest.approx(total, rel=1e-4)
        assert line["perplexity"] == pytest.approx(math.exp(line["loss_next_token"]), rel=1e-6)
    assert lines[-1]["zeros"] > lines[0]["zeros"]


def test_what_is_evaluated_is_as_far_as_the_training(make_recipe: MakeRecipe) -> None:
    tokens = 32 * 4 * 6 + 100  # rounded down to six steps
    recipe = make_recipe(DISTILLATION | {"tokens": tokens, "blend_tokens": tokens})
    model = run_recipe(recipe).model
    first, last = metrics(recipe, event="evaluation")
    (original,) = metrics(recipe, event="original")
    assert first["perplexity_book"] == pytest.approx(original["perplexity_book"], rel=1e-3)
    rows = Stage(recipe, recipe.stages[0], model.parent, None, None, control=False).evaluation["book"]
    assert last["perplexity_book"] == pytest.approx(math.exp(mean_loss(load_model(model), rows)), rel=1e-3)


def test_distillation_alone_shows_perplexity(make_recipe: MakeRecipe) -> None:
    distilled = make_recipe(DISTILLATION | {"tokens": 32 * 4})
    both = make_recipe({"loss": {"logits": 1.0, "next_token": 1.0}, "tokens": 32 * 4}, output="both")
    for recipe in (distilled, both):
        run_recipe(recipe)
    (line,), (expected,) = metrics(distilled), metrics(both)
    assert line["loss"] == pytest.approx(line["loss_logits"], rel=1e-6)
    assert line["loss_next_token"] == pytest.approx(expected["loss_next_token"], rel=0.1)  # of 16 positions
    assert line["perplexity"] == pytest.approx(math.exp(line["loss_next_token"]), rel=1e-6)


def test_micro_batches_do_not_change_the_losses(make_recipe: MakeRecipe) -> None:
    results = []
    for micro_batch in (1, 4):
        stage = {"loss": {"next_token": 1.0, "ffn_output": 0.1}, "micro_batch": micro_batch}
        recipe = make_recipe(stage, output=f"micro{micro_batch}")
        run_recipe(recipe)
        results.append(losses(recipe))
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "phi3"])
def test_experts_and_fused_projections_learn(
    make_recipe: MakeRecipe, tmp_path: Path, model_type: str
) -> None:
    make_hf_model(model_type).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    longer = {"tokens": 32 * 4 * 15}
    recipe = make_recipe(REGRESSION | longer, DISTILLATION | longer, model=str(tmp_path / "model"))
    result = run_recipe(recipe)
    found = losses(recipe)
    assert sum(found[10:15]) < sum(found[:5])
    assert sum(found[25:]) < sum(found[15:20])
    assert activation_of(load_model(result.model)) == Activation(name="drelu")


def test_l1_of_experts_without_tokens(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    make_hf_model("mixtral", num_local_experts=16).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    data = dataclasses.asdict(make_recipe(DISTILLATION).data) | {"sequence_length": 8}
    stage = {"loss": {"next_token": 1.0, "activation_l1": 0.01}, "tokens": 64, "micro_batch": 1}
    recipe = make_recipe(stage, model=str(tmp_path / "model"), data=data)
    run_recipe(recipe)
    assert all(0 < line["loss_activation_l1"] < 100 for line in metrics(recipe))


def test_mixed_precision_stays_near_full_precision(make_recipe: MakeRecipe) -> None:
    stages = (REGRESSION, DISTILLATION)
    results = []
    for precision in ("fp32", "bf16"):
        recipe = make_recipe(*stages, precision=precision, output=precision)
        run_recipe(recipe)
        results.append(losses(recipe))
    assert results[1] == pytest.approx(results[0], rel=0.1)
    assert results[1] != results[0]


def test_chats_learn_their_answers_alone(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    chats = [
        [{"role": "user", "content": f"{i} and {i}?" * 6}, {"role": "assistant", "content": "yes " * (i % 5)}]
        for i in range(60)
    ]
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats), encoding="utf-8")
    data = {"sequence_length": 32, "sources": [{"path": str(path), "field": "messages"}]}
    stage = {"loss": {"next_token": 1.0}, "answers_only": True, "data": data, "micro_batch": 1}
    recipe = make_recipe(stage | {"tokens": 32 * 4 * 25})
    run_recipe(recipe)  # some micro-batches have nothing to learn
    assert losses(recipe)[-1] < 0.5 * losses(recipe)[0]


def test_text_without_answers_is_told(
    make_recipe: MakeRecipe, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    chats = [[{"role": "user", "content": f"{i} and {i}?" * 6}] for i in range(60)]
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats), encoding="utf-8")
    data = {"sequence_length": 32, "sources": [{"path": str(path), "field": "messages"}]}
    recipe = make_recipe({"loss": {"next_token": 1.0}, "answers_only": True, "data": data})
    run_recipe(recipe)
    told = [record.getMessage() for record in caplog.records if "no token to learn" in record.getMessage()]
    assert told == ["[stage0] step 1 has no token to learn: with answers_only it needs chats with answers"]


def test_from_scratch(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        {"loss": {"next_token": 1.0}, "tokens": 32 * 4 * 20}, from_scratch=True, activation="relu2"
    )
    result = run_recipe(recipe)
    assert losses(recipe)[-1] < losses(recipe)[0]
    assert load_model(result.model).config.hidden_act == "relu2"
    with pytest.raises(ConfigError, match=r"\[from_scratch\] expected next_token"):
        run_recipe(make_recipe(DISTILLATION, from_scratch=True, output="other"))


def test_a_loss_that_is_not_finite_stops_the_run(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(DISTILLATION, checkpoint_minutes=1e-9)
    calls = iter(range(100))
    original = logit_divergence

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(*args, **kwargs)
        return loss * (math.nan if next(calls) >= 5 else 1.0)  # two micro-batches per step

    monkeypatch.setattr(trainer_module, "logit_divergence", counted)
    with pytest.raises(TrainingError, match=r"expected a finite loss, got nan at step 3"):
        run_recipe(recipe)
    assert checkpoint_steps(Path(recipe.output) / "stage0") == [1, 2]


@pytest.mark.parametrize("steps", [1, 4])
def test_diverged_weights_are_not_saved(make_recipe: MakeRecipe, steps: int) -> None:
    recipe = make_recipe(
        DISTILLATION | {"learning_rate": 1e30, "tokens": steps * 128},
        checkpoint_minutes=1e-9,
        keep_checkpoints=1,
    )
    with pytest.raises(TrainingError, match=r"expected a finite .* at step 1; there is no checkpoint"):
        run_recipe(recipe)
    assert not checkpoint_steps(Path(recipe.output) / "stage0")
    assert not (Path(recipe.output) / "stage0" / "model").exists()


def test_a_gradient_that_is_not_finite_stops_the_run(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = logit_divergence

    def steep(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(*args, **kwargs)
        return loss + (loss - loss.detach()).sqrt()  # + 0 with an infinite slope

    monkeypatch.setattr(trainer_module, "logit_divergence", steep)
    with pytest.raises(TrainingError, match=r"expected a finite gradient norm, got (nan|inf) at step 1"):
        run_recipe(make_recipe(DISTILLATION))


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_a_model_without_gated_ffn_is_refused_before_text_is_read(
    make_recipe: MakeRecipe, tmp_path: Path, model_type: str
) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "model")
    data = {"sources": [{"path": "nowhere.txt", "format": "text"}]}
    recipe = make_recipe(DISTILLATION, model=str(tmp_path / "model"), data=data)
    with pytest.raises(ConfigError, match=rf"expected a model .*, got '{model_type}'"):
        run_recipe(recipe)
    with pytest.raises(
        ConfigError, match=rf"\[{model_type}\] expected a model whose .* hidden_act, got one without"
    ):
        run_recipe(recipe, control=True)


def test_a_swapped_model_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    swap_activation(make_hf_model(), Activation(name="drelu")).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    recipe = make_recipe(DISTILLATION, model=str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="expected a model that is not swapped yet, got drelu"):
        run_recipe(recipe)
    assert run_recipe(recipe, control=True).finished


def test_a_full_disk_leaves_the_checkpoints_before(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(REGRESSION, checkpoint_minutes=1e-9)
    calls = iter(range(100))
    original = torch.save

    def save(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "optimizer" in str(file) and next(calls) >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(TrainingError, match=r"expected to write checkpoint-3, got .*No space left"):
        run_recipe(recipe)
    directory = Path(recipe.output) / "stage0"
    assert checkpoint_steps(directory) == [1, 2]
    assert not (directory / ".incomplete").exists()


def test_a_full_disk_at_the_end(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(REGRESSION)

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "save_model", full)
        with pytest.raises(TrainingError, match=r"expected to write checkpoint-6, got I/O error: No space"):
            run_recipe(recipe)
    original = StageTrainer.save_model

    def last_full(self: StageTrainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        original(self, output_dir, _internal_call) if _internal_call else full()

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "save_model", last_full)
        with pytest.raises(TrainingError, match=r"model\] expected to write model, got I/O error: No space"):
            run_recipe(recipe)
    assert not (Path(recipe.output) / "stage0" / ".model").exists()
    assert run_recipe(recipe).finished


def test_a_full_disk_while_metrics_are_written(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(DISTILLATION)
    path = Path(recipe.output) / "metrics.jsonl"
    original = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self == path and mode == "a" and len(losses(recipe)) == 2:
            with original(self, "a", encoding="utf-8") as file:
                file.write('{"stage": "stage0", "st')
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, mode, *args, **kwargs)

    path.parent.mkdir()
    path.write_text("", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(
            TrainingError, match=r"metrics\.jsonl\] expected room for the metrics, got .*No space"
        ):
            run_recipe(recipe)
    assert checkpoint_steps(Path(recipe.output) / "stage0") == [4]
    assert run_recipe(recipe).finished
    assert [line["step"] for line in metrics(recipe)] == [1, 2, 5, 6]


def test_a_crash_before_the_first_checkpoint(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(DISTILLATION)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "learning_rate_factor", lambda step, **_: 1 / (3 - step))
        with pytest.raises(ZeroDivisionError):
            run_recipe(recipe)
    with (Path(recipe.output) / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"stage": "stage0", "st')
    assert run_recipe(recipe).finished
    assert [line["step"] for line in metrics(recipe)] == [1, 2, 3, 4, 5, 6]
    assert len(metrics(recipe, event="original")) == 1
    assert [line["step"] for line in metrics(recipe, event="evaluation")] == [0, 6]


def test_a_checkpoint_of_another_model_is_refused(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        run_recipe(make_recipe(DISTILLATION))
    with pytest.raises(TrainingError, match="expected a checkpoint with activation relu2, got drelu"):
        run_recipe(make_recipe(DISTILLATION, activation="relu2"))


@pytest.fixture
def stopped(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of step 2."""
    recipe = make_recipe(DISTILLATION | {"average_tokens": 256})
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        run_recipe(recipe)
    return Path(recipe.output) / "stage0" / "checkpoint-2"


def test_a_checkpoint_of_an_earlier_version_is_accepted(make_recipe: MakeRecipe, stopped: Path) -> None:
    file = stopped / "turbosparse_run.json"
    identity = json.loads(file.read_text(encoding="utf-8"))
    assert set(identity) > {"stage", "activation", "fsdp", "parameters"}
    earlier = {name: identity[name] for name in ("stage", "activation", "fsdp", "parameters")}
    file.write_text(json.dumps(earlier), encoding="utf-8")
    assert run_recipe(make_recipe(DISTILLATION | {"average_tokens": 256})).finished


def test_a_checkpoint_of_other_settings_is_refused(
    make_recipe: MakeRecipe, stopped: Path, tmp_path: Path
) -> None:
    other = make_hf_model()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    data = dataclasses.asdict(make_recipe(DISTILLATION).data) | {"sequence_length": 16}
    changed = [
        (make_recipe(DISTILLATION, model=str(tmp_path / "other")), "expected a checkpoint with base_model"),
        (make_recipe(DISTILLATION | {"batch_sequences": 2}), "with batch_sequences 2, got 4"),
        (make_recipe(DISTILLATION, data=data), "with sequence_length 16, got 32"),
        (make_recipe(DISTILLATION | {"trainable": "ffn"}), "with trainable ffn, got all"),
    ]
    for recipe, message in changed:
        with pytest.raises(TrainingError, match=message):
            run_recipe(recipe)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "rng_state.pth",
        "average/.metadata",
        "data_state.json",
    ],
)
def test_a_damaged_checkpoint_is_one_line(make_recipe: MakeRecipe, stopped: Path, name: str) -> None:
    recipe = make_recipe(DISTILLATION | {"average_tokens": 256})
    content = (stopped / name).read_bytes()
    (stopped / name).write_bytes(content[: len(content) // 2])
    with pytest.raises((TrainingError, DataError), match=r"checkpoint-2.*\] expected"):
        run_recipe(recipe)
    if name != "rng_state.pth":  # without one, the random numbers are others
        (stopped / name).unlink()
        with pytest.raises((TrainingError, DataError), match=r"checkpoint-2.*\] expected"):
            run_recipe(recipe)


def test_a_checkpoint_of_other_tensors_is_refused(make_recipe: MakeRecipe, stopped: Path) -> None:
    recipe = make_recipe(DISTILLATION | {"average_tokens": 256})
    file = stopped / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.layers.0.mlp.gate.weight": torch.zeros(4, 32)}, file, {"format": "pt"})
    with pytest.raises(
        TrainingError, match=r"checkpoint-2\] expected .*, got: 1 unexpected tensors, such as"
    ):
        run_recipe(recipe)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        TrainingError, match=r"got: 1 missing tensors, such as model\.layers\.1\.mlp\.up_proj"
    ):
        run_recipe(recipe)


def test_a_process_with_many_gpus_trains_on_one(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, recipe = make_recipe(DISTILLATION, output="one"), make_recipe(DISTILLATION)
    run_recipe(whole)
    original = TrainingArguments.__post_init__

    def see_two(self: Any) -> None:
        original(self)
        self._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", see_two)
    run_recipe(recipe)
    assert losses(recipe) == losses(whole)
    (told,) = [record.getMessage() for record in caplog.records if "torchrun" in record.getMessage()]
    assert told == "[stage0] trains on one of 2 GPUs; start it with torchrun --nproc_per_node 2 to use all"


def test_batches_that_do_not_divide(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match=r"expected a multiple of micro_batch \* processes = 3 \* 1, got 4"):
        run_recipe(make_recipe(DISTILLATION | {"micro_batch": 3}))


def test_sources_that_all_run_dry(make_recipe: MakeRecipe, base: Path) -> None:
    data = {"sequence_length": 32, "sources": [{"path": str(base / "book.txt"), "on_end": "stop"}]}
    recipe = make_recipe(DISTILLATION | {"tokens": 32 * 4 * 50}, data=data)
    with pytest.raises(DataError, match="expected text for the whole stage, got the end"):
        run_recipe(recipe)


@pytest.mark.parametrize("on_end", ["stop", "error"])
def test_text_for_exactly_the_stages_is_enough(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_end: str
) -> None:
    path = tmp_path / "exact.jsonl"  # 12 documents of one sequence each, with the token that ends them
    path.write_text("".join(json.dumps({"text": f"{i:031}"}) + "\n" for i in range(12)), encoding="utf-8")
    source = {"path": str(path), "on_end": on_end}
    data = {"sequence_length": 32, "held_out_percent": 0.0, "sources": [source]}
    stage = {"loss": {"next_token": 1.0}, "tokens": 32 * 4 * 2}
    recipe = make_recipe(stage, stage | {"tokens": 32 * 4}, data=data)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert not run_recipe(recipe).finished
    assert run_recipe(recipe).finished
    assert [line["step"] for line in metrics(recipe)] == [1, 2, 1]
    more = make_recipe(stage, stage | {"tokens": 32 * 4 * 2}, data=data)
    with pytest.raises(DataError, match="got the end"):
        run_recipe(more)


def test_wrong_starts_are_one_line(make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"top_k\] expected at most the vocabulary's 260 tokens, got 261"):
        run_recipe(make_recipe(DISTILLATION | {"top_k": 261}))
    data = {"sequence_length": 4096, "sources": [{"path": str(base / "book.txt"), "on_end": "stop"}]}
    with pytest.raises(DataError, match="expected text for the initial fit, got less than one sequence"):
        run_recipe(make_recipe(DISTILLATION, data=data, initial_fit_tokens=4096))
    broken = make_hf_model()
    with torch.no_grad():
        broken.model.embed_tokens.weight.fill_(math.nan)
    broken.save_pretrained(tmp_path / "model")
    recipe = make_recipe(DISTILLATION, model=str(tmp_path / "model"), initial_fit_tokens=64)
    with pytest.raises(TokenizerError, match="expected a model with a tokenizer, got: "):
        run_recipe(recipe)
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelFileError, match="expected a model whose FFNs return numbers, got NaN"):
        run_recipe(recipe)
    weights_file = tmp_path / "model" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(ModelFileError, match="expected a whole causal language model, got: "):
        run_recipe(recipe)


def test_a_missing_source(make_recipe: MakeRecipe) -> None:
    data = {"sources": [{"path": "nowhere.txt", "format": "text"}]}
    with pytest.raises(DataError, match=r"\[nowhere\.txt\] expected a file"):
        run_recipe(make_recipe(DISTILLATION, data=data))
