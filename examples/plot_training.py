"""Draw how the held-out perplexity of a `sparsify` run fell, as a multiple of the original model's.

    python examples/plot_training.py runs/mine/metrics.jsonl curve.png

Needs turbosparse[report]. Stages follow one another; a dotted line stands where one ends.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from turbosparse.measure.plots import draw_plots, line_style, marker


def main() -> None:
    """Read metrics, write a PNG."""
    parser = argparse.ArgumentParser(description="Draw the held-out perplexity of a training run.")
    parser.add_argument("metrics", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.metrics.read_text(encoding="utf-8").splitlines()]
    original = {
        name: value for line in lines if line.get("event") == "original" for name, value in line.items()
    }
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    ends = stage_ends(lines)
    begin = dict(zip(ends, [0.0, *ends.values()], strict=False))
    for line in lines:
        if line.get("event") == "evaluation":
            tokens = begin[line["stage"]] + line["tokens"]
            for name, value in line.items():
                if name in original and name.startswith("perplexity_"):
                    curves[name.removeprefix("perplexity_")].append((tokens, value / original[name]))

    def paint(axes: Any, records: Any) -> None:
        del records
        for number, (name, points) in enumerate(curves.items()):
            tokens, ratios = zip(*sorted(points), strict=True)
            label = name.replace("_", " ")
            axes.plot(
                [count / 1e6 for count in tokens],
                ratios,
                label=label,
                marker=marker(number),
                markersize=4,
                **line_style(number),
            )
        for end in list(ends.values())[:-1]:
            axes.axvline(end / 1e6, color="#8c8c8c", linestyle=":", linewidth=1)
        axes.axhline(1, color="#000000", linewidth=0.8)
        axes.set_xlabel("million tokens of training")
        axes.set_ylabel("perplexity / original's")

    (plot,) = draw_plots([("curve", "", paint)], [{}], legend_columns=2)
    options.target.write_bytes(plot.png)


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
