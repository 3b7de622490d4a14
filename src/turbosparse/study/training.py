"""Studies that train: the same tokens through several kinds of FFN, then one measurement of each model."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbosparse.errors import CalibrationError, ConfigError, TextError, TrainingError
from turbosparse.measure.config import MeasureConfig
from turbosparse.measure.hugging_face import check_device, open_hugging_face
from turbosparse.measure.measurement import Progress, measure, require_window
from turbosparse.models.registry import load_config, load_tokenizer
from turbosparse.predict.predictability import predictability
from turbosparse.sparsify.fresh_model import FreshModel, train_tokenizer, write_once
from turbosparse.sparsify.recipe import Recipe
from turbosparse.sparsify.run import run_recipe
from turbosparse.sparsify.stage import MODEL_DIRECTORY
from turbosparse.study.config import FFN_KINDS, FromScratchStudy, RelufyStudy
from turbosparse.study.store import Store

__all__ = [
    "Variant",
    "check_text",
    "from_scratch_variants",
    "relufied_variants",
    "run_variants",
    "train_variants",
    "training_settings",
]

logger = logging.getLogger(__name__)

_PLAIN_WIDTH = 1.5  # of a gated FFN: two matrices instead of three
_CURVE_POINTS = 200
_UNCERTAIN = "the rise is known within"  # of what a measurement notes, told once for all runs
# Settings that may change between calls: they add runs, or say where and how fast.
_FREE = {
    "output",
    "text",
    "threads",
    "checkpoint_minutes",
    "seeds",
    "kinds",
    "activations",
    "control",
    "baseline",
}
_KEPT = ("model", "text", "config", "cett_targets", "windows", "union_sizes", "budgets", "overall", "quality")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One run of a study."""

    name: str
    group: str
    """What it is one seed of."""
    kind: str
    """FFN or activation."""
    seed: int
    recipe: Recipe
    control: bool = False


def training_settings(config: FromScratchStudy | RelufyStudy, text: str) -> dict[str, Any]:
    """Say what the results of a study depend on.

    Parameters
    ----------
    config : FromScratchStudy or RelufyStudy
        The recipe.
    text : str
        What is measured on.

    Returns
    -------
    dict
        For `Store`. More seeds and kinds may be added to a study that has begun.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    return settings | {"text_sha256": hashlib.sha256(text.encode()).hexdigest()}


def from_scratch_variants(config: FromScratchStudy, folder: Path) -> list[Variant]:
    """List the runs of a comparison from scratch: seeds outermost, so that a part of them compares too.

    Parameters
    ----------
    config : FromScratchStudy
        The recipe.
    folder : Path
        Of the study; the tokenizer that all runs share is trained here, once.

    Returns
    -------
    list of Variant
        One per seed, size and kind.
    """
    shared: dict[int, str] = {}
    for size in config.sizes:
        if not size.tokenizer and size.vocab_size not in shared:
            shared[size.vocab_size] = str(_shared_tokenizer(config, size.vocab_size, folder))
    variants = []
    for seed in config.seeds:
        for size, size_name in zip(config.sizes, config.size_names(), strict=True):
            for kind in config.kinds:
                activation, gated = FFN_KINDS[kind]
                width = size.intermediate_size
                shape = dataclasses.replace(
                    size,
                    gated=gated,
                    intermediate_size=width if gated else round(_PLAIN_WIDTH * width),
                    tokenizer=size.tokenizer or shared[size.vocab_size],
                )
                group = kind if len(config.sizes) == 1 else f"{kind} {size_name}"
                recipe = _recipe(config, folder, f"{group} seed {seed}", seed, activation, fresh=shape)
                variants.append(
                    Variant(name=f"{group} seed {seed}", group=group, kind=kind, seed=seed, recipe=recipe)
                )
    return variants


def _shared_tokenizer(config: FromScratchStudy, vocab_size: int, folder: Path) -> Path:
    path = folder / f"tokenizer-{vocab_size}"
    if not path.is_dir():
        write_once(path, lambda staging: train_tokenizer(config.data, vocab_size).save_pretrained(staging))
    return path


def relufied_variants(config: RelufyStudy, folder: Path) -> list[Variant]:
    """List the runs of a comparison of swaps.

    Parameters
    ----------
    config : RelufyStudy
        The recipe.
    folder : Path
        Of the study.

    Returns
    -------
    list of Variant
        One per seed and activation, and the control.
    """
    variants = []
    for seed in config.seeds:
        for activation in [*(["control"] if config.control else []), *config.activations]:
            control = activation == "control"
            name = f"{activation} seed {seed}"
            recipe = _recipe(config, folder, name, seed, "drelu" if control else activation)
            variants.append(
                Variant(
                    name=name, group=activation, kind=activation, seed=seed, recipe=recipe, control=control
                )
            )
    return variants


def _recipe(
    config: FromScratchStudy | RelufyStudy,
    folder: Path,
    name: str,
    seed: int,
    activation: str,
    *,
    fresh: FreshModel | None = None,
) -> Recipe:
    start: dict[str, Any] = {"fresh": fresh}
    if isinstance(config, RelufyStudy):
        start = {"model": config.model, "initial_fit_tokens": config.initial_fit_tokens}
    return Recipe(
        **start,
        output=str(folder / "runs" / name.replace(" ", "-").replace(":", "-")),
        activation=activation,
        data=config.data,
        stages=config.stages if isinstance(config, RelufyStudy) else (config.training,),
        seed=seed,
        precision=config.precision,
        threads=config.threads,
        evaluate_tokens=config.evaluate_tokens,
        evaluation_sequences=config.evaluation_sequences,
        fsdp=config.fsdp,
        checkpoint_minutes=config.checkpoint_minutes,
        keep_checkpoints=1,
        log_steps=10,
    )


def check_text(variants: Sequence[Variant], text: str, config: MeasureConfig) -> None:
    """Find out before anything is trained whether there is enough text to measure on.

    Parameters
    ----------
    variants : sequence of Variant
        The runs.
    text : str
        What is measured on.
    config : MeasureConfig
        What is measured.

    Raises
    ------
    TextError
        When the text has fewer tokens than a window.
    """
    tokenizers: dict[str, int] = {}
    for recipe in (variant.recipe for variant in variants):
        if recipe.fresh is not None:
            tokenizers[recipe.fresh.tokenizer] = recipe.fresh.context_length
        elif recipe.model not in tokenizers:
            tokenizers[recipe.model] = int(load_config(recipe.model).max_position_embeddings)
    for path, positions in tokenizers.items():
        tokens = len(load_tokenizer(path)(text, verbose=False).input_ids)
        require_window(text, tokens, min(config.context, positions))


def train_variants(variants: Sequence[Variant]) -> None:
    """Train without measuring: what many processes do together.

    Parameters
    ----------
    variants : sequence of Variant
        The runs, in order; those that are finished take no time.

    Raises
    ------
    KeyboardInterrupt
        When a signal stopped a run; its checkpoint and all finished runs are kept.
    """
    for variant in variants:
        logger.info("training %s", variant.name)
        if not run_recipe(variant.recipe, control=variant.control).finished:
            raise KeyboardInterrupt


def run_variants(
    variants: Sequence[Variant],
    text: str,
    store: Store,
    config: MeasureConfig,
    *,
    predict_layers: int = 0,
    device: str = "cpu",
    progress: Progress = lambda label: nullcontext(lambda share: None),
) -> dict[str, Any]:
    """Train and measure what is not there yet.

    Parameters
    ----------
    variants : sequence of Variant
        The runs, in order.
    text : str
        What is measured on.
    store : Store
        Where finished runs are kept.
    config : MeasureConfig
        What is measured.
    predict_layers : int
        Layers whose neurons predictors are fitted for.
    device : str
        Where models are measured.
    progress : callable, optional
        Opens a bar for each stage of a measurement.

    Returns
    -------
    dict
        ``runs``: one record per finished run. ``notes``: runs that failed, and why.

    Raises
    ------
    TextError
        When the text has fewer tokens than a window; nothing is trained then.
    ConfigError
        When torch cannot use the device; nothing is trained then either.
    KeyboardInterrupt
        When a signal stopped a run; its checkpoint and all finished runs are kept.
    """
    check_text(variants, text, config)
    check_device(device)
    runs, notes, uncertain = [], [], 0
    for number, variant in enumerate(variants):
        logger.info("result %d of %d", number + 1, len(variants))

        def compute(variant: Variant = variant) -> dict[str, Any]:
            train_variants([variant])
            return _measured(variant, text, config, predict_layers, device, progress)

        try:
            result = store.result(variant.name, compute)
        except (
            TrainingError,
            CalibrationError,
            TextError,
        ) as error:  # the other runs may still be worth their time
            logger.error("[%s] %s", variant.name, error)
            notes.append(f"{variant.name} failed: {error}")
            continue
        runs.append({"name": variant.name, "group": variant.group, "kind": variant.kind, **result})
        uncertain += any(_UNCERTAIN in note for note in result["notes"])
        notes += [f"{variant.name}: {note}" for note in result["notes"] if _UNCERTAIN not in note]
    if not runs:
        raise ConfigError(f"[study] expected at least one run that can be trained, got none: {notes[0]}")
    if uncertain:
        notes.append(
            f"{uncertain} of {len(runs)} runs know a perplexity budget less well than within a fourth of it: "
            "give more quality tokens"
        )
    return {"runs": runs, "notes": notes}


def _measured(
    variant: Variant, text: str, config: MeasureConfig, predict_layers: int, device: str, progress: Progress
) -> dict[str, Any]:
    recipe = variant.recipe
    source = open_hugging_face(Path(recipe.output) / recipe.stages[-1].name / MODEL_DIRECTORY, device=device)
    record = measure(source, text, config, progress)
    result = {name: record[name] for name in _KEPT} | {
        "seed": variant.seed,
        "parameters": sum(weight.numel() for weight in source.model.parameters()),
        "notes": record["notes"],
        "zeros_per_layer": [unit["exact_zeros"]["value"] for unit in record["units"]],
        "curve": _curve(Path(recipe.output) / "metrics.jsonl"),
        "predictability": [],
    }
    if predict_layers:
        with progress("fitting predictors") as advance:
            result["predictability"] = predictability(
                source, text, record, layers=predict_layers, advance=advance
            )
    return result


def _curve(path: Path) -> list[dict[str, float]]:
    """Held-out loss and zeros by tokens; of the stages one after another."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    points = list(_evaluations(lines))
    every = -(-len(points) // _CURVE_POINTS)
    return points[::every] + (points[-1:] if (len(points) - 1) % every else [])


def _evaluations(lines: Sequence[dict[str, Any]]) -> Iterator[dict[str, float]]:
    before, stage = 0, ""
    last = 0
    for line in lines:
        if line.get("event") != "evaluation":
            continue
        if line["stage"] != stage:
            before, stage = before + last, line["stage"]
        last = line["tokens"]
        perplexities = [value for name, value in line.items() if name.startswith("perplexity_")]
        point = {"tokens": before + last, "zeros": line.get("zeros", 0.0)}
        yield point | {"perplexity": sum(perplexities) / len(perplexities)} if perplexities else point
