"""Figures and tables of studies that train: means over seeds, with standard errors."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.measure.plots import (
    Figures,
    as_floats,
    colour,
    layer_axis,
    line_style,
    marker,
    percent_axis,
    plain_log_ticks,
)
from turbosparse.measure.summary import Cell, Table, uncertain

__all__ = ["FIGURES", "SCALE_FIGURES", "training_tables"]

Record = dict[str, Any]
_Number = Callable[[Record], float | None]

_REUSE_WINDOW = 5
_RECALL = 0.95
_SHOWN_TARGET = 0.1
_SHOWN_BUDGET = 0.01
_FEW = 0.001  # zeros that are no line: a smooth activation has some by rounding


def _groups(record: Mapping[str, Any]) -> dict[str, list[Record]]:
    """Runs that differ by their seed alone."""
    groups: dict[str, list[Record]] = {}
    for run in record["runs"]:
        groups.setdefault(run["group"], []).append(run)
    return groups


def _looks(record: Mapping[str, Any]) -> list[tuple[str, list[Record], int, int]]:
    """Groups with the numbers of their colour and of their dashes: a kind's colour, a size's dashes."""
    groups = _groups(record)
    kinds = list(dict.fromkeys(runs[0]["kind"] for runs in groups.values()))
    shapes = list(dict.fromkeys(_shape(runs[0]) for runs in groups.values()))
    return [
        (
            name,
            runs,
            at := kinds.index(runs[0]["kind"]),
            shapes.index(_shape(runs[0])) if len(shapes) > 1 else at,
        )
        for name, runs in groups.items()
    ]


def _shape(run: Record) -> str:
    """Size of a run's model, where a study has several."""
    return str(run["group"]).removeprefix(str(run["kind"]))


def _mean(runs: Sequence[Record], number: _Number) -> tuple[float | None, float | None]:
    """Mean over seeds, and its standard error where there are two seeds or more."""
    found = [value for run in runs if (value := number(run)) is not None]
    if not found:
        return None, None
    values = as_floats(found)
    spread = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), None if spread is None else float(spread)


def _over_seeds(curves: Sequence[Any]) -> tuple[Any, Any]:
    """Mean and standard error of lists of numbers, one per seed."""
    values: NDArray[np.float64] = as_floats(curves)
    spread = values.std(axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
    return values.mean(axis=0), spread


# Numbers of one run


def loss(run: Record) -> float | None:
    """Give the loss of the whole model.

    Parameters
    ----------
    run : dict
        Of a study that trains.

    Returns
    -------
    float or None
        Nats per token on the measured text.
    """
    return math.log(run["quality"][0]["dense_perplexity"]) if run["quality"] else None


def _over_baseline(record: Mapping[str, Any]) -> _Number | None:
    """Loss less that of the baseline with the same size and seed; None where the baseline was not trained."""
    baseline: dict[tuple[str, int], float] = {}
    for run in record["runs"]:
        found = loss(run)
        if run["kind"] == record["baseline"] and found is not None:
            baseline[_shape(run), run["seed"]] = found
    if not baseline:
        return None

    def gap(run: Record) -> float | None:
        own, other = loss(run), baseline.get((_shape(run), run["seed"]))
        return None if own is None or other is None else own - other

    return gap


def _overall(name: str) -> _Number:
    return lambda run: run["overall"][name]["value"]


def _at_target(target: float) -> _Number:
    def sparsity(run: Record) -> float | None:
        if target not in run["cett_targets"]:
            return None
        found: float = run["overall"]["cett_sparsity"]["value"][run["cett_targets"].index(target)]
        return found

    return sparsity


def _at_budget(budget: float) -> _Number:
    def sparsity(run: Record) -> float | None:
        for found in run["budgets"]:
            if found["budget"] == budget:
                return _at_target(found["cett_target"])(run)
        return None

    return sparsity


def _reuse(run: Record) -> float | None:
    at = run["windows"].index(_REUSE_WINDOW)
    value: float | None = run["overall"]["reuse"]["value"][at]
    return value


def _chance(run: Record) -> float | None:
    value: float | None = run["overall"]["chance_reuse"]["value"][run["windows"].index(_REUSE_WINDOW)]
    return value


def _gap(run: Record) -> float | None:
    value: float | None = run["overall"]["coactivation"]["gap"]
    return value


def _recall_curve(run: Record) -> tuple[list[float], Any] | None:
    """Predicted sparsity and recall of the low-rank predictor, mean over layers."""
    curves = [curve for curve in run["predictability"] if curve["predictor"].startswith("low rank")]
    if not curves:
        return None
    return curves[0]["sparsity"], as_floats([curve["recall"] for curve in curves]).mean(axis=0)


def _predictable(run: Record) -> float | None:
    """Sparsity that is left when a low-rank predictor has to find 95 % of the active neurons."""
    curve = _recall_curve(run)
    if curve is None:
        return None
    sparsity, recall = curve
    return float(np.interp(-_RECALL, -np.maximum.accumulate(recall[::-1])[::-1], sparsity))


_COLUMNS: tuple[tuple[str, _Number, bool], ...] = (
    ("loss, nats", loss, False),
    ("exact zeros", _overall("exact_zeros"), True),
    ("sparsity at CETT 0.1", _at_target(0.1), True),
    ("at CETT 0.2", _at_target(0.2), True),
    ("at CETT-PPL-1%", _at_budget(0.01), True),
    ("at CETT-PPL-5%", _at_budget(0.05), True),
    ("predictable at 95 % recall", _predictable, True),
    ("re-use, window of 5", _reuse, True),
    ("by chance", _chance, True),
    ("co-activation gap", _gap, False),
)


def training_tables(record: Mapping[str, Any]) -> list[Table]:
    """Put the runs of a study side by side.

    Parameters
    ----------
    record : mapping
        ``runs`` as `turbosparse.study.training.run_variants` returns them, and ``baseline``.

    Returns
    -------
    list of Table
        Means over seeds, and every run.
    """
    groups = _groups(record)
    known = [*_COLUMNS]
    gap = _over_baseline(record)
    if gap is not None:
        known.insert(1, (f"less {record['baseline']}'s", gap, False))
    columns = [column for column in known if any(column[1](run) is not None for run in record["runs"])]
    rows = []
    for name, runs in groups.items():
        cells = [_cell(*_mean(runs, number), percent=percent) for _, number, percent in columns]
        rows.append([Cell(name), Cell(f"{runs[0]['parameters'] / 1e6:.2f}", runs[0]["parameters"]), *cells])
    single = [
        [Cell(run["name"]), *(_cell(number(run), None, percent=percent) for _, number, percent in columns)]
        for run in record["runs"]
    ]
    header = [name for name, _, _ in columns]
    predictable = (
        "Predictable: sparsity left when a low-rank predictor of as many bytes as sign bits finds 95 % of "
        "the active neurons. "
        if any(number is _predictable for _, number, _ in columns)
        else ""
    )
    base = record["baseline"]
    less = "" if gap is None else f"Less {base}'s: than the loss of {base} with the same size and seed. "
    seeds = sorted({run["seed"] for run in record["runs"]})
    error = "with the standard error over seeds" if len(seeds) > 1 else "of one seed, so without errors"
    return [
        Table(
            title="Kinds side by side",
            note=f"Means over seeds {', '.join(map(str, seeds))}, {error}. Active neurons are those kept at "
            f"CETT 0.1, whatever the activation. {less}{predictable}Click a column to sort by it.",
            header=["kind", "M parameters", *header],
            rows=rows,
        ),
        Table(title="Every run", note="", header=["run", *header], rows=single),
    ]


def _cell(value: float | None, error: float | None, *, percent: bool) -> Cell:
    return uncertain(value, error, percent=percent)


# Figures


def _loss_by_sparsity(axes: Any, records: Sequence[Record]) -> None:
    for name, runs, number, dashes in _looks(records[0]):
        if not runs[0]["quality"]:
            continue
        points = [point for point in runs[0]["quality"] if point["kind"] == "cett"]
        labels = [point["label"] for point in points]
        sparsity, _ = _over_seeds([[0.0, *_of(run, labels, "sparsity")] for run in runs])
        losses, spread = _over_seeds([[loss(run), *_of(run, labels, "perplexity")] for run in runs])
        axes.errorbar(
            sparsity,
            losses,
            yerr=spread,
            marker=marker(number),
            capsize=2,
            label=name,
            **line_style(number, dashes),
        )
    axes.set_xlabel("sparsity")
    axes.set_ylabel("loss, nats per token")
    percent_axis(axes.xaxis)


def _of(run: Record, labels: Sequence[str], field: str) -> list[float]:
    points = {point["label"]: point for point in run["quality"]}
    if field == "perplexity":
        return [math.log(points[label][field]) for label in labels]
    return [points[label][field]["value"] for label in labels]


def _recall(axes: Any, records: Sequence[Record]) -> None:
    for name, runs, number, dashes in _looks(records[0]):
        curves = [curve for run in runs if (curve := _recall_curve(run)) is not None]
        if curves:
            mean, spread = _over_seeds([recall for _, recall in curves])
            axes.errorbar(curves[0][0], mean, yerr=spread, label=name, **line_style(number, dashes))
    axes.set_xlabel("predicted sparsity")
    axes.set_ylabel("recall of active neurons")
    for axis in (axes.xaxis, axes.yaxis):
        percent_axis(axis)


def _reuse_lines(axes: Any, records: Sequence[Record]) -> None:
    for name, runs, number, dashes in _looks(records[0]):
        mean, spread = _over_seeds([run["overall"]["reuse"]["value"] for run in runs])
        chance, _ = _over_seeds([run["overall"]["chance_reuse"]["value"] for run in runs])
        axes.errorbar(
            runs[0]["windows"], mean - chance, yerr=spread, label=name, **line_style(number, dashes)
        )
    axes.set_xlabel("tokens in the window, this one included")
    axes.set_ylabel("re-use above chance")
    percent_axis(axes.yaxis)


def _dots(axes: Any, record: Record, number: _Number) -> None:
    """One dot with an error bar per group."""
    looks = _looks(record)
    for at, (_, runs, number_of_colour, _) in enumerate(looks):
        mean, spread = _mean(runs, number)
        if mean is not None:
            axes.errorbar(mean, at, xerr=spread, marker="o", capsize=3, color=colour(number_of_colour))
    axes.set_yticks(range(len(looks)), [name for name, *_ in looks])
    axes.invert_yaxis()


def _gaps(axes: Any, records: Sequence[Record]) -> None:
    _dots(axes, records[0], _gap)
    axes.set_xlabel("co-activation gap")


def _budget_dots(axes: Any, records: Sequence[Record]) -> None:
    _dots(axes, records[0], _at_budget(_SHOWN_BUDGET))
    axes.set_xlabel("sparsity at which the perplexity rises by 1 %")
    percent_axis(axes.xaxis)


def _learning(axes: Any, records: Sequence[Record], field: str) -> None:
    for name, runs, number, dashes in _looks(records[0]):
        shortest = min(len(run["curve"]) for run in runs)
        if field == "zeros" and all(point["zeros"] < _FEW for run in runs for point in run["curve"]):
            continue
        mean, spread = _over_seeds(
            [[point.get(field, math.nan) for point in run["curve"][:shortest]] for run in runs]
        )
        tokens = [point["tokens"] / 1e6 for point in runs[0]["curve"][:shortest]]
        axes.errorbar(tokens, mean, yerr=spread, label=name, **line_style(number, dashes))
    axes.set_xlabel("million tokens trained on")


def _learning_curve(axes: Any, records: Sequence[Record]) -> None:
    _learning(axes, records, "perplexity")
    axes.set_ylabel("held-out perplexity")
    axes.set_yscale("log")
    plain_log_ticks(axes.yaxis)


def _zeros_curve(axes: Any, records: Sequence[Record]) -> None:
    _learning(axes, records, "zeros")
    axes.set_ylabel("exact zeros")
    percent_axis(axes.yaxis)


def _zeros_by_layer(axes: Any, records: Sequence[Record]) -> None:
    for name, runs, number, dashes in _looks(records[0]):
        mean, spread = _over_seeds([run["zeros_per_layer"] for run in runs])
        if np.any(mean >= _FEW):
            axes.errorbar(range(len(mean)), mean, yerr=spread, label=name, **line_style(number, dashes))
    layer_axis(axes.xaxis)
    axes.set_ylabel("exact zeros")
    percent_axis(axes.yaxis)


FIGURES: Figures = (
    (
        "loss_by_sparsity",
        "Loss against sparsity: the whole model at 0, then CETT targets. Bars: standard errors over seeds.",
        _loss_by_sparsity,
    ),
    ("sparsity_at_1_percent", "Sparsity at CETT-PPL-1%.", _budget_dots),
    ("predictability", "Recall of low-rank predictors as large as sign bits, mean of layers.", _recall),
    ("reuse", "Active neurons that a token before used too, less what chance gives.", _reuse_lines),
    ("coactivation", "A neuron's most frequent partner against its average one.", _gaps),
    ("learning", "Held-out perplexity while training.", _learning_curve),
    ("zeros", "Share of exact zeros while training.", _zeros_curve),
    ("zeros_by_layer", "Share of exact zeros of the layers.", _zeros_by_layer),
)


def _by_size(axes: Any, record: Record, number: _Number) -> None:
    kinds: dict[str, list[list[Record]]] = {}
    for runs in _groups(record).values():
        kinds.setdefault(runs[0]["kind"], []).append(runs)
    for at, (kind, sizes) in enumerate(kinds.items()):
        ordered = sorted(sizes, key=lambda runs: int(runs[0]["parameters"]))
        means = [_mean(runs, number) for runs in ordered]
        axes.errorbar(
            [runs[0]["parameters"] for runs in ordered],
            as_floats([mean for mean, _ in means]),
            yerr=as_floats([spread or 0.0 for _, spread in means]),
            marker=marker(at),
            capsize=2,
            label=kind,
            **line_style(at),
        )
    axes.set_xscale("log")
    ticks = {f"{run['parameters'] / 1e6:.2g}": run["parameters"] for run in record["runs"]}
    axes.set_xticks(list(ticks.values()), list(ticks))
    axes.set_xticks([], minor=True)
    axes.set_xlabel("million parameters")


def _sparsity_by_size(axes: Any, records: Sequence[Record]) -> None:
    _by_size(axes, records[0], _at_target(_SHOWN_TARGET))
    axes.set_ylabel(f"sparsity at CETT {_SHOWN_TARGET:g}")
    percent_axis(axes.yaxis)


def _budget_by_size(axes: Any, records: Sequence[Record]) -> None:
    _by_size(axes, records[0], _at_budget(_SHOWN_BUDGET))
    axes.set_ylabel("sparsity at CETT-PPL-1%")
    percent_axis(axes.yaxis)


def _gap_by_size(axes: Any, records: Sequence[Record]) -> None:
    [record] = records
    gap = _over_baseline(record)
    if gap is not None:
        _by_size(axes, record, gap)
    axes.set_ylabel(f"loss less that of {record['baseline']}, nats")


SCALE_FIGURES: Figures = (
    ("sparsity_by_size", "Sparsity at CETT 0.1 by the size of the model.", _sparsity_by_size),
    (
        "gap_by_size",
        "Loss less that of the baseline of the same size and seed, by the size of the model.",
        _gap_by_size,
    ),
    (
        "sparsity_at_1_percent_by_size",
        "Sparsity at which the perplexity rises by 1 %, by the size of the model.",
        _budget_by_size,
    ),
    *(figure for figure in FIGURES if figure[0] not in ("sparsity_at_1_percent", "coactivation")),
)
