"""What ``turbosparse demo`` shows: the chart of its layers, both answers with their speed, the quality."""

import statistics
from typing import TYPE_CHECKING

from turbosparse.cli.console import plain_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from turbosparse.runtime.calibration_report import CalibrationReport
    from turbosparse.runtime.engine import Model
    from turbosparse.runtime.generation import GenerationStats
    from turbosparse.runtime.perplexity import ModeComparison

    Answers = dict[str, list[tuple[str, GenerationStats]]]

__all__ = ["bar_chart", "demo_record", "show_answers", "show_layers", "show_quality"]


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


def _speed(rounds: "list[tuple[str, GenerationStats]]") -> float:
    """Speed of a mode."""
    return statistics.median(stats.decode_tok_per_s or 0.0 for _, stats in rounds)


def _ratio(answers: "Answers") -> float:
    """Speed of the threshold mode relative to dense."""
    pairs = zip(answers["threshold"], answers["dense"], strict=True)
    return statistics.median(
        (a.decode_tok_per_s or 0.0) / (b.decode_tok_per_s or 1.0) for (_, a), (_, b) in pairs
    )


def show_layers(out: "Console", report: "CalibrationReport") -> None:
    """Draw how many neurons each layer leaves out.

    Parameters
    ----------
    out : rich.console.Console
        Where to write.
    report : CalibrationReport
        Of the calibration.
    """
    out.print("\n[bold]Neurons left out per layer[/] (rows of the down projection that are not read)\n")
    for line in bar_chart([1 - layer.active for layer in report.layers]):
        out.print(line, markup=False)
    out.print(
        f"Mean: {1 - report.active_ratio:.0%} of the down rows and {1 - report.gate_passed:.0%} of the up "
        "rows are skipped; every gate row is read."
    )


def show_answers(out: "Console", model: "Model", prompt: str, answers: "Answers") -> None:
    """Show the last round's text of each mode, and the speeds.

    Parameters
    ----------
    out : rich.console.Console
        Where to write.
    model : Model
        What answered.
    prompt : str
        What was asked.
    answers : dict of str to list of (str, GenerationStats)
        Text and statistics of each round, by mode.
    """
    out.print("\n[bold]Prompt[/] ", plain_text(prompt))
    for mode, rounds in answers.items():
        text, stats = rounds[-1]
        read = f", {stats.bytes_per_token / 1e6:.0f} MB read per token" if stats.bytes_per_token else ""
        out.print(f"\n[bold]{mode}[/]  {_speed(rounds):.1f} tok/s{read}")
        out.print(text.strip(), markup=False)
    out.print(
        f"\n[bold]Speed[/]  threshold is {_ratio(answers):.2f}x dense ({model.engine.threads} threads, "
        f"{model.engine.isa}; median of {len(answers['dense'])} rounds in turn)"
    )


def show_quality(out: "Console", report: "CalibrationReport", judged: "ModeComparison") -> None:
    """Show what the sparsity cost.

    Parameters
    ----------
    out : rich.console.Console
        Where to write.
    report : CalibrationReport
        Of the calibration.
    judged : ModeComparison
        Both modes on held-out text.
    """
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


def demo_record(
    report: "CalibrationReport", answers: "Answers", judged: "ModeComparison", path: "Path"
) -> dict[str, object]:
    """Collect what the demo found.

    Parameters
    ----------
    report : CalibrationReport
        Of the calibration.
    answers : dict of str to list of (str, GenerationStats)
        Text and statistics of each round, by mode.
    judged : ModeComparison
        Both modes on held-out text.
    path : Path
        The sparse file.

    Returns
    -------
    dict
        Plain values, ready for JSON.
    """
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
            for mode in answers
        },
    }
