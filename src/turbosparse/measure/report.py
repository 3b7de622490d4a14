"""Measurements on disk: one JSON file with every number, one page, and the figures as PNG."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turbosparse.errors import ConfigError
from turbosparse.measure import NUMBERS, PAGE
from turbosparse.measure.figures import draw
from turbosparse.measure.measurement import FORMAT_VERSION
from turbosparse.measure.page import html_page
from turbosparse.measure.summary import tables

__all__ = ["plain", "read_measurement", "write_numbers", "write_page"]


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


def write_numbers(record: dict[str, Any], folder: Path) -> None:
    """Write the numbers of a measurement.

    Parameters
    ----------
    record : dict
        As `plain` made it.
    folder : Path
        Made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / NUMBERS).write_text(text + "\n", encoding="utf-8")


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
        When there is none, or it is of another version.
    """
    path = folder / NUMBERS
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"[{path}] expected the JSON of a measurement, got another text") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        raise ConfigError(f"[{path}] expected a measurement of version {FORMAT_VERSION}, got {version}")
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
    folder.mkdir(parents=True, exist_ok=True)
    plots = draw(records)
    for plot in plots:
        plot.save(folder)
    page = folder / PAGE
    page.write_text(html_page(title, records, plots, tables(records)), encoding="utf-8")
    return page
