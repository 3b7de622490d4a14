"""A tiny model and texts on disk, and a recipe that trains in a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_hf import make_hf_model, make_texts, make_tokenizer
from turbosparse.sparsify.recipe import Recipe, recipe_from_dict

__all__ = ["MakeRecipe"]

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    make_hf_model().save_pretrained(directory / "model")
    make_tokenizer().save_pretrained(directory / "model")
    make_texts(directory)
    return directory


@pytest.fixture
def make_recipe(base: Path, tmp_path: Path) -> MakeRecipe:
    def make(*stages: dict[str, Any], output: str = "run", **changes: Any) -> Recipe:
        return recipe_from_dict(
            {
                "model": str(base / "model"),
                "output": str(tmp_path / output),
                "precision": "fp32",
                "threads": 1,
                "initial_fit_tokens": 0,  # it leaves little for training to do on so small a model
                "checkpoint_minutes": 1000.0,
                "evaluate_tokens": 0,
                "evaluation_sequences": 4,
                "data": {
                    "sequence_length": 32,
                    "shuffle_documents": 10,
                    "held_out_percent": 10.0,
                    "sources": [
                        {"path": str(base / "stories.txt"), "weight": 2.0, "license": "CC0"},
                        {"path": str(base / "records.jsonl")},
                    ],
                    "held_out": [{"path": str(base / "book.txt")}],
                },
                "stages": [
                    {
                        "name": f"stage{index}",
                        "tokens": 32 * 4 * 6,
                        "batch_sequences": 4,
                        "micro_batch": 2,
                        "learning_rate": 3e-3,
                        **stage,
                    }
                    for index, stage in enumerate(stages)
                ],
                **changes,
            }
        )

    return make
