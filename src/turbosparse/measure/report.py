"""Reports on disk: every number as JSON and Parquet, one page, and the figures as PNG."""

import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from turbosparse.errors import ConfigError
from turbosparse.measure import NUMBERS, PAGE
from turbosparse.measure.figures import draw
from turbosparse.measure.measurement import FORMAT_VERSION
from turbosparse.measure.page import Page, Provenance, html_page
from turbosparse.measure.summary import tables

__all__ = ["plain", "read_measurement", "save_page", "write_numbers", "write_page", "write_parquet"]

logger = logging.getLogger(__name__)

_NAMES = ("name", "label", "predictor", "task", "metric")  # of what a list has, largest first
_SECTIONS = (
    *("model", "text", "config", "run", "notes", "cett_targets", "windows", "union_sizes", "budgets"),
    *("overall", "units", "routing", "histograms", "quality"),
)


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """Make a record what it will be when it is read back.

    Parameters
    ----------
    record : dict
        Of a measurement.

    Returns
    -------
    dict
        None for numbers that are not finite, which JSON has not; lists for tuples.
    """
    result: dict[str, Any] = json.loads(json.dumps(record), parse_constant=lambda name: None)
    return result


def write_numbers(record: dict[str, Any], folder: Path, *, name: str = NUMBERS) -> None:
    """Write the numbers of a measurement or of a study.

    Parameters
    ----------
    record : dict
        As `plain` made it.
    folder : Path
        Made if it is not there.
    name : str
        File name; the table in Parquet has the same with another suffix.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / name).write_text(text + "\n", encoding="utf-8")
    write_parquet([record], (folder / name).with_suffix(".parquet"))


def read_measurement(folder: Path) -> dict[str, Any]:
    """Read what `write_numbers` wrote.

    Parameters
    ----------
    folder : Path
        Directory of a measurement.

    Returns
    -------
    dict
        The record.

    Raises
    ------
    ConfigError
        When there is none, it is of another version, or a part of it is missing.
    """
    path = folder / NUMBERS
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"[{path}] expected the JSON of a measurement, got another text") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        raise ConfigError(f"[{path}] expected a measurement of version {FORMAT_VERSION}, got {version}")
    missing = [name for name in _SECTIONS if name not in record]
    if missing:
        raise ConfigError(f"[{path}] expected the sections of a measurement, got none called {missing[0]}")
    return record


def write_page(records: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Draw figures and lay out the page.

    Parameters
    ----------
    records : sequence of dict
        One measurement, or several to put side by side.
    folder : Path
        Made if it is not there.

    Returns
    -------
    Path
        The page.
    """
    names = [str(record["model"]["name"]) for record in records]
    title = f"Sparsity of {names[0]}" if len(names) == 1 else f"Sparsity side by side: {', '.join(names)}"
    page = Page(
        title=title,
        opening=[_opening(record) for record in records],
        warnings=[note for record in records for note in record["notes"]],
        tables=tables(records),
        plots=draw(records),
        provenance=[_provenance(record) for record in records],
    )
    return save_page(page, folder)


def save_page(page: Page, folder: Path) -> Path:
    """Write a page and its figures.

    Parameters
    ----------
    page : Page
        Any report.
    folder : Path
        Made if it is not there.

    Returns
    -------
    Path
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for plot in page.plots:
        plot.save(folder)
    path = folder / PAGE
    path.write_text(html_page(page), encoding="utf-8")
    return path


def write_parquet(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write all numbers as one table, where pyarrow is installed.

    Parameters
    ----------
    records : sequence of dict
        As `plain` made them; each with ``model.name``.
    path : Path
        The file. Its columns: ``model``, ``section`` (a record's first level), ``item`` (name or number of
        what the section lists, else empty), ``number`` (where in it the value stands, again by name or
        number), ``value``. Of predictors and tasks, names are ``layer 1 sign bits`` and ``hellaswag acc``.
    """
    if importlib.util.find_spec("pyarrow") is None:
        logger.info("[%s] not written: pyarrow is not installed; it comes with turbosparse[train]", path)
        return
    import pyarrow  # noqa: PLC0415 -- brought by an extra
    import pyarrow.parquet  # noqa: PLC0415

    rows = [row for record in records for row in _rows(record)]
    names = ("model", "section", "item", "number", "value")
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd")


def _rows(record: dict[str, Any]) -> Iterator[tuple[str, str, str, str, float]]:
    model = str(record["model"]["name"])
    for section, content in record.items():
        parts = enumerate(content) if isinstance(content, list) else [("", content)]
        for at, part in parts:
            item = _label(part, at) if isinstance(content, list) else str(at)
            for number, value in _leaves(part, ""):
                yield model, section, item, number, value


def _label(part: Any, at: object) -> str:
    """What tells an element of a list from the others: its names, else its number."""
    names = [part[key] for key in _NAMES if isinstance(part.get(key), str)] if isinstance(part, dict) else []
    return " ".join(names) or str(at)


def _leaves(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """Numbers inside of a value, by where they stand."""
    if isinstance(value, dict | list):
        for at, part in value.items() if isinstance(value, dict) else enumerate(value):
            name = _label(part, at) if isinstance(value, list) else str(at)
            yield from _leaves(part, f"{place}.{name}" if place else name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place, float(value)


def _opening(record: dict[str, Any]) -> str:
    model, text = record["model"], record["text"]
    experts = f", {model['num_experts']} experts" if model["num_experts"] else ""
    title = f" ({model['title']})" if model["title"] != model["name"] else ""
    return (
        f"{model['name']}{title}: {model['kind']}, {model['architecture']}, activation "
        f"{model['activation']}, {model['num_hidden_layers']} layers of {model['intermediate_size']} "
        f"neurons{experts}, weights {model['weights']}. Measured on {text['tokens']:,} tokens of "
        f"{text['name']} in {text['windows']} windows of {text['context']}."
    )


def _provenance(record: dict[str, Any]) -> Provenance:
    text = record["text"]
    settings = ", ".join(f"{key} {value}" for key, value in record["config"].items())
    note = f"Text {text['name']}, SHA-256 {text['sha256']}. Settings: {settings}."
    return Provenance(name=str(record["model"]["name"]), run=record["run"], note=note)
