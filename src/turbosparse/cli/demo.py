"""Watch a small model run dense and sparse, side by side: texts, speed, perplexity, sparsity per layer.

Takes SmolLM2-135M-Instruct (135 million parameters, Apache-2.0; fetched once, 99 MB), finds thresholds on
the text that ships with turbosparse, and runs the same prompt with and without them. Under two minutes on two
cores.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from turbosparse.cli.console import add_json_option, console, print_json, progress
from turbosparse.cli.demo_report import demo_record, show_answers, show_layers, show_quality

if TYPE_CHECKING:
    from turbosparse._native import Mode
    from turbosparse.runtime.engine import Model
    from turbosparse.runtime.generation import GenerationStats

__all__ = ["add_arguments", "run"]

PROMPT = "Explain in simple words how a computer stores a file on a disk."
CETT = 0.1  # costs SmolLM2 6.5 % of perplexity on the held-out text; 0.2 costs 32 %
ROUNDS = 3
CALIBRATION_TOKENS = 1024
JUDGED_TOKENS = 2048
MODES: "tuple[Mode, ...]" = ("dense", "threshold")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser.
    """
    add = parser.add_argument
    add("--model", type=Path, metavar="FILE", help="another GGUF file instead of the default model")
    add("--prompt", default=PROMPT, help="what to ask")
    add("--cett", type=float, default=CETT, help=f"error target of every layer (default {CETT})")
    add("-n", "--max-tokens", type=int, default=96, help="length of the answers")
    add("-t", "--threads", type=int, help="threads (default: physical cores, at most 8)")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed options.

    Returns
    -------
    int
        Exit status.
    """
    import turbosparse
    from turbosparse.runtime.calibration import calibrate
    from turbosparse.runtime.calibration_report import CalibrationConfig
    from turbosparse.runtime.default_model import DEFAULT_MODEL, cache_folder, fetch
    from turbosparse.runtime.perplexity import compare_modes
    from turbosparse.runtime.texts import CALIBRATION, HELD_OUT, read_text

    out, begin = console(), time.monotonic()
    if args.model is None:
        out.print(
            f"[bold]Model[/]  {DEFAULT_MODEL.name}, {DEFAULT_MODEL.licence}, {DEFAULT_MODEL.requirement}"
        )
    path = args.model or fetch()
    sparse_path = cache_folder() / f"{path.stem}.cett-{args.cett:g}.gguf"
    sparse_path.parent.mkdir(parents=True, exist_ok=True)
    config = CalibrationConfig(cett=args.cett, tokens=CALIBRATION_TOKENS, threads=args.threads or 0)
    out.print(
        f"[bold]Calibration[/]  thresholds so that no layer's output is off by more than {args.cett:.0%} "
        f"on average (CETT {args.cett:g}), on {CALIBRATION_TOKENS} tokens of Python's documentation"
    )
    report = calibrate(
        path,
        read_text(CALIBRATION),
        sparse_path,
        config,
        overwrite=True,
        progress=lambda label: progress(1.0, label),
    )
    show_layers(out, report)
    model = turbosparse.load(sparse_path, threads=args.threads)
    answers = _answers(model, args.prompt, args.max_tokens)
    show_answers(out, model, args.prompt, answers)
    ids = model.text_ids(read_text(HELD_OUT))[:JUDGED_TOKENS]
    with progress(len(ids), "perplexity on held-out text") as advance:
        judged = compare_modes(
            model.engine,
            ids,
            mode="threshold",
            context=min(512, model.context),
            bos_id=model.window_bos_id,
            advance=advance,
        )
    show_quality(out, report, judged)
    out.print(
        f"\nDone in {time.monotonic() - begin:.0f} s. Both modes run on one file and the same weights:\n"
        f"  turbosparse chat {sparse_path}",
        highlight=False,
        soft_wrap=True,
    )
    if args.json:
        print_json(demo_record(report, answers, judged, sparse_path))
    return 0


def _answers(model: "Model", prompt: str, max_tokens: int) -> dict[str, "list[tuple[str, GenerationStats]]"]:
    """Text and statistics of each round, in turn; the first round warms up and is dropped."""
    found: dict[str, list[tuple[str, GenerationStats]]] = {mode: [] for mode in MODES}
    with progress((ROUNDS + 1) * len(MODES), "generating") as advance:
        for _ in range(ROUNDS + 1):
            for mode in MODES:
                answer = model.generate(
                    prompt, max_tokens=max_tokens, mode=mode, chat=True, cache=model.new_cache()
                )
                found[mode].append((answer.read(), answer.stats))
                advance(1)
    return {mode: rounds[1:] for mode, rounds in found.items()}
