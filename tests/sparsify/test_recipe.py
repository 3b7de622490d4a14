"""Recipes: defaults, settings on top, and every way to get them wrong."""

import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from turbosparse.errors import ConfigError
from turbosparse.sparsify.recipe import load_recipe, quick_recipe, recipe_from_dict, recipe_to_dict

REPOSITORY = Path(__file__).parents[2]


def values(**changes: Any) -> dict[str, Any]:
    stage = {"name": "one", "tokens": 1000, "loss": {"logits": 1}, "learning_rate": 1e-3}
    return {
        "model": "m",
        "output": "o",
        "data": {"sources": [{"path": "a.txt"}], "sequence_length": 16},
        "stages": [stage],
        **changes,
    }


def test_round_trip() -> None:
    recipe = recipe_from_dict(values())
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe
    assert recipe.stages[0].loss.logits == 1.0
    assert recipe.stages[0].steps(16) == 1000 // (16 * 16)
    assert recipe.data_of(recipe.stages[0]) is recipe.data


EXAMPLES = REPOSITORY / "examples"
RECIPES = sorted([*EXAMPLES.glob("*.toml"), *EXAMPLES.glob("cluster/*.toml")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_examples_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.stages
    # A model that is fitted is on each device as a whole before it is sharded.
    assert not recipe.fsdp or not recipe.initial_fit_tokens


@pytest.mark.parametrize("name", ["one_node.sh", "many_nodes.slurm"])
def test_the_launch_scripts_parse(name: str) -> None:
    script = EXAMPLES / "cluster" / name
    subprocess.run(["bash", "-n", str(script)], check=True)
    for recipe in re.findall(r"examples/\S+\.toml", script.read_text(encoding="utf-8")):
        assert (REPOSITORY / recipe).is_file()


def test_settings_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'model = "m"\noutput = "o"\n[data]\n[[data.sources]]\npath = "a.txt"\n'
        '[[stages]]\nname = "one"\ntokens = 10\nloss = { logits = 1.0 }\nlearning_rate = 1e-3\n',
        encoding="utf-8",
    )
    settings = ["seed=7", "output=else where", "data.sequence_length=64", "stages.one.learning_rate=2e-4"]
    recipe = load_recipe(path, settings)
    assert (recipe.seed, recipe.output, recipe.data.sequence_length) == (7, "else where", 64)
    assert recipe.stages[0].learning_rate == 2e-4
    for setting in ("seed", "stages.two.tokens=1", "stages.tokens=1", "model.name=1"):
        with pytest.raises(ConfigError, match=r"\[--set\] expected"):
            load_recipe(path, [setting])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sede": 1}, r"\[recipe\] expected fields of model, .* got sede"),
        ({"seed": "x"}, r"\[recipe\.seed\] expected int, got 'x'"),
        ({"seed": True}, r"\[recipe\.seed\] expected int, got True"),
        ({"stages": []}, r"\[stages\] expected at least one stage"),
        ({"stages": "one"}, r"\[recipe\.stages\] expected a list"),
        ({"activation": "drolu"}, r"\[activation\] expected one of"),
        ({"activation": "silu"}, r"\[activation\] expected one with exact zeros .*, got 'silu'"),
        ({"precision": "fp8"}, r"\[precision\] expected one of auto, bf16, fp32, got 'fp8'"),
        ({"data": {"sources": [{"path": "a", "weight": 0}]}}, "weights that sum to more than 0"),
        (
            {"data": {"sources": [{"path": "a", "weight": -1}]}},
            r"\[a\] expected a weight of at least 0",
        ),
        ({"data": {"sources": [{"path": "a", "on_end": "loop"}]}}, "on_end of repeat, stop, error"),
        ({"data": 3}, r"\[recipe\.data\] expected a table, got 3"),
    ],
)
def test_wrong_recipes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_from_dict(values(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {}}, "at least one weight above 0"),
        ({"loss": {"logits": -1.0}}, r"\[loss\.logits\] expected a finite weight of at least 0"),
        ({"loss": {"logits": math.inf}}, r"\[loss\.logits\] expected a finite weight of at least 0"),
        ({"learning_rate": 0.0}, "a rate above 0"),
        ({"schedule": "step"}, "one of wsd, cosine, constant"),
        ({"trainable": "none"}, "one of ffn, all, all_but_embeddings"),
        ({"warmup_tokens": 900, "decay_tokens": 200}, "at most the stage's 1000 tokens"),
        ({"blend_tokens": 1001}, r"blend_tokens\] expected at most the stage's 1000 tokens, got 1001"),
        ({"threshold_tokens": 1001}, r"threshold_tokens\] expected at most the stage's 1000 tokens"),
        ({"temperature": 0.0}, "a temperature above 0"),
        ({"name": "../x"}, "letters and digits"),
    ],
)
def test_wrong_stages(changes: dict[str, Any], message: str) -> None:
    table = values()
    table["stages"][0] |= changes
    with pytest.raises(ConfigError, match=message):
        recipe_from_dict(table)


def test_missing_fields_and_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[recipe\] expected the fields output, data, got none"):
        recipe_from_dict({})
    with pytest.raises(
        ConfigError, match=r"\[model\] expected a directory or model id, or \[fresh\], got ''"
    ):
        recipe_from_dict(values(model=""))
    with pytest.raises(ConfigError, match="expected a recipe file"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("model = ", encoding="utf-8")
    with pytest.raises(ConfigError, match="expected TOML"):
        load_recipe(tmp_path / "broken.toml")


def test_a_recipe_without_a_file() -> None:
    recipe = quick_recipe(
        ["a.txt", "b.txt"], 100_000, ["model=m", "output=o", "stages.distillation.micro_batch=2"]
    )
    (stage,) = recipe.stages
    assert stage.tokens == 100_000
    assert stage.micro_batch == 2
    assert stage.loss.logits == 1
