"""The tables that ``turbosparse inspect`` prints."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from turbosparse.cli.console import bytes_text, count_text, plain_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["model_tables"]

BAR = 20  # characters of a full bar


def model_tables(record: dict[str, Any]) -> Iterator["Table"]:
    """Lay out the parts of a description that are lists.

    Parameters
    ----------
    record : dict
        From `turbosparse.runtime.model_description.describe`.

    Yields
    ------
    rich.table.Table
        Weights by type, thresholds and predictors per layer, tensors: those that the record has.
    """
    if record["types"]:
        yield _type_table(record["types"], record["weight_bytes"])
    if record["thresholds"]:
        yield _threshold_table(record["thresholds"])
    if record["predictor"]:
        yield _predictor_table(record["predictor"]["layers"])
    if "tensors" in record:
        yield _tensor_table(record["tensors"])


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> "Table":
    from rich.table import Table

    table = Table(box=None, title=title, title_justify="left", pad_edge=False)
    for header in left:
        table.add_column(header)
    for header in right:
        table.add_column(header, justify="right")
    return table


def _type_table(types: dict[str, dict[str, int]], weight_bytes: int) -> "Table":
    table = _table("weights by type", ["type"], ["tensors", "parameters", "bytes", "share"])
    for name, total in types.items():
        share = f"{total['bytes'] / weight_bytes:.1%}"
        table.add_row(
            name, str(total["tensors"]), count_text(total["parameters"]), bytes_text(total["bytes"]), share
        )
    return table


def _threshold_table(layers: list[dict[str, Any]]) -> "Table":
    title = "thresholds per layer (median over neurons)"
    table = _table(title, [], ["layer", "|f(gate)|", "|f(gate) * up|", "CETT", "up read", "active"])
    table.add_column("")
    for entry in layers:
        ratio = entry["active_ratio"]
        numbers = (entry[k] for k in ("median_gate_threshold", "median_threshold", "cett"))
        cells = ["-" if number is None else f"{number:.3g}" for number in numbers]
        shares = ["-" if share is None else f"{share:.1%}" for share in (entry["gate_passed"], ratio)]
        table.add_row(str(entry["layer"]), *cells, *shares, "█" * round((ratio or 0) * BAR))
    return table


def _predictor_table(layers: list[dict[str, Any]]) -> "Table":
    types = ["/".join(entry["types"]) or "bits" for entry in layers]
    differ = len(set(types)) > 1
    title = "predictors per layer (share: of the FFN's bytes" + ("" if differ else f"; type {types[0]}") + ")"
    right = ["layer", "rank", *(["type"] if differ else []), "kB", "share", "threshold", "hot"]
    ratios = ("recall", "precision", "candidate_ratio", "active_ratio")
    table = _table(title, [], [*right, "recall", "precision", "candidates", "active"])
    for entry, types_text in zip(layers, types, strict=True):
        table.add_row(
            *(str(entry["layer"]), "-" if entry["rank"] is None else str(entry["rank"])),
            *([plain_text(types_text)] if differ else []),
            *(f"{entry['bytes'] / 1e3:.1f}", f"{entry['ffn_share']:.1%}", f"{entry['threshold']:.3g}"),
            str(entry["hot"]),
            *("-" if entry[ratio] is None else f"{entry[ratio]:.1%}" for ratio in ratios),
        )
    return table


def _tensor_table(tensors: list[dict[str, Any]]) -> "Table":
    table = _table("tensors", ["name", "type", "shape"], ["bytes", "offset"])
    for tensor in tensors:
        shape = " x ".join(map(str, tensor["shape"]))
        row = (tensor["name"], tensor["type"], shape, str(tensor["bytes"]), str(tensor["offset"]))
        table.add_row(*map(plain_text, row))
    return table
