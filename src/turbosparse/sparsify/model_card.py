"""The model card (README.md) of a trained model: what it is, its data, and what training did to it."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from turbosparse.data.config import SourceConfig
from turbosparse.sparsify.metrics_file import read_metrics
from turbosparse.sparsify.recipe import Recipe, StageConfig

__all__ = ["DRAWN_FILE", "model_card"]

DRAWN_FILE = "data_drawn.json"
"""In a stage's directory: documents and tokens drawn from each source, since its data began."""


def model_card(recipe: Recipe, stage: StageConfig, *, metrics_file: Path) -> str:
    """Return the model card of the model that a stage left.

    Parameters
    ----------
    recipe : Recipe
        The whole run.
    stage : StageConfig
        The stage that ended.
    metrics_file : Path
        JSON lines of the run, whose last evaluation of the stage is quoted. What was drawn from each source
        is in the directories of the stages beside it.

    Returns
    -------
    str
        Markdown with the front matter that model hubs read.
    """
    stages = recipe.stages[: recipe.stages.index(stage) + 1]
    drawn = _drawn(stages, metrics_file.parent)
    base = Path(recipe.model).name if Path(recipe.model).exists() else recipe.model
    title = Path(recipe.output).name if recipe.from_scratch else f"{base} with {recipe.activation}"
    front = ModelCardData(
        base_model=None if recipe.from_scratch else base,
        license=recipe.license or None,
        pipeline_tag="text-generation",
        tags=["turbosparse", "activation-sparsity", recipe.activation.split(":", 1)[0]],
    )
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {title}",
        f"{_origin(recipe, base)} on {sum(_tokens(recipe, done) for done in stages):,} tokens with "
        "turbosparse, so that most neurons are zero for each token and need not be computed.",
        *_quality(_evaluations(metrics_file, stage.name)),
        "## Training",
        _table(
            ("stage", "tokens", "loss", "learning rate", "tokens per step"),
            (
                (
                    done.name,
                    f"{_tokens(recipe, done):,}",
                    " + ".join(f"{weight:g} {name}" for name, weight in vars(done.loss).items() if weight),
                    f"{done.learning_rate:g}, {done.schedule}",
                    f"{done.batch_sequences * recipe.data_of(done).sequence_length:,}",
                )
                for done in stages
            ),
        ),
        "## Data",
        _table(
            ("source", "licence", "documents", "tokens"),
            (
                (
                    _title(source.path) + name.removeprefix(source.path),
                    source.license or "not stated",
                    f"{drawn[name]['documents']:,}",
                    f"{drawn[name]['tokens']:,}",
                )
                for name, source in _sources(recipe, stages).items()
                if name in drawn
            ),
        ),
        "Settings, versions and the SHA-256 of every local source are in the run's `run.json`.",
    ]
    return "\n\n".join(parts) + "\n"


def _origin(recipe: Recipe, base: str) -> str:
    """What was trained, up to the number of tokens."""
    if recipe.from_scratch:
        return f"A model with {recipe.activation} in its feed-forward layers, trained from random weights"
    experts = ""
    if recipe.upcycle is not None:
        experts = (
            f", each feed-forward layer made {recipe.upcycle.num_experts} experts of which a token uses "
            f"{recipe.upcycle.num_experts_per_tok}"
        )
    swapped = f"the activation of its feed-forward layers replaced by {recipe.activation}"
    return f"{base}{experts}, {swapped} and trained"


def _sources(recipe: Recipe, stages: Iterable[StageConfig]) -> dict[str, SourceConfig]:
    mixtures = [recipe.data_of(stage) for stage in stages]
    return {
        name: source
        for data in mixtures
        for name, source in zip(data.source_names(), data.sources, strict=True)
    }


def _title(path: str) -> str:
    return Path(path).stem if Path(path).exists() else path


def _tokens(recipe: Recipe, stage: StageConfig) -> int:
    length = recipe.data_of(stage).sequence_length
    return stage.steps(length) * stage.batch_sequences * length


def _drawn(stages: Iterable[StageConfig], output: Path) -> dict[str, Counter[str]]:
    """Sum what stages drew; one without data of its own goes on with the counts of the stage before."""
    totals: dict[str, Counter[str]] = {}
    going_on: dict[str, Any] = {}
    for stage in stages:
        file = output / stage.name / DRAWN_FILE
        if not file.is_file():
            continue
        if stage.data is not None:
            _add(totals, going_on)
        going_on = json.loads(file.read_text(encoding="utf-8"))
    _add(totals, going_on)
    return totals


def _add(totals: dict[str, Counter[str]], drawn: Mapping[str, Any]) -> None:
    for source, counts in drawn.items():
        own = {name: counts[name] for name in ("documents", "tokens")}
        totals.setdefault(source, Counter()).update(own)


def _evaluations(metrics_file: Path, stage: str) -> dict[str, dict[str, Any]]:
    """Return the last evaluation of the stage, and the original model's, which may be one per stage."""
    found: dict[str, dict[str, Any]] = {}
    for record in read_metrics(metrics_file):
        event = record.get("event")
        if event == "original":
            found[event] = found.get(event, {}) | record
        elif event == "evaluation" and record["stage"] == stage:
            found[event] = record
    return found


def _quality(found: dict[str, dict[str, Any]]) -> list[str]:
    if "evaluation" not in found:
        return []
    here, original = found["evaluation"], found.get("original", {})
    rows = []
    for name, value in here.items():
        if not name.startswith("perplexity_"):
            continue
        before = original.get(name)
        ratio = (
            [f"{before:.2f}", f"{value:.2f}", f"{value / before:.2f}"]
            if before
            else ["-", f"{value:.2f}", "-"]
        )
        rows.append((name.removeprefix("perplexity_"), *ratio))
    text = ["## Held-out perplexity", _table(("text", "original", "this model", "ratio"), rows)]
    if here.get("zeros"):
        text.append(f"{here['zeros']:.1%} of all neurons are exactly zero on these texts.")
    return text


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
