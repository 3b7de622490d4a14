"""Two processes on gloo compute what one computes, sharded or not, and one goes on where two stopped."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.sparsify.conftest import MakeRecipe
from tests.sparsify.test_run import DISTILLATION, REGRESSION, losses, weights
from turbosparse.sparsify.recipe import Recipe, recipe_to_dict
from turbosparse.sparsify.run import run_recipe

PROGRAM = """
import json, sys
from pathlib import Path
from turbosparse.sparsify.recipe import recipe_from_dict
from turbosparse.sparsify.run import run_recipe
recipe = recipe_from_dict(json.loads(Path(sys.argv[1]).read_text()))
assert run_recipe(recipe, from_checkpoint=Path(sys.argv[2]) if sys.argv[2:] else None).finished
"""


def launch(recipe: Recipe, directory: Path, *, processes: int, checkpoint: Path | None = None) -> None:
    (directory / "program.py").write_text(PROGRAM, encoding="utf-8")
    (directory / "recipe.json").write_text(json.dumps(recipe_to_dict(recipe)), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(directory / "program.py"), str(directory / "recipe.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command + ([str(checkpoint)] if checkpoint else []),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "fsdp", [pytest.param(False, id="ddp", marks=pytest.mark.slow), pytest.param(True, id="fsdp")]
)
def test_two_processes_equal_one_and_one_goes_on(make_recipe: MakeRecipe, tmp_path: Path, fsdp: bool) -> None:
    step = 32 * 4
    distillation = DISTILLATION | {"average_tokens": 2 * step}
    longer = distillation | {"tokens": 6 * step}
    whole = make_recipe(REGRESSION | {"tokens": 3 * step}, longer, output="one")
    run_recipe(whole)
    two = make_recipe(
        REGRESSION | {"tokens": 3 * step}, distillation | {"tokens": 3 * step}, output="two", fsdp=fsdp
    )
    launch(two, tmp_path, processes=2)
    assert losses(two) == pytest.approx(losses(whole)[:6], rel=1e-4)
    checkpoint = Path(two.output) / "stage1" / "checkpoint-3"
    rest = dataclasses.replace(whole, output=str(tmp_path / "rest"), fsdp=fsdp)
    launch(rest, tmp_path, processes=1, checkpoint=checkpoint)
    assert losses(rest) == pytest.approx(losses(whole)[6:], rel=1e-4)
    expected, found = (weights(Path(recipe.output) / "stage1" / "model") for recipe in (whole, rest))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-3)
