"""The trade-off of one model: what each rule that leaves out neurons loses at each cost."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from turbosparse.measure.cett_search import CettSearch, take_sample
from turbosparse.measure.counted_rule import CountedRule
from turbosparse.measure.figures import RULE_NAMES, trade_off_lines
from turbosparse.measure.measurement import Progress, text_windows
from turbosparse.measure.plots import Figures, as_floats, line_style, marker, percent_axis
from turbosparse.measure.quality_points import QualityRuns
from turbosparse.measure.source import Source
from turbosparse.measure.summary import Cell, Table, uncertain
from turbosparse.sparsity.selection import NonZero, PositiveGate, Selection, TopK
from turbosparse.study.config import SweepStudy
from turbosparse.study.rules import gate_thresholds
from turbosparse.study.store import Store

__all__ = ["FIGURES", "TaskScorer", "run_trade_off", "sweep_settings", "trade_off_tables"]

TaskScorer = Callable[[Selection | None], Sequence[Mapping[str, Any]]]
"""Asks the tasks with what a selection keeps, or with all neurons: task, metric, value, standard_error."""

_Point = tuple[str, float | None, CountedRule]


def sweep_settings(config: SweepStudy, text: str) -> dict[str, Any]:
    """Say what the results of a sweep depend on.

    Parameters
    ----------
    config : SweepStudy
        The recipe.
    text : str
        What is measured on.

    Returns
    -------
    dict
        For `Store`.
    """
    free = ("output", "threads", "device", "text", "cett_targets", "top_k", "gate_shares")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    return settings | {"text_sha256": hashlib.sha256(text.encode()).hexdigest()}


def run_trade_off(
    source: Source,
    text: str,
    config: SweepStudy,
    store: Store,
    *,
    ask: TaskScorer | None = None,
    progress: Progress = lambda label: nullcontext(lambda share: None),
) -> dict[str, Any]:
    """Run all points that are not there yet.

    Parameters
    ----------
    source : Source
        The model.
    text : str
        What is measured on.
    config : SweepStudy
        Which points.
    store : Store
        Where finished points are kept.
    ask : callable, optional
        Asks tasks at each point.
    progress : callable, optional
        Opens a bar.

    Returns
    -------
    dict
        ``model``, ``text``, ``quality`` as a measurement has them; each point has besides what it costs, and
        the scores of its ``tasks``.

    Raises
    ------
    TextError
        When the text has fewer tokens than a window.
    CalibrationError
        When activations are not finite, or a CETT target cannot be met; names the layer.

    Notes
    -----
    Thresholds are found anew in each call, which takes a few windows; points are run once.
    """
    measured = config.measured()
    ids, windows = text_windows(source, text, measured)
    with progress("finding thresholds") as advance:
        search = take_sample(source, windows, measured)
        advance(0.3)
        search.prepare(measured.cett_targets, measured.top_k)
        advance(0.5)
        points = list(_points(source, search, windows[: max(1, len(windows) // 4)], config))
    runs = QualityRuns(source, windows, measured.memory_bytes // 4)
    gated = bool(source.description["gated"])
    quality = []
    with progress("perplexity and KL") as advance:
        for kind, parameter, rule in points:

            def compute(rule: CountedRule = rule) -> dict[str, Any]:
                losses = dataclasses.asdict(runs.run(rule, lambda share: advance(share / len(points))))
                found = losses | rule.shares(gated=gated)
                return found | ({"tasks": list(ask(rule.rule))} if ask else {})

            point = store.result(rule.label, compute)
            quality.append({"label": rule.label, "kind": kind, "parameter": parameter, **point})
    dense = store.result("dense", lambda: {"tasks": list(ask(None)) if ask else []})
    return {
        "model": source.description,
        "text": {
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "tokens": len(windows) * len(windows[0]),
            "tokens_of_the_text": len(ids),
            "windows": len(windows),
            "context": len(windows[0]),
        },
        "quality": quality,
        "dense_tasks": dense["tasks"],
        "top_k_errors": [
            {
                "name": source.units[unit].name,
                "layer": source.units[unit].layer,
                "expert": source.units[unit].expert,
                "errors": [
                    {"share": share, "cett": error, "cett_se": spread}
                    for share, (error, spread) in errors.items()
                ],
            }
            for unit, errors in search.top_k_errors.items()
        ],
        "notes": search.notes(),
    }


def _points(
    source: Source, search: CettSearch, windows: Sequence[Any], config: SweepStudy
) -> Iterator[_Point]:
    for target in sorted(config.cett_targets):
        yield "cett", target, CountedRule(search.selection(target), gate_first=False)
    for share in config.top_k:
        yield "top_k", share, CountedRule(TopK(share=share), gate_first=False)
    if config.gate_shares and source.description["gated"]:
        for share, thresholds in gate_thresholds(source, windows, config.gate_shares).items():
            yield "gate_threshold", share, CountedRule(thresholds, gate_first=True)
    yield "gate", None, CountedRule(PositiveGate(), gate_first=True)
    yield "zeros", None, CountedRule(NonZero(), gate_first=False)


def trade_off_tables(record: Mapping[str, Any]) -> list[Table]:
    """List the points.

    Parameters
    ----------
    record : mapping
        As `run_trade_off` returns it.

    Returns
    -------
    list of Table
        Losses by cost, and the tasks where they were asked.
    """
    points = record["quality"]
    dense = points[0]
    rows = [
        [
            Cell(point["label"]),
            *(
                uncertain(point[cost]["value"], point[cost]["standard_error"], percent=True)
                for cost in ("computed", "ffn_bytes")
            ),
            uncertain(point["perplexity"], point["perplexity_se"]),
            uncertain(point["perplexity_rise"], point["perplexity_rise_se"], percent=True),
            uncertain(point["mean_kl"], point["mean_kl_se"]),
            uncertain(point["same_top_1"], point["same_top_1_se"], percent=True),
        ]
        for point in points
    ]
    tables = [
        Table(
            title="What each rule loses",
            note=f"All neurons computed: perplexity {dense['dense_perplexity']:.3f} ± "
            f"{dense['dense_perplexity_se']:.3f} on {dense['tokens']} scored tokens. Neurons: those whose "
            "row of the down projection is read. FFN bytes: share of the FFN's rows that is read when "
            "the gate is computed first.",
            header=["rule", "neurons", "FFN bytes", "perplexity", "rise", "KL mean", "same top-1"],
            rows=rows,
        )
    ]
    names = [f"{score['task']} {score['metric']}" for score in record["dense_tasks"]]
    if names:
        asked = [("all neurons", record["dense_tasks"])]
        asked += [(point["label"], point["tasks"]) for point in points]
        cells = [
            [Cell(label), *(uncertain(s["value"], s["standard_error"], percent=True) for s in scores)]
            for label, scores in asked
        ]
        tables.append(
            Table(title="Tasks", note="By lm-evaluation-harness.", header=["rule", *names], rows=cells)
        )
    return tables


def _painter(cost: str, loss: str, label: str) -> Callable[[Any, Sequence[dict[str, Any]]], None]:
    def paint(axes: Any, records: Sequence[dict[str, Any]]) -> None:
        trade_off_lines(axes, records, cost, loss)
        axes.set_xlabel(label)

    return paint


def _tasks(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    """Mean over tasks of the first metric of each."""
    for record in records:
        firsts = {score["task"]: at for at, score in reversed(list(enumerate(record["dense_tasks"])))}
        if not firsts:
            continue
        asked = list(firsts.values())
        for number, (kind, label) in enumerate(RULE_NAMES.items()):
            points = [point for point in record["quality"] if point["kind"] == kind]
            points = sorted(points, key=lambda point: point["computed"]["value"])
            if points:
                errors = [_scores(point["tasks"], asked, "standard_error") for point in points]
                axes.errorbar(
                    as_floats([point["computed"]["value"] for point in points]),
                    as_floats([_scores(point["tasks"], asked, "value").mean() for point in points]),
                    yerr=as_floats([np.sqrt((each**2).sum()) / len(each) for each in errors]),
                    marker=marker(number),
                    label=label,
                    capsize=2,
                    **line_style(number),
                )
        dense = _scores(record["dense_tasks"], asked, "value").mean()
        axes.axhline(dense, color="#8c8c8c", label="all neurons")
    axes.set_xlabel("neurons computed")
    axes.set_ylabel("mean over tasks")
    for axis in (axes.xaxis, axes.yaxis):
        percent_axis(axis)


def _scores(tasks: Sequence[Mapping[str, Any]], asked: Sequence[int], field: str) -> Any:
    return as_floats([tasks[number][field] for number in asked])


_NEURONS, _BYTES = "neurons computed", "bytes of the FFN read, gate first"
FIGURES: Figures = (
    (
        "perplexity_by_neurons",
        "Rise of the perplexity by the share of neurons computed. Linear below 10 %.",
        _painter("computed", "perplexity_rise", _NEURONS),
    ),
    (
        "kl_by_neurons",
        "Mean KL to the dense model by the share of neurons computed. Linear below 0.01 nats.",
        _painter("computed", "mean_kl", _NEURONS),
    ),
    (
        "perplexity_by_bytes",
        "Rise of the perplexity by the bytes that a rule has to read: rules on the gate save rows of up too.",
        _painter("ffn_bytes", "perplexity_rise", _BYTES),
    ),
    (
        "kl_by_bytes",
        "Mean KL to the dense model by the bytes that a rule has to read.",
        _painter("ffn_bytes", "mean_kl", _BYTES),
    ),
    (
        "tasks",
        "Mean score over tasks by the share of neurons computed. Bars: standard errors over questions.",
        _tasks,
    ),
)
