"""The model card's table of sources."""

import dataclasses
import json
from pathlib import Path

from tests.sparsify.conftest import MakeRecipe
from turbosparse.data.config import SourceConfig
from turbosparse.sparsify.model_card import DRAWN_FILE, model_card


def test_sources_of_one_path_have_a_row_each(make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> None:
    recipe = make_recipe({"loss": {"logits": 1.0}})
    path = str(base / "records.jsonl")
    sources = (SourceConfig(path=path), SourceConfig(path=path, field="summary", license="MIT"))
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sources=sources))
    drawn = {name: {"documents": 3, "tokens": 10 + i} for i, name in enumerate(recipe.data.source_names())}
    (tmp_path / "stage0").mkdir()
    (tmp_path / "stage0" / DRAWN_FILE).write_text(json.dumps(drawn), encoding="utf-8")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("", encoding="utf-8")
    card = model_card(recipe, recipe.stages[0], metrics_file=metrics)
    assert "| records (text) | not stated | 3 | 10 |" in card
    assert "| records (summary) | MIT | 3 | 11 |" in card
