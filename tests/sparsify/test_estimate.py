"""What a run will need, and what is refused before it starts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.sparsify.conftest import MakeRecipe
from tests.tiny_hf import make_texts, make_tokenizer
from turbosparse.errors import ConfigError, DataError
from turbosparse.sparsify.estimate import check_data, estimate_run
from turbosparse.sparsify.recipe import Recipe
from turbosparse.sparsify.run import run_recipe

NEXT_TOKEN: dict[str, Any] = {"loss": {"next_token": 1.0}}


def memory(recipe: Recipe, processes: int = 1) -> int:
    (stage,) = estimate_run(recipe, flops=1e9, processes=processes)
    return round(stage.memory_gb * 1e9)


@pytest.fixture
def parameters(base: Path) -> int:
    from turbosparse.models.registry import load_model

    return sum(parameter.numel() for parameter in load_model(base / "model").parameters())


def test_memory(make_recipe: MakeRecipe, parameters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbosparse.sparsify.estimate.has_bf16", lambda: True)
    fp32 = memory(make_recipe(NEXT_TOKEN))
    logits = 3 * 2 * 32 * 260  # tensors, sequences, tokens, vocabulary
    assert fp32 == 16 * parameters + 4 * logits
    assert memory(make_recipe(NEXT_TOKEN, precision="bf16")) == 16 * parameters + 2 * logits
    assert memory(make_recipe({**NEXT_TOKEN, "average_tokens": 128})) == fp32 + 4 * parameters
    assert memory(make_recipe({"loss": {"logits": 1.0}})) == fp32 + 4 * parameters
    fixed = {**NEXT_TOKEN, "trainable": "all_but_embeddings"}
    assert memory(make_recipe(fixed)) == fp32 - 12 * 2 * 260 * 32


def test_what_is_whole_on_each_device_before_it_is_sharded(make_recipe: MakeRecipe, parameters: int) -> None:
    logits = 4 * 3 * 1 * 32 * 260
    settings: dict[str, Any] = {"fsdp": True}
    stage = {**NEXT_TOKEN, "micro_batch": 1, "batch_sequences": 8}
    assert memory(make_recipe(stage, **settings), 8) == 2 * parameters + logits
    assert memory(make_recipe(stage, **settings, initial_fit_tokens=64), 8) == 4 * parameters + logits
    taught = stage | {"loss": {"logits": 1.0}}  # the original is cut layer by layer
    assert memory(make_recipe(taught, **settings), 8) == 20 * parameters // 8 + logits


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ({**NEXT_TOKEN, "micro_batch": 3}, {}, r"stage0.batch_sequences\] expected a multiple of .* 3 \* 1"),
        ({"loss": {"logits": 1.0}}, {"from_scratch": True}, r"\[from_scratch\] expected next_token"),
    ],
)
def test_what_does_not_fit(
    stage: dict[str, Any], changes: dict[str, Any], message: str, make_recipe: MakeRecipe
) -> None:
    with pytest.raises(ConfigError, match=message):
        estimate_run(make_recipe(stage, **changes), flops=1e9)


def test_a_model_that_cannot_be_swapped(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=260).save_pretrained(tmp_path / "gpt2")
    recipe = make_recipe(NEXT_TOKEN, model=str(tmp_path / "gpt2"))
    with pytest.raises(ConfigError, match=r"\[swap\] expected a model with gated FFNs .* got 'gpt2'"):
        estimate_run(recipe, flops=1e9)


def test_chats_without_a_template_are_told_before_any_stage(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base / "model", tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    texts = make_texts(tmp_path)
    chat = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "a hat"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n", encoding="utf-8")
    text, chats = {"path": str(texts["text"])}, {"path": str(tmp_path / "chats.jsonl"), "field": "messages"}
    for data in ({"sources": [chats]}, {"sources": [text], "held_out": [chats]}):
        last = {**NEXT_TOKEN, "data": {"sequence_length": 32, "held_out_percent": 0.0, **data}}
        recipe = make_recipe(NEXT_TOKEN, last, model=str(tmp_path / "model"))
        with pytest.raises(DataError, match="expected a tokenizer with a chat template"):
            run_recipe(recipe)
        assert list(Path(recipe.output).iterdir()) == []
        check_data(recipe, recipe.stages[:1])  # what is finished need not be there any more
    refused = "{{ raise_exception('no') }}"
    tokenizer.chat_template = refused
    tokenizer.save_pretrained(tmp_path / "model")
    check_data(recipe)  # the held-out chat is skipped when it is its turn


def test_a_missing_source(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    make_texts(tmp_path)
    source = {"path": str(tmp_path / "stories.txt")}
    stage = {**NEXT_TOKEN, "data": {"sequence_length": 32, "sources": [source]}}
    check_data(make_recipe(stage))
    (tmp_path / "stories.txt").unlink()
    with pytest.raises(DataError, match=r"stories\.txt\] expected a file"):
        check_data(make_recipe(stage))
