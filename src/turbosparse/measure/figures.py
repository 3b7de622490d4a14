"""Plots of a report, by matplotlib: one panel each, small enough to be read on a phone.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart; lines differ in
style as well, so that they survive a black-and-white printer.
"""

import functools
import io
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

__all__ = ["Plot", "draw"]

Record = dict[str, Any]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C8C8C")
_STYLES = ("-", "--", "-.", ":")
_SIZE = (5.2, 3.5)  # inches: 500 pixels of a page, so letters stay legible when a phone shrinks it
_SETTINGS = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "turbosparse",
}
_DENSITY_POINTS = 300


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawn figure."""

    name: str
    """File name without suffix."""
    caption: str
    svg: bytes
    png: bytes

    def save(self, folder: Path) -> None:
        """Write the PNG.

        Parameters
        ----------
        folder : Path
            Where.
        """
        (folder / f"{self.name}.png").write_bytes(self.png)


def draw(records: Sequence[Record]) -> list[Plot]:
    """Draw every figure of a report.

    Parameters
    ----------
    records : sequence of dict
        Measurements: of one, figures show its layers; of several, the models side by side.

    Returns
    -------
    list of Plot
        Those there are numbers for.
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    plots = []
    for name, caption, paint in _FIGURES:
        with mpl.rc_context(_SETTINGS):
            figure = Figure(figsize=_SIZE, layout="constrained")
            axes = figure.add_subplot()
            paint(axes, records)
            if not axes.has_data():
                continue
            if axes.get_legend_handles_labels()[0]:
                columns = 2 if len(records) == 1 else 1
                figure.legend(loc="outside lower center", ncols=columns)
            plots.append(Plot(name=name, caption=caption, svg=_as(figure, "svg"), png=_as(figure, "png")))
    return plots


def _as(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _line(number: int) -> dict[str, Any]:
    """Look of the n-th line."""
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _STYLES[number % len(_STYLES)]}


def _floats(values: Any) -> Any:
    """An array with NaN for what has no number."""
    return np.array(values, dtype=np.float64)


def _name(record: Record) -> str:
    return str(record["model"]["name"])


_KINDS = {"cett": "CETT", "top_k": "top-k", "gate": "gate > 0", "zeros": "nonzero"}


def _trade_off(axes: Any, records: Sequence[Record], value: str, error: str) -> None:
    number = 0
    for record in records:
        for kind, label in _KINDS.items():
            points = sorted(
                (point for point in record["quality"] if point["kind"].split("_ppl")[0] == kind),
                key=lambda point: point["sparsity"]["value"],
            )
            if not points:
                continue
            x = _floats([point["sparsity"]["value"] for point in points])
            y = _floats([point[value] for point in points])
            spread = _floats([point[error] for point in points])
            name = label if len(records) == 1 else f"{_name(record)}, {label}"
            axes.errorbar(
                x, y, yerr=spread, marker="o^sD"[number % 4], label=name, capsize=2, **_line(number)
            )
            number += 1
    axes.set_xlabel("sparsity")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _perplexity(axes: Any, records: Sequence[Record]) -> None:
    _trade_off(axes, records, "perplexity_rise", "perplexity_rise_se")
    axes.set_ylabel("rise of the perplexity")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _divergence(axes: Any, records: Sequence[Record]) -> None:
    _trade_off(axes, records, "mean_kl", "mean_kl_se")
    axes.set_ylabel("mean KL to dense, nats")
    axes.set_yscale("symlog", linthresh=0.01)


def _layer_means(record: Record, *path: str | int) -> tuple[Any, Any]:
    """A number of each unit, by where it stands, over layers; experts of a layer are averaged."""
    layers = sorted({unit["layer"] for unit in record["units"]})
    means = []
    for layer in layers:
        values = _floats(
            [
                functools.reduce(operator.getitem, path, unit)
                for unit in record["units"]
                if unit["layer"] == layer
            ]
        )
        values = values[~np.isnan(values)]
        means.append(values.mean() if len(values) else np.nan)
    return layers, _floats(means)


def _sparsity(axes: Any, records: Sequence[Record]) -> None:
    number = 0
    for record in records:
        prefix = "" if len(records) == 1 else f"{_name(record)}, "
        shown = record["config"]["cett_targets"] if len(records) == 1 else [_active_target(record)]
        for target in shown:
            at = record["cett_targets"].index(target)
            x, y = _layer_means(record, "cett_sparsity", "value", at)
            axes.plot(x, y, label=f"{prefix}CETT {target:g}", **_line(number))
            number += 1
        x, y = _layer_means(record, "exact_zeros", "value")
        axes.plot(x, y, label=f"{prefix}exact zeros", **_line(number))
        number += 1
        if len(records) == 1:
            x, y = _layer_means(record, "gate_at_most_zero", "value")
            axes.plot(x, y, label="gate ≤ 0", **_line(number))
    axes.set_xlabel("layer")
    axes.set_ylabel("sparsity")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _active_target(record: Record) -> float:
    """The CETT target that one line stands for."""
    targets: list[float] = record["config"]["cett_targets"]
    return float(record["config"]["active"] or targets[len(targets) // 2])


def _shown_histograms(records: Sequence[Record]) -> Iterator[tuple[str, Record]]:
    """Layers of one model, or the middle layer of each."""
    for record in records:
        shown = record["histograms"]
        if len(records) == 1:
            yield from ((layer["name"], layer) for layer in shown)
        else:
            middle = shown[len(shown) // 2]
            yield f"{_name(record)}, {middle['name']}", middle


def _density(axes: Any, records: Sequence[Record], kind: str) -> None:
    """Density over a linear axis, from bins whose width grows with the value."""
    for number, (label, layer) in enumerate(_shown_histograms(records)):
        low, high, counts = (_floats(layer[kind][name]) for name in ("low", "high", "counts"))
        total = counts.sum()
        zeros = counts[low == high].sum() / total
        inside = np.cumsum(counts) / total
        first, last = np.searchsorted(inside, (0.002, 0.998))
        edges = np.linspace(min(low[first], 0), max(high[min(last, len(high) - 1)], 0), _DENSITY_POINTS)
        below = np.interp(edges, high[low < high], np.cumsum(counts[low < high]))
        density = np.diff(below) / total / np.diff(edges)
        middle = (edges[1:] + edges[:-1]) / 2
        name = f"{label} ({100 * zeros:.0f} % zero)" if zeros > 0.001 else label
        axes.plot(middle, np.where(density > 0, density, np.nan), label=name, **_line(number))
    axes.set_yscale("log")
    axes.set_ylabel("density")


def _gate(axes: Any, records: Sequence[Record]) -> None:
    _density(axes, records, "gate")
    axes.set_xlabel("f(gate)")


def _up(axes: Any, records: Sequence[Record]) -> None:
    _density(axes, records, "up")
    axes.set_xlabel("g(up)")


def _combined(axes: Any, records: Sequence[Record]) -> None:
    _density(axes, records, "combined")
    axes.set_xlabel("f(gate) · g(up)")


def _shown_units(records: Sequence[Record]) -> Iterator[tuple[str, Record]]:
    for record in records:
        names = [layer["name"] for layer in record["histograms"]]
        units = [unit for unit in record["units"] if unit["name"] in names]
        if len(records) == 1:
            yield from ((unit["name"], unit) for unit in units)
        else:
            yield f"{_name(record)}, {units[len(units) // 2]['name']}", units[len(units) // 2]


def _norms(axes: Any, records: Sequence[Record]) -> None:
    for number, (label, unit) in enumerate(_shown_units(records)):
        shares = unit["norm_share_of_largest"]
        axes.plot(np.linspace(0, 1, len(shares)), shares, label=label, **_line(number))
    axes.set_xlabel("neurons, those with the largest outputs first")
    axes.set_ylabel("share of summed ‖output‖")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))


def _hotness(axes: Any, records: Sequence[Record]) -> None:
    for number, (label, unit) in enumerate(_shown_units(records)):
        axes.plot(np.linspace(0, 1, len(unit["hotness"])), unit["hotness"], label=label, **_line(number))
    axes.set_xlabel("neurons, hottest first")
    axes.set_ylabel("active on so many tokens")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))


def _reuse(axes: Any, records: Sequence[Record]) -> None:
    for number, record in enumerate(records):
        overall, windows = record["overall"], record["windows"]
        colour = _COLOURS[number % len(_COLOURS)]
        prefix = "" if len(records) == 1 else f"{_name(record)}, "
        reuse = overall["reuse"]
        axes.errorbar(
            windows,
            _floats(reuse["value"]),
            yerr=_floats(reuse["standard_error"]),
            color=colour,
            marker="o",
            markersize=3,
            label=f"{prefix}measured",
        )
        chance = _floats(overall["chance_reuse"]["value"])
        axes.plot(windows, chance, color=colour, linestyle=":", label=f"{prefix}by chance")
    axes.set_xlabel("tokens in the window, this one included")
    axes.set_ylabel("active neurons used before")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _union(axes: Any, records: Sequence[Record]) -> None:
    for number, record in enumerate(records):
        colour = _COLOURS[number % len(_COLOURS)]
        prefix = "" if len(records) == 1 else f"{_name(record)}, "
        for name, style, label in (
            ("union_batch", "-", "unrelated tokens"),
            ("union_consecutive", "--", "consecutive tokens"),
        ):
            union = record["overall"][name]
            axes.errorbar(
                record["union_sizes"],
                _floats(union["value"]),
                yerr=_floats(union["standard_error"]),
                color=colour,
                linestyle=style,
                marker="o",
                markersize=3,
                label=prefix + label,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(records[0]["union_sizes"], [str(size) for size in records[0]["union_sizes"]])
    axes.set_xlabel("tokens at once")
    axes.set_ylabel("neurons needed")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _coactivation(axes: Any, records: Sequence[Record]) -> None:
    number = 0
    for record in records:
        prefix = "" if len(records) == 1 else f"{_name(record)}, "
        for key, label in (("partner", "most frequent partner"), ("average", "average neuron")):
            x, y = _layer_means(record, "coactivation", key)
            axes.plot(x, y, marker="o", markersize=3, label=prefix + label, **_line(number))
            number += 1
    axes.set_xlabel("layer")
    axes.set_ylabel("active with a neuron")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _predictability(axes: Any, records: Sequence[Record]) -> None:
    number = 0
    for record in records:
        prefix = "" if len(records) == 1 else f"{_name(record)}, "
        for curve in record.get("predictability", []):
            label = f"{prefix}{curve['name']}, {curve['predictor']}"
            axes.plot(curve["sparsity"], curve["recall"], label=label, **_line(number))
            number += 1
    axes.set_xlabel("predicted sparsity")
    axes.set_ylabel("recall of active neurons")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))


def _routing(axes: Any, records: Sequence[Record]) -> None:
    number = 0
    for record in records:
        prefix = "" if len(records) == 1 else f"{_name(record)}, "
        for layer in _spread(record["routing"]):
            load = sorted(layer["load"], reverse=True)
            axes.plot(range(1, len(load) + 1), load, label=f"{prefix}layer {layer['layer']}", **_line(number))
            number += 1
    axes.set_xlabel("experts, busiest first")
    axes.set_ylabel("share of tokens")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _spread(layers: Sequence[Record]) -> Sequence[Record]:
    """First, middle and last."""
    return [layers[at] for at in sorted({0, len(layers) // 2, len(layers) - 1})] if layers else []


_FIGURES: tuple[tuple[str, str, Callable[[Any, Sequence[Record]], None]], ...] = (
    (
        "perplexity",
        "Rise of the perplexity against sparsity, for each way of choosing neurons. Linear below 10 %.",
        _perplexity,
    ),
    ("kl", "Mean KL of next-token distributions to the dense model's. Linear below 0.01 nats.", _divergence),
    ("sparsity", "Sparsity of the layers by its different definitions.", _sparsity),
    (
        "norms",
        "Long tail of neuron outputs: how much of the summed norms the largest have.",
        _norms,
    ),
    ("gate", "Distribution of the gate behind its activation function.", _gate),
    ("up", "Distribution of the up projection.", _up),
    ("combined", "Distribution of activations, the product of both.", _combined),
    ("hotness", "How often neurons are active, by rank.", _hotness),
    (
        "reuse",
        "Active neurons that a token before, in the window, used too; by chance: with tokens independent.",
        _reuse,
    ),
    ("union", "Neurons that at least one of several tokens needs.", _union),
    (
        "coactivation",
        "How often other neurons are active together with a neuron: its most frequent partner, and the mean.",
        _coactivation,
    ),
    ("predictability", "Recall of predictors of equal bytes by how few neurons they name.", _predictability),
    ("routing", "Load of the experts.", _routing),
)
