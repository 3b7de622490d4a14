r"""Draw how the held-out perplexity of a `sparsify` run fell, as a multiple of the original model's.

    python examples/plot_training.py runs/mine/metrics.jsonl curve.svg
    python examples/plot_training.py runs/mine/metrics.jsonl curve.png --texts book \
      --control runs/control/metrics.jsonl

Needs turbosparse[report]. Stages follow one another; a dotted line stands where one ends. A control (what
`train-control` left) is drawn thin, without marks.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from turbosparse.measure.plots import draw_plots, line_style, marker, plain_log_ticks

PREFIX = "perplexity_"


def main() -> None:
    """Read metrics, write an SVG or a PNG."""
    parser = argparse.ArgumentParser(description="Draw the held-out perplexity of a training run.")
    parser.add_argument("metrics", type=Path)
    parser.add_argument("target", type=Path, help="an .svg or a .png")
    parser.add_argument("--control", type=Path, help="metrics of the control")
    parser.add_argument("--texts", help="held-out texts to draw, with commas between; all by default")
    options = parser.parse_args()
    lines = read_lines(options.metrics)
    texts = options.texts.split(",") if options.texts else None
    originals = read_originals(lines)
    curves = read_curves(lines, originals, texts)
    control = read_lines(options.control) if options.control else []
    controls = read_curves(control, read_originals(control), texts)  # over the original on its own windows

    def paint(axes: Any, records: Any) -> None:
        del records
        for number, (name, points) in enumerate(curves.items()):
            draw = {"marker": marker(number), "markersize": 4, **line_style(number)}
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), **draw)
            if name in controls:
                thin = draw | {"linewidth": 1, "marker": ""}
                axes.plot(
                    *zip(*controls[name], strict=True), label=f"{name.replace('_', ' ')}, control", **thin
                )
        for end in list(stage_ends(lines).values())[:-1]:
            axes.axvline(end / 1e6, color="#8c8c8c", linestyle=":", linewidth=1)
        axes.axhline(1, color="#000000", linewidth=0.8)
        axes.set_xlabel("million tokens of training")
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
        axes.set_ylabel("perplexity / original's")

    (plot,) = draw_plots([("curve", "", paint)], [{}], legend_columns=2)
    options.target.write_bytes(plot.svg if options.target.suffix == ".svg" else plot.png)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Give the records of a run's metrics."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_originals(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Give what the original was evaluated as in each stage, or in the one before it."""
    found: dict[str, dict[str, Any]] = {}
    latest: dict[str, Any] = {}
    for line in lines:
        if line.get("event") == "original":
            latest = latest | line
        found[line["stage"]] = latest
    return found


def read_curves(
    lines: list[dict[str, Any]], originals: dict[str, dict[str, Any]], texts: list[str] | None
) -> dict[str, list[tuple[float, float]]]:
    """Give (million tokens, perplexity over the original's) by text."""
    ends = stage_ends(lines)
    begin = dict(zip(ends, [0.0, *ends.values()], strict=False))
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in lines:
        if line.get("event") == "evaluation":
            tokens = (begin[line["stage"]] + line["tokens"]) / 1e6
            original = originals[line["stage"]]
            for key in (key for key in line if key.startswith(PREFIX) and key in original):
                name = key.removeprefix(PREFIX)
                if texts is None or name in texts:
                    curves[name].append((tokens, line[key] / original[key]))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in curves.items()}


def stage_ends(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Give the tokens that were trained on when each stage ended, by its name, in order."""
    own: dict[str, float] = {}
    for line in lines:
        own[line["stage"]] = max(own.get(line["stage"], 0.0), line.get("tokens", 0.0))
    total, ends = 0.0, {}
    for stage, tokens in own.items():
        total += tokens
        ends[stage] = total
    return ends


if __name__ == "__main__":
    main()
