"""Ask a model the questions of EleutherAI's lm-evaluation-harness, dense and sparse.

MODEL is a GGUF file, run by the engine, or a Hugging Face directory or id, run by torch. Needs
`pip install 'turbosparse[eval]'`.

  turbosparse eval model.gguf --tasks arc_easy,hellaswag --limit 200
  turbosparse eval sparse.gguf --tasks hellaswag --mode dense --mode threshold
  turbosparse eval sparse.gguf --preset open-llm
  turbosparse eval runs/mine/distillation/model --tasks my_task --include my_tasks/
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from turbosparse.cli.console import add_json_option, console, print_json, progress
from turbosparse.cli.model_options import (
    add_model_options,
    check_model_name,
    check_modes,
    describe,
    open_model,
)
from turbosparse.errors import ConfigError

__all__ = ["add_arguments", "run"]

PRESETS = ("open-llm",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Where they go.
    """
    add_model_options(parser, several_modes=True)
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--tasks", default="", metavar="A,B", help="tasks of lm-evaluation-harness")
    asked.add_argument(
        "--preset",
        choices=PRESETS,
        help="open-llm: ARC-c 25-shot, HellaSwag 10, MMLU 5, TruthfulQA 0, WinoGrande 5, GSM8K 5",
    )
    asked.add_argument("--include", type=Path, metavar="DIR", help="folder with further tasks (YAML)")
    asked.add_argument("--shots", type=int, metavar="N", help="examples shown before each question")
    asked.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    asked.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of context; default: the model's, at most 4096"
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Ask and print.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed arguments.

    Returns
    -------
    int
        Exit status.
    """
    check_model_name(str(args.model))
    rounds = _rounds(args)
    scores: dict[str, list[Any]] = {}
    if args.model.is_dir() or not args.model.exists():
        for name in ("mode", "pin", "isa", "memory_budget", "io", "kv_cache", "context"):
            if value := getattr(args, name):
                got = value[0] if isinstance(value, list) else value
                raise ConfigError(f"[{name}] expected none for a Hugging Face model, got {got}")
        scores["torch"] = _ask_directory(str(args.model), rounds, args.threads)
    else:
        check_modes(args.model, *(args.mode or []))
        model = open_model(args, context=args.context)
        for mode in args.mode or [model.default_mode]:
            sys.stderr.write(describe(model, mode) + "\n")
            scores[mode] = _ask_file(model, mode, rounds)
    _print_table(scores)
    if args.json:
        print_json({mode: [dataclasses.asdict(score) for score in found] for mode, found in scores.items()})
    return 0


def _rounds(args: argparse.Namespace) -> list[Any]:
    """One round of questions; of a preset, one per number of examples."""
    from turbosparse.bench.tasks import OPEN_LLM_TASKS, TaskSettings

    shared = {"include_path": args.include, "limit": args.limit, "chat": args.chat}
    if args.include is not None and not args.include.is_dir():
        raise ConfigError(f"[include] expected a folder, got {args.include}")
    if args.preset is None:
        names = [name for name in args.tasks.split(",") if name]
        return [TaskSettings(tasks=names, shots=args.shots, **shared)]
    if args.tasks or args.shots is not None:
        raise ConfigError("[preset] expected neither --tasks nor --shots beside it, got one")
    return [TaskSettings(tasks=[name], shots=shots, **shared) for name, shots in OPEN_LLM_TASKS.items()]


def _ask_file(model: Any, mode: Any, rounds: list[Any]) -> list[Any]:
    from turbosparse.bench.harness_model import EngineHarnessModel
    from turbosparse.bench.tasks import evaluate

    with progress(None, f"asking, mode {mode}") as advance:
        harness = EngineHarnessModel(model, mode=mode, advance=advance)
        return [score for settings in rounds for score in evaluate(harness, settings)]


def _ask_directory(path: str, rounds: list[Any], threads: int | None) -> list[Any]:
    import torch

    from turbosparse.bench.harness_torch import torch_harness_model
    from turbosparse.bench.tasks import evaluate

    if threads:
        torch.set_num_threads(threads)
    harness = torch_harness_model(path)
    return [score for settings in rounds for score in evaluate(harness, settings)]


def _print_table(scores: dict[str, list[Any]]) -> None:
    """One row per metric; where there are several modes, the later ones with their distance to the first."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("task", "metric", "shots", "questions"):
        table.add_column(title, justify="left" if title in ("task", "metric") else "right")
    for mode in scores:
        table.add_column(mode, justify="right")
    for row in zip(*scores.values(), strict=True):
        first = row[0]
        cells = [_cell(score, None if score is first else first) for score in row]
        table.add_row(first.task, first.metric, str(first.shots), f"{first.questions:,}", *cells)
    console().print(table)


def _cell(score: Any, against: Any) -> str:
    text = f"{score.value:.4f}"
    if score.standard_error is not None and math.isfinite(score.standard_error):
        text += f" ± {score.standard_error:.4f}"
    return text if against is None else f"{text} ({score.value - against.value:+.4f})"
