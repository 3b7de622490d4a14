"""Figures of a measurement."""

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from turbosparse.measure.plots import (
    Figures,
    Plot,
    as_floats,
    colour,
    draw_plots,
    layer_axis,
    line_style,
    loss_axis,
    marker,
    percent_axis,
)

__all__ = ["RULE_NAMES", "draw", "trade_off_lines"]

Record = dict[str, Any]

_DENSITY_POINTS = 300


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
    return draw_plots(_FIGURES, records, legend_columns=2 if len(records) == 1 else 1)


def _name(record: Record) -> str:
    return str(record["model"]["name"])


RULE_NAMES = {
    "cett": "CETT",
    "top_k": "top-k",
    "gate_threshold": "gate threshold",
    "gate": "gate > 0",
    "zeros": "nonzero",
}


def trade_off_lines(axes: Any, records: Sequence[Record], cost: str, loss: str) -> None:
    """Draw what each way of leaving out neurons loses against what it computes.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Drawn on.
    records : sequence of dict
        With ``model`` and ``quality`` as a measurement has them.
    cost : str
        Horizontal axis: a field of a quality point with ``value``.
    loss : str
        Vertical axis: a field beside which there is one with ``_se`` behind its name.
    """
    number = 0
    for record in records:
        for kind, label in RULE_NAMES.items():
            points = sorted(
                (point for point in record["quality"] if point["kind"].split("_ppl")[0] == kind),
                key=lambda point: point[cost]["value"],
            )
            if not points:
                continue
            axes.errorbar(
                as_floats([point[cost]["value"] for point in points]),
                as_floats([point[loss] for point in points]),
                yerr=as_floats([point[f"{loss}_se"] for point in points]),
                marker=marker(number),
                label=label if len(records) == 1 else f"{_name(record)}, {label}",
                capsize=2,
                **line_style(number),
            )
            number += 1
    percent_axis(axes.xaxis)
    losses = [point[loss] for record in records for point in record["quality"]]
    if loss == "perplexity_rise":
        axes.set_ylabel("rise of the perplexity")
        loss_axis(axes, losses, 0.1)
        percent_axis(axes.yaxis)
    else:
        axes.set_ylabel("mean KL to dense, nats")
        loss_axis(axes, losses, 0.01)


def _perplexity(axes: Any, records: Sequence[Record]) -> None:
    trade_off_lines(axes, records, "sparsity", "perplexity_rise")
    axes.set_xlabel("sparsity")


def _divergence(axes: Any, records: Sequence[Record]) -> None:
    trade_off_lines(axes, records, "sparsity", "mean_kl")
    axes.set_xlabel("sparsity")


def _layer_means(record: Record, *path: str | int) -> tuple[Any, Any]:
    """A number of each unit, by where it stands, over layers; experts count by their tokens and neurons."""
    layers = sorted({unit["layer"] for unit in record["units"]})
    means = []
    for layer in layers:
        units = [unit for unit in record["units"] if unit["layer"] == layer]
        values = as_floats([functools.reduce(operator.getitem, path, unit) for unit in units])
        weights = as_floats([unit["tokens"] * unit["neurons"] for unit in units])
        weights[np.isnan(values)] = 0
        means.append(np.average(np.nan_to_num(values), weights=weights) if weights.any() else np.nan)
    return layers, as_floats(means)


def _sparsity(axes: Any, records: Sequence[Record]) -> None:
    number = 0
    for record in records:
        prefix = "" if len(records) == 1 else f"{_name(record)}, "
        shown = record["config"]["cett_targets"] if len(records) == 1 else [_active_target(record)]
        for target in shown:
            at = record["cett_targets"].index(target)
            x, y = _layer_means(record, "cett_sparsity", "value", at)
            axes.plot(x, y, label=f"{prefix}CETT {target:g}", **line_style(number))
            number += 1
        x, y = _layer_means(record, "exact_zeros", "value")
        axes.plot(x, y, label=f"{prefix}exact zeros", **line_style(number))
        number += 1
        if len(records) == 1:
            x, y = _layer_means(record, "gate_at_most_zero", "value")
            axes.plot(x, y, label="gate ≤ 0", **line_style(number))
    layer_axis(axes.xaxis)
    axes.set_ylabel("sparsity")
    axes.set_ylim(-0.02, 1.02)
    percent_axis(axes.yaxis)


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
        low, high, counts = (as_floats(layer[kind][name]) for name in ("low", "high", "counts"))
        if not (low < high).any():  # nothing but zeros
            continue
        total = counts.sum()
        zeros = counts[low == high].sum() / total
        inside = np.cumsum(counts) / total
        first, last = np.searchsorted(inside, (0.002, 0.998))
        edges = np.linspace(min(low[first], 0), max(high[min(last, len(high) - 1)], 0), _DENSITY_POINTS)
        below = np.interp(edges, high[low < high], np.cumsum(counts[low < high]))
        density = np.diff(below) / total / np.diff(edges)
        middle = (edges[1:] + edges[:-1]) / 2
        name = f"{label} ({100 * zeros:.0f} % zero)" if zeros > 0.001 else label
        axes.plot(middle, np.where(density > 0, density, np.nan), label=name, **line_style(number))
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
        axes.plot(np.linspace(0, 1, len(shares)), shares, label=label, **line_style(number))
    axes.set_xlabel("neurons, those with the largest outputs first")
    axes.set_ylabel("share of summed ‖output‖")
    for axis in (axes.xaxis, axes.yaxis):
        percent_axis(axis)


def _hotness(axes: Any, records: Sequence[Record]) -> None:
    for number, (label, unit) in enumerate(_shown_units(records)):
        hotness = as_floats(unit["hotness"])
        axes.plot(np.linspace(0, 1, len(hotness)), hotness, label=label, **line_style(number))
    axes.set_xlabel("neurons, hottest first")
    axes.set_ylabel("active on so many tokens")
    for axis in (axes.xaxis, axes.yaxis):
        percent_axis(axis)


def _reuse(axes: Any, records: Sequence[Record]) -> None:
    for number, record in enumerate(records):
        overall, windows = record["overall"], record["windows"]
        shade = colour(number)
        prefix = "" if len(records) == 1 else f"{_name(record)}, "
        reuse = overall["reuse"]
        axes.errorbar(
            windows,
            as_floats(reuse["value"]),
            yerr=as_floats(reuse["standard_error"]),
            color=shade,
            marker="o",
            markersize=3,
            label=f"{prefix}measured",
        )
        chance = as_floats(overall["chance_reuse"]["value"])
        axes.plot(windows, chance, color=shade, linestyle=":", label=f"{prefix}by chance")
    axes.set_xlabel("tokens in the window, this one included")
    axes.set_ylabel("active neurons used before")
    percent_axis(axes.yaxis)


def _union(axes: Any, records: Sequence[Record]) -> None:
    for number, record in enumerate(records):
        shade = colour(number)
        prefix = "" if len(records) == 1 else f"{_name(record)}, "
        for name, style, label in (
            ("union_batch", "-", "unrelated tokens"),
            ("union_consecutive", "--", "consecutive tokens"),
        ):
            union = record["overall"][name]
            axes.errorbar(
                record["union_sizes"],
                as_floats(union["value"]),
                yerr=as_floats(union["standard_error"]),
                color=shade,
                linestyle=style,
                marker="o",
                markersize=3,
                label=prefix + label,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(records[0]["union_sizes"], [str(size) for size in records[0]["union_sizes"]])
    axes.set_xlabel("tokens at once")
    axes.set_ylabel("neurons needed")
    percent_axis(axes.yaxis)


def _coactivation(axes: Any, records: Sequence[Record]) -> None:
    number = 0
    for record in records:
        prefix = "" if len(records) == 1 else f"{_name(record)}, "
        for key, label in (("partner", "most frequent partner"), ("average", "average neuron")):
            x, y = _layer_means(record, "coactivation", key)
            axes.plot(x, y, marker="o", markersize=3, label=prefix + label, **line_style(number))
            number += 1
    layer_axis(axes.xaxis)
    axes.set_ylabel("active with a neuron")
    percent_axis(axes.yaxis)


def _predictability(axes: Any, records: Sequence[Record]) -> None:
    number = 0
    for record in records:
        prefix = "" if len(records) == 1 else f"{_name(record)}, "
        for curve in record.get("predictability", []):
            label = f"{prefix}{curve['name']}, {curve['predictor']}"
            axes.errorbar(
                curve["sparsity"],
                as_floats(curve["recall"]),
                yerr=as_floats(curve["recall_se"]) if "recall_se" in curve else None,
                label=label,
                **line_style(number),
            )
            number += 1
    axes.set_xlabel("predicted sparsity")
    axes.set_ylabel("recall of active neurons")
    for axis in (axes.xaxis, axes.yaxis):
        percent_axis(axis)


def _routing(axes: Any, records: Sequence[Record]) -> None:
    number = 0
    for record in records:
        prefix = "" if len(records) == 1 else f"{_name(record)}, "
        for layer in _spread(record["routing"]):
            load = sorted(layer["load"], reverse=True)
            axes.plot(
                range(1, len(load) + 1), load, label=f"{prefix}layer {layer['layer']}", **line_style(number)
            )
            number += 1
    axes.set_xlabel("experts, busiest first")
    axes.set_ylabel("share of tokens")
    percent_axis(axes.yaxis)


def _spread(layers: Sequence[Record]) -> Sequence[Record]:
    """First, middle and last."""
    return [layers[at] for at in sorted({0, len(layers) // 2, len(layers) - 1})] if layers else []


_FIGURES: Figures = (
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
