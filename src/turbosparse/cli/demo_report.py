"""What ``turbosparse demo`` shows: the chart of its layers, both answers with their speed, the quality."""

import statistics
from typing import TYPE_CHECKING

from turbosparse.cli.console import plain_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from turbosparse._native import Mode
    from turbosparse.runtime.engine import Model
    from turbosparse.runtime.generation import GenerationStats
    from turbosparse.runtime.perplexity import ModeComparison

    Answers = dict[Mode, list[tuple[str, GenerationStats]]]
    Judged = dict[Mode, ModeComparison]

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


def _ratio(answers: "Answers", mode: "Mode") -> float:
    """Speed of a mode relative to dense."""
    pairs = zip(answers[mode], answers["dense"], strict=True)
    return statistics.median(
        (a.decode_tok_per_s or 0.0) / (b.decode_tok_per_s or 1.0) for (_, a), (_, b) in pairs
    )


def show_layers(out: "Console", judged: "Judged") -> None:
    """Draw how many neurons each layer leaves out, in the mode that leaves out most.

    Parameters
    ----------
    out : rich.console.Console
        Where to write.
    judged : dict of str to ModeComparison
        Each sparse mode on held-out text.
    """
    mode, best = min(judged.items(), key=lambda item: item[1].result.active_ratio)
    out.print(f"\n[bold]Neurons left out per layer[/] (mode {mode}, on a book)\n")
    for line in bar_chart([1 - share for share in best.result.active_per_layer]):
        out.print(line, markup=False)
    out.print(f"Mean: {1 - best.result.active_ratio:.0%} of the neurons are skipped.")


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
        timed = mode != "dense" and _speed(rounds) > 0 and _speed(answers["dense"]) > 0
        ratio = f", {_ratio(answers, mode):.2f}x dense" if timed else ""
        out.print(f"\n[bold]{mode}[/]  {_speed(rounds):.1f} tok/s{ratio}{read}")
        same = mode != "dense" and text == answers["dense"][-1][0]
        out.print("(the same text)" if same else text.strip() or "(ended at once)", markup=False)
    out.print(
        f"\n[bold]Speed[/]  {model.engine.threads} threads, {model.engine.isa}; median of "
        f"{len(answers['dense'])} rounds in turn"
    )


def show_quality(out: "Console", model: "Model", judged: "Judged") -> None:
    """Show what the sparsity cost.

    Parameters
    ----------
    out : rich.console.Console
        Where to write.
    model : Model
        What was judged.
    judged : dict of str to ModeComparison
        Each sparse mode on held-out text.
    """
    dense = next(iter(judged.values())).baseline
    out.print(
        f"[bold]Quality[/]  perplexity on {dense.tokens} tokens of a book that no threshold was found on: "
        f"dense {dense.perplexity:.2f}"
    )
    for mode, found in judged.items():
        out.print(
            f"         {mode} {found.result.perplexity:.2f} ({found.perplexity_ratio - 1:+.1%}), same "
            f"likeliest token {found.same_top_1:.0%}"
        )
    if model.info.activation in {"silu", "gelu"}:
        out.print(
            f"[bold]Note[/]  this model uses {model.info.activation}: no activation is exactly zero, so "
            "every neuron left out costs a little, and the gain is modest. Models made with a ReLU-like "
            "activation skip far more."
        )


def demo_record(path: "Path", answers: "Answers", judged: "Judged") -> dict[str, object]:
    """Collect what the demo found.

    Parameters
    ----------
    path : Path
        The file that ran.
    answers : dict of str to list of (str, GenerationStats)
        Text and statistics of each round, by mode.
    judged : dict of str to ModeComparison
        Each sparse mode on held-out text.

    Returns
    -------
    dict
        Plain values, ready for JSON: the model, and under each mode what was measured.
    """
    results = {"dense": next(iter(judged.values())).baseline}
    results |= {mode: found.result for mode, found in judged.items()}
    record: dict[str, object] = {"model": str(path)}
    for mode, rounds in answers.items():
        record[mode] = {
            "text": rounds[-1][0],
            "tok_per_s": _speed(rounds),
            "ratio_to_dense": _ratio(answers, mode),
            "bytes_per_token": rounds[-1][1].bytes_per_token,
            "active_ratio": results[mode].active_ratio,
            "sparsity_per_layer": [1 - share for share in results[mode].active_per_layer],
            "perplexity": results[mode].perplexity,
            **(
                {
                    "perplexity_ratio": judged[mode].perplexity_ratio,
                    "mean_kl": judged[mode].mean_kl,
                    "same_top_1": judged[mode].same_top_1,
                }
                if mode in judged
                else {}
            ),
        }
    return record
