"""Runs that start from a shape: configuration and tokenizer are made once, weights from the seed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sparsify.test_run import interrupt_at, losses
from tests.tiny_hf import make_texts
from turbosparse.errors import ConfigError
from turbosparse.models.registry import activation_of, load_model
from turbosparse.sparsify.fresh_model import start_fresh, write_once
from turbosparse.sparsify.recipe import Recipe, recipe_from_dict
from turbosparse.sparsify.run import run_recipe

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "context_length": 64,
}


def recipe(folder: Path, activation: str = "drelu", **changes: Any) -> Recipe:
    fresh = changes.pop("fresh", {})
    return recipe_from_dict(
        {
            "output": str(folder / "run"),
            "activation": activation,
            "fresh": SHAPE | fresh,
            "precision": "fp32",
            "threads": 1,
            "evaluation_sequences": 1,
            "data": {"sequence_length": 32, "sources": [{"path": str(make_texts(folder)["text"])}]},
            "stages": [
                {
                    "name": "short",
                    "tokens": 256,
                    "loss": {"next_token": 1.0},
                    "learning_rate": 1e-3,
                    "batch_sequences": 4,
                    "micro_batch": 4,
                }
            ],
            **changes,
        }
    )


def test_a_run_starts_from_a_shape_and_leaves_a_model(tmp_path: Path) -> None:
    folder = run_recipe(recipe(tmp_path)).model
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert (
        "# run\n\nA model with drelu in its feed-forward layers, trained from random weights on 256" in card
    )
    assert "base_model" not in card
    model = load_model(folder)
    assert str(activation_of(model)) == "drelu"
    assert model.config.num_key_value_heads == 2
    assert model.config.vocab_size == len(
        json.loads((tmp_path / "run/start/tokenizer.json").read_text())["model"]["vocab"]
    )
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_experts_make_a_mixtral(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    model = load_model(run_recipe(recipe(tmp_path, fresh=experts)).model)
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (4, 2)
    assert str(activation_of(model)) == "drelu"
    with pytest.raises(ConfigError, match=r"\[fresh.num_experts_per_tok\] expected 1 to 4, got 5"):
        recipe(tmp_path, fresh=experts | {"num_experts_per_tok": 5})
    with pytest.raises(ConfigError, match=r"\[fresh.gated\] expected gated experts, got plain ones"):
        recipe(tmp_path, fresh=experts | {"gated": False})


def test_fresh_experts_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {"num_experts": 4}
    whole = recipe(tmp_path, fresh=experts, output=str(tmp_path / "whole"))
    run_recipe(whole)
    broken = recipe(tmp_path, fresh=experts)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert not run_recipe(broken).finished
    run_recipe(broken)
    assert losses(broken) == losses(whole)


def test_a_plain_ffn_has_an_activation_of_its_own(tmp_path: Path) -> None:
    plain = start_fresh(recipe(tmp_path, "relu2", fresh={"gated": False}))
    config = json.loads((Path(plain.model) / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["hidden_act"]) == ("arcee", "relu2")
    assert (plain.from_scratch, plain.fresh) == (True, None)
    with pytest.raises(ConfigError, match=r"\[fresh.gated\] expected a gated FFN for drelu, got a plain one"):
        start_fresh(recipe(tmp_path, "drelu", fresh={"gated": False}, output=str(tmp_path / "other")))


def test_a_start_is_written_once(tmp_path: Path) -> None:
    first = start_fresh(recipe(tmp_path))
    written = (Path(first.model) / "tokenizer.json").stat().st_mtime_ns
    assert start_fresh(recipe(tmp_path)) == first
    assert (Path(first.model) / "tokenizer.json").stat().st_mtime_ns == written


def test_a_start_of_other_settings_is_refused(tmp_path: Path) -> None:
    made = start_fresh(recipe(tmp_path))
    with pytest.raises(
        ConfigError, match=r"\[fresh.hidden_size\] expected 32, with which .*start .*, got 64"
    ):
        start_fresh(recipe(tmp_path, fresh={"hidden_size": 64}))
    with pytest.raises(
        ConfigError, match=r"\[fresh.tokenizer\] expected '', with which .*, got 'some/other'"
    ):
        start_fresh(recipe(tmp_path, fresh={"tokenizer": "some/other"}))
    (Path(made.model) / "turbosparse_start.json").unlink()  # as earlier versions left it
    assert start_fresh(recipe(tmp_path, fresh={"hidden_size": 64})).model == made.model


def test_a_run_moves_together_with_its_tokenizer(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    tokenizer = Path(start_fresh(recipe(first, output=str(first / "other"))).model)
    start_fresh(recipe(first, fresh={"tokenizer": str(tokenizer)}))
    first.rename(second)
    moved = second / tokenizer.relative_to(first)
    start_fresh(recipe(second, fresh={"tokenizer": str(moved)}))
    with pytest.raises(ConfigError, match=r"\[fresh.tokenizer\] expected '../other/start', with which"):
        start_fresh(recipe(second, fresh={"tokenizer": str(second)}))


def test_what_a_killed_process_left_does_not_hinder(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    (tmp_path / f".shared-{os.getpid()}").mkdir()  # of another container, or of one that was killed
    write_once(folder, lambda staging: (staging / "file").write_text("whole", encoding="utf-8"))
    assert (folder / "file").read_text(encoding="utf-8") == "whole"
    (tmp_path / "ordinary").mkdir()
    assert folder.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_who_comes_second_keeps_what_the_first_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "shared"

    def write_while_another_does(staging: Path) -> None:
        (staging / "file").write_text("second", encoding="utf-8")
        folder.mkdir()
        (folder / "file").write_text("first", encoding="utf-8")

    write_once(folder, write_while_another_does)
    assert (folder / "file").read_text(encoding="utf-8") == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "some/model"}, r"\[model\] expected none beside \[fresh\]"),
        ({"fresh": {"num_key_value_heads": 3}}, r"\[fresh.num_key_value_heads\] expected a divisor of 4"),
        ({"fresh": {"num_hidden_layers": 0}}, r"\[fresh.num_hidden_layers\] expected at least 1, got 0"),
        ({"fresh": {"context_length": 16}}, r"\[fresh.context_length\] expected at least 32, got 16"),
    ],
)
def test_wrong_shapes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start_fresh(recipe(tmp_path, **changes))
