"""What `turbosparse study` runs: models opened in their column, tasks asked, training estimated."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from turbosparse.cli.console import progress
from turbosparse.cli.measure_model import open_source, run_record
from turbosparse.cli.model_options import check_model_name, read_text
from turbosparse.errors import ConfigError
from turbosparse.study.config import FromScratchStudy, RelufyStudy, SweepStudy
from turbosparse.study.store import Store

if TYPE_CHECKING:
    from turbosparse.measure.source import Source
    from turbosparse.sparsity.selection import Selection
    from turbosparse.study.training import Variant

__all__ = ["estimate", "find", "settings_of", "train"]

StudyConfig = SweepStudy | FromScratchStudy | RelufyStudy

_MEASURED = ("measure", "predict_layers", "device", "text_sha256")  # no matter to what trains alone
_bar = partial(progress, 1.0)


def find(kind: str, config: StudyConfig) -> dict[str, Any]:
    """Run a study, or what is left of it.

    Parameters
    ----------
    kind : str
        Which study.
    config : SweepStudy, FromScratchStudy or RelufyStudy
        Its recipe.

    Returns
    -------
    dict
        What it found, and ``seconds`` that its results took, in this call or before.
    """
    text = read_text(Path(config.text))
    return _sweep(kind, config, text) if isinstance(config, SweepStudy) else _train(kind, config, text)


def _sweep(kind: str, config: SweepStudy, text: str) -> dict[str, Any]:
    from turbosparse.measure.measurement import text_windows
    from turbosparse.study.experts import check_experts
    from turbosparse.study.fingerprint import model_fingerprint
    from turbosparse.study.trade_off import run_trade_off, sweep_settings

    output = Path(config.output)
    check_model_name(config.model)
    settings = sweep_settings(config, text) | {"model_fingerprint": model_fingerprint(config.model)}
    source = open_source(config.model, scratch=output, threads=config.threads, device=config.device)
    try:
        if kind == "experts":
            check_experts(source)
        text_windows(source, text, config.measured())  # what is refused begins no study
        store = Store(output, kind, settings)
        ask = _task_scorer(source, config) if config.tasks else None
        found = run_trade_off(source, text, config, store, ask=ask, progress=_bar)
    finally:
        source.close()
    found["text"]["name"] = Path(config.text).name
    return found | {"seconds": store.seconds}


def _task_scorer(source: "Source", config: SweepStudy) -> Any:
    from turbosparse.bench.tasks import TaskSettings, evaluate

    settings = TaskSettings(
        tasks=config.tasks,
        include_path=Path(config.task_folder) if config.task_folder else None,
        limit=config.task_limit or None,
    )
    harness = _harness_of(source, config.threads)

    def ask(selection: "Selection | None") -> Sequence[Mapping[str, Any]]:
        with harness(selection) as model:
            return [dataclasses.asdict(score) for score in evaluate(model, settings)]

    return ask


def _harness_of(
    source: "Source", threads: int
) -> "Callable[[Selection | None], AbstractContextManager[Any]]":
    """Give what opens a source as a model of lm-evaluation-harness that leaves out what a selection does."""
    from turbosparse.runtime.measured_file import MeasuredFile

    if isinstance(source, MeasuredFile):
        from turbosparse.bench.harness_model import EngineHarnessModel

        @contextmanager
        def in_engine(selection: "Selection | None") -> Iterator[Any]:
            file = source.thinned(selection)
            model = EngineHarnessModel(str(file.path), mode=file.mode, threads=threads or None)
            model.choose = file.choose
            yield model

        return in_engine
    from turbosparse.bench.harness_torch import harness_around
    from turbosparse.measure.hugging_face import HuggingFaceModel

    assert isinstance(source, HuggingFaceModel)
    harness = harness_around(source.model, source.tokenizer)

    @contextmanager
    def in_torch(selection: "Selection | None") -> Iterator[Any]:
        with source.thinned(selection):
            yield harness

    return in_torch


def _train(kind: str, config: FromScratchStudy | RelufyStudy, text: str) -> dict[str, Any]:
    from transformers.utils.logging import disable_progress_bar

    from turbosparse.study.training import run_variants

    disable_progress_bar()
    store = Store(Path(config.output), kind, _settings(config, text))
    found = run_variants(
        _variants(config, store.folder),
        text,
        store,
        config.measure,
        predict_layers=config.predict_layers,
        device=config.device,
        progress=_bar,
    )
    baseline = config.baseline if isinstance(config, FromScratchStudy) else "control"
    name = Path(config.model).name if isinstance(config, RelufyStudy) else "fresh models"
    shown = found["runs"][0]["text"] | {"name": Path(config.text).name}
    return {"model": {"name": name}, "text": shown, "baseline": baseline, "seconds": store.seconds, **found}


def _settings(config: FromScratchStudy | RelufyStudy, text: str) -> dict[str, Any]:
    from turbosparse.study.fingerprint import model_fingerprint, texts_fingerprint
    from turbosparse.study.training import training_settings

    settings = training_settings(config, text) | {"texts_fingerprint": texts_fingerprint(config.data)}
    if isinstance(config, RelufyStudy):
        check_model_name(config.model)
        settings["model_fingerprint"] = model_fingerprint(config.model)
    return settings


def train(kind: str, config: StudyConfig) -> None:
    """Train what a study needs and is not there, without measuring it.

    Parameters
    ----------
    kind : str
        Which study.
    config : FromScratchStudy or RelufyStudy
        Its recipe.

    Raises
    ------
    ConfigError
        If the study trains nothing, or its directory holds another study or one with other settings.
    TextError
        If there is too little text to measure on.
    """
    from turbosparse.study.training import check_text, train_variants

    if isinstance(config, SweepStudy):
        raise ConfigError("[--train-only] expected a study that trains, got one that only measures")
    text = read_text(Path(config.text))
    if int(os.environ.get("RANK", "0")) == 0:
        settings = _settings(config, text)
        trained = {name: value for name, value in settings.items() if name not in _MEASURED}
        Store(Path(config.output), kind, trained, undecided=_MEASURED)
    variants = _variants(config, Path(config.output))
    check_text(variants, text, config.measure)
    train_variants(variants)


def _variants(config: FromScratchStudy | RelufyStudy, output: Path) -> "list[Variant]":
    from turbosparse.study.training import from_scratch_variants, relufied_variants

    if isinstance(config, RelufyStudy):
        check_model_name(config.model)
        return relufied_variants(config, output)
    return from_scratch_variants(config, output)


def estimate(config: StudyConfig) -> Iterator[str]:
    """Say what a study would train.

    Parameters
    ----------
    config : SweepStudy, FromScratchStudy or RelufyStudy
        Its recipe.

    Yields
    ------
    str
        Lines: one per run, and the sum.
    """
    if isinstance(config, SweepStudy):
        points = len(config.cett_targets) + len(config.top_k) + len(config.gate_shares) + 2
        yield f"{points} points of {config.tokens:,} tokens each; nothing is trained"
        return
    from turbosparse.sparsify.estimate import estimate_run, measure_flops
    from turbosparse.sparsify.fresh_model import start_fresh

    flops = measure_flops(bf16=config.precision != "fp32")
    yield f"measured {flops / 1e9:.0f} GFLOP/s"
    hours = 0.0
    with TemporaryDirectory() as scratch:  # what is made to be counted is not what the study begins with
        for variant in _variants(config, Path(scratch)):
            stages = estimate_run(start_fresh(variant.recipe), flops=flops)
            hours += sum(stage.hours for stage in stages)
            tokens = sum(stage.tokens for stage in stages)
            yield f"{variant.name}: {tokens:,} tokens, {sum(stage.hours for stage in stages):.2f} h"
    yield f"{hours:.1f} h in all at half of that speed; small models reach less"


def settings_of(kind: str, config: StudyConfig, command: str, seconds: float) -> dict[str, Any]:
    """Say how a study came about.

    Parameters
    ----------
    kind : str
        Which study.
    config : SweepStudy, FromScratchStudy or RelufyStudy
        Its recipe.
    command : str
        As it was typed.
    seconds : float
        That it took, in this call or before.

    Returns
    -------
    dict
        The head of its record.
    """
    torch = not (isinstance(config, SweepStudy) and Path(config.model).is_file())
    return {
        "format_version": 1,
        "study": kind,
        "config": dataclasses.asdict(config),
        "run": run_record(command, seconds, torch=torch),
    }
