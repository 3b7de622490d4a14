"""Are neurons inside of experts sparse? Top-k inside of each expert of a mixture, and how its experts differ.

The question of Turbo Sparse's section on experts (arXiv 2406.05955): expert sparsity and neuron sparsity
multiply where dropping neurons of the chosen experts costs little.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from turbosparse.errors import ConfigError
from turbosparse.measure.plots import Figures, as_floats, layer_axis, line_style, percent_axis
from turbosparse.measure.source import Source
from turbosparse.measure.summary import Cell, Table
from turbosparse.study.trade_off import FIGURES as TRADE_OFF_FIGURES

__all__ = ["FIGURES", "check_experts", "expert_tables"]


def check_experts(source: Source) -> None:
    """Refuse a model without experts.

    Parameters
    ----------
    source : Source
        Any model.

    Raises
    ------
    ConfigError
        If no layer has experts.
    """
    if not any(source.experts(unit.layer) for unit in source.units):
        name = source.description["name"]
        raise ConfigError(
            f"[{name}] expected a mixture of experts, got dense FFNs; study trade-off is for those"
        )


def _by_layer(record: Mapping[str, Any], share: float) -> tuple[list[int], list[list[float]]]:
    """Errors of the top-k rule of all experts but the shared one, layer by layer."""
    layers: dict[int, list[float]] = {}
    for unit in record["top_k_errors"]:
        if unit.get("expert", 0) is None:
            continue
        errors = {found["share"]: found["cett"] for found in unit["errors"]}
        if share in errors:
            layers.setdefault(unit["layer"], []).append(errors[share])
    return sorted(layers), [layers[layer] for layer in sorted(layers)]


def _shares(record: Mapping[str, Any]) -> list[float]:
    return [found["share"] for found in record["top_k_errors"][0]["errors"]] if record["top_k_errors"] else []


def expert_tables(record: Mapping[str, Any]) -> list[Table]:
    """List the error of the top-k rule in the layers.

    Parameters
    ----------
    record : mapping
        As `turbosparse.study.trade_off.run_trade_off` returns it.

    Returns
    -------
    list of Table
        One, with the least and the largest error of a layer's experts.
    """
    model, shares = record["model"], _shares(record)
    rows: dict[int, list[Cell]] = {}
    for share in shares:
        for layer, errors in zip(*_by_layer(record, share), strict=True):
            mean = sum(errors) / len(errors)
            text = f"{mean:.3f} ({min(errors):.3f}–{max(errors):.3f})"
            rows.setdefault(layer, [Cell(f"layer {layer}", layer)]).append(Cell(text, mean))
    return [
        Table(
            title="Error of the top-k rule inside of experts",
            note="Error of an expert's output (CETT) when it keeps its largest activations: mean over the "
            f"experts of a layer, least and largest in brackets. A token has "
            f"{model['experts_per_token']} of {model['num_experts']} experts.",
            header=["layer", *(f"top {100 * share:g} %" for share in shares)],
            rows=list(rows.values()),
        )
    ]


def _errors(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    for record in records:
        shares = _shares(record)
        for number, share in enumerate(shares[:: max(1, len(shares) // 4)]):
            layers, errors = _by_layer(record, share)
            means = as_floats([sum(found) / len(found) for found in errors])
            least = as_floats([min(found) for found in errors])
            most = as_floats([max(found) for found in errors])
            axes.errorbar(
                layers,
                means,
                yerr=[means - least, most - means],
                capsize=2,
                label=f"top {100 * share:g} %",
                **line_style(number),
            )
    layer_axis(axes.xaxis)
    axes.set_ylabel("error of the expert's output")
    percent_axis(axes.yaxis)


FIGURES: Figures = (
    *TRADE_OFF_FIGURES,
    (
        "expert_errors",
        "Error of the top-k rule inside of experts, by layer; bars: least and largest expert.",
        _errors,
    ),
)
