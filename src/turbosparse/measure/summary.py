"""Tables of a report: the same rows for the page and for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Cell", "Table", "overall_table", "quality_table", "tables", "uncertain"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What is shown, and what it sorts by."""

    text: str
    key: float | str | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under a header."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def uncertain(value: float | None, error: float | None, *, percent: bool = False) -> Cell:
    """Write a number with its standard error.

    Parameters
    ----------
    value, error : float or None
        None where there is no number.
    percent : bool
        Whether both are shares, to be shown in percent.

    Returns
    -------
    Cell
        Digits as the error allows: ``49.10 ± 0.30 %``.
    """
    if value is None:
        return Cell("–")
    scale, unit = (100.0, " %") if percent else (1.0, "")
    if not error:
        digits = 1 if percent else 3
        return Cell(f"{scale * value:.{digits}f}{unit}", value)
    digits = 0
    while digits < 5 and scale * error < 2 * 10**-digits:
        digits += 1
    return Cell(f"{scale * value:.{digits}f} ± {scale * error:.{digits}f}{unit}", value)


def _share(number: Record, at: int | None = None) -> Cell:
    value, error = number["value"], number["standard_error"]
    if at is not None:
        value, error = value[at], error[at]
    return uncertain(value, error, percent=True)


def _at(record: Record, axis: str, value: float) -> int | None:
    return record[axis].index(value) if value in record[axis] else None


def _metrics(record: Record) -> dict[str, Cell]:
    """Numbers of a whole model by what they are called."""
    overall = record["overall"]
    rows = {"exact zeros": _share(overall["exact_zeros"])}
    for at, target in enumerate(record["cett_targets"]):
        if target in record["config"]["cett_targets"]:
            rows[f"sparsity at CETT {target:g}"] = _share(overall["cett_sparsity"], at)
    for budget in record["budgets"]:
        at = record["cett_targets"].index(budget["cett_target"])
        name = f"sparsity at CETT-PPL-{100 * budget['budget']:g}%"
        cell = _share(overall["cett_sparsity"], at)
        rows[name] = Cell(f"{cell.text} (CETT {budget['cett_target']:g})", cell.key)
    rows["gate ≤ 0"] = _share(overall["gate_at_most_zero"])
    rows["active neurons"] = _share(overall["active_share"])
    rows["neurons that carry 80 % of activations"] = _share(overall["carrying_80_percent"])
    rows["neurons active on 90 % of tokens"] = _share(overall["hot_share"])
    rows["neurons never active"] = _share(overall["never_active_share"])
    for window in (2, 5, 16):
        at = record["windows"].index(window)
        chance = _share(overall["chance_reuse"], at).text.split(" ±")[0].removesuffix(" %")
        cell = _share(overall["reuse"], at)
        rows[f"re-use, window of {window}"] = Cell(f"{cell.text} (by chance {chance} %)", cell.key)
    for size in (8, 32, 128):
        found = _at(record, "union_sizes", size)
        rows[f"union of {size} unrelated tokens"] = _share(overall["union_batch"], found)
        rows[f"union of {size} consecutive tokens"] = _share(overall["union_consecutive"], found)
    gap = overall["coactivation"]
    rows["co-activation gap"] = uncertain(gap["gap"], gap["standard_error"])
    return rows


def overall_table(records: Sequence[Record]) -> Table:
    """Put the numbers of whole models side by side.

    Parameters
    ----------
    records : sequence of dict
        Measurements.

    Returns
    -------
    Table
        One row per number, one column per model.
    """
    columns = [_metrics(record) for record in records]
    names = sorted(dict.fromkeys(name for column in columns for name in column), key=_rank)
    return Table(
        title="The whole model",
        note="Means over layers with standard errors (jackknife over groups of windows). Active means: "
        + "; ".join(dict.fromkeys(_active_text(record) for record in records))
        + ".",
        header=["", *(record["model"]["name"] for record in records)],
        rows=[[Cell(name), *(column.get(name, Cell("–")) for column in columns)] for name in names],
    )


def _rank(name: str) -> int:
    """Rows that not every model has stay beside their like."""
    return 0 if name == "exact zeros" else 1 if name.startswith("sparsity") else 2


def _active_text(record: Record) -> str:
    active = record["config"]["active"]
    return "not exactly zero" if active is None else f"kept at CETT {active:g}"


def quality_table(records: Sequence[Record]) -> Table:
    """List what each way of leaving out neurons costs.

    Parameters
    ----------
    records : sequence of dict
        Measurements.

    Returns
    -------
    Table
        One row per model and point.
    """
    rows = [
        [
            *([Cell(record["model"]["name"])] if len(records) > 1 else []),
            Cell(point["label"]),
            _share(point["sparsity"]),
            uncertain(point["perplexity"], point["perplexity_se"]),
            uncertain(point["perplexity_rise"], point["perplexity_rise_se"], percent=True),
            uncertain(point["mean_kl"], point["mean_kl_se"]),
            uncertain(point["kl_99_percentile"], None),
            uncertain(point["max_kl"], None),
            uncertain(point["same_top_1"], point["same_top_1_se"], percent=True),
        ]
        for record in records
        for point in record["quality"]
    ]
    dense = "; ".join(
        f"{record['model']['name']} "
        f"{uncertain(point['dense_perplexity'], point['dense_perplexity_se']).text} "
        f"on {point['tokens']} scored tokens"
        for record in records
        for point in record["quality"][:1]
    )
    return Table(
        title="What leaving out neurons costs",
        note=f"Perplexity of the dense model: {dense}. Rise and KL are against it, token by token.",
        header=[
            *(["model"] if len(records) > 1 else []),
            *("kept", "sparsity", "perplexity", "rise", "KL mean", "KL 99 %", "KL max", "same top-1"),
        ],
        rows=rows,
    )


def _unit_table(record: Record) -> Table:
    targets = [target for target in record["cett_targets"] if target in record["config"]["cett_targets"]]
    at = [record["cett_targets"].index(target) for target in targets]
    window = record["windows"].index(5)
    rows = [
        [
            Cell(unit["name"], number),
            Cell(f"{unit['tokens']}", unit["tokens"]),
            _share(unit["exact_zeros"]),
            *(_share(unit["cett_sparsity"], index) for index in at),
            _share(unit["gate_at_most_zero"]),
            _share(unit["carrying_80_percent"]),
            _share(unit["reuse"], window),
            uncertain(unit["coactivation"]["gap"], unit["coactivation"]["standard_error"]),
        ]
        for number, unit in enumerate(record["units"])
    ]
    return Table(
        title=f"Layers of {record['model']['name']}",
        note="Click a column to sort by it.",
        header=[
            *("layer", "tokens", "exact zeros"),
            *(f"CETT {target:g}" for target in targets),
            *("gate ≤ 0", "carry 80 %", "re-use, 5", "gap"),
        ],
        rows=rows,
    )


def _threshold_table(record: Record) -> Table:
    rows = [
        [
            Cell(unit["name"], number),
            Cell(f"{found['target']:g}", found["target"]),
            Cell(f"{found['eps']:.4g}", found["eps"]),
            Cell(f"{found['cett']:.4f}", found["cett"]),
            uncertain(found["checked_cett"], found["checked_cett_se"]),
            Cell(f"{unit['sample_tokens']}", unit["sample_tokens"]),
        ]
        for number, unit in enumerate(record["units"])
        for found in unit["thresholds"]
    ]
    return Table(
        title=f"Thresholds of {record['model']['name']}",
        note="eps bounds the norm of a neuron's output. It was found on a sample; other tokens check it.",
        header=["layer", "CETT target", "eps", "CETT reached", "CETT on other tokens", "tokens"],
        rows=rows,
    )


def _top_k_table(record: Record) -> Table:
    shares = list(dict.fromkeys(record["config"]["top_k"]))
    return Table(
        title=f"Error of the top-k rule in {record['model']['name']}",
        note="CETT when each token keeps its largest |a_i|, whatever the norms of the down projection.",
        header=["layer", *(f"top {100 * share:g} %" for share in shares)],
        rows=[
            [
                Cell(unit["name"], number),
                *(uncertain(found["cett"], found["cett_se"]) for found in unit["top_k"]),
            ]
            for number, unit in enumerate(record["units"])
            if len(unit["top_k"]) == len(shares)
        ],
    )


def _routing_table(record: Record) -> Table:
    window, eight = record["windows"].index(2), record["union_sizes"].index(8)
    return Table(
        title=f"Routing of {record['model']['name']}",
        note="Entropy of the load over its largest value: 1 is balanced. Re-use: a token's experts that the "
        "token before had too.",
        header=["layer", "experts", "entropy", "largest load / mean", "re-use, 2", "by chance", "union of 8"],
        rows=[
            [
                Cell(f"layer {layer['layer']}", layer["layer"]),
                Cell(str(layer["experts"]), layer["experts"]),
                *(uncertain(layer[name], layer.get(f"{name}_se")) for name in ("entropy", "largest_load")),
                _share(layer["reuse"], window),
                _share(layer["chance_reuse"], window),
                _share(layer["union_batch"], eight),
            ]
            for layer in record["routing"]
        ],
    )


def _predictability_table(record: Record) -> Table:
    return Table(
        title=f"Predictability of {record['model']['name']}",
        note="Recall of active neurons when a predictor of these bytes names so many of them.",
        header=["layer", "predictor", "MB", "active", "recall at 50 %", "at 70 %", "at 90 % sparsity"],
        rows=[
            [
                Cell(curve["name"], number),
                Cell(curve["predictor"]),
                Cell(f"{curve['bytes'] / 1e6:.3f}", curve["bytes"]),
                uncertain(curve["active_share"], None, percent=True),
                *(_recall(curve, at) for at in (0.5, 0.7, 0.9)),
            ]
            for number, curve in enumerate(record["predictability"])
        ],
    )


def _recall(curve: Record, sparsity: float) -> Cell:
    at = curve["sparsity"].index(sparsity)
    error = curve["recall_se"][at] if "recall_se" in curve else None
    return uncertain(curve["recall"][at], error, percent=True)


def tables(records: Sequence[Record]) -> list[Table]:
    """Give all tables of a report.

    Parameters
    ----------
    records : sequence of dict
        Measurements; one, or several to compare.

    Returns
    -------
    list of Table
        Those that have rows; those of single layers for each model.
    """
    found = [overall_table(records), quality_table(records)]
    for record in records:
        found.append(_unit_table(record))
        found.append(_routing_table(record))
        if record.get("predictability"):
            found.append(_predictability_table(record))
        found.append(_top_k_table(record))
        found.append(_threshold_table(record))
    return [table for table in found if table.rows and len(table.header) > 1]
