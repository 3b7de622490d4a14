"""Measuring one model for `turbosparse measure`: opens it in the column that can run it."""

import argparse
import datetime
import importlib.metadata
import logging
import platform
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.table
from rich.cells import cell_len

from turbosparse import __version__
from turbosparse.bench.record import describe_machine
from turbosparse.cli.console import console, progress
from turbosparse.cli.model_options import check_model_name, read_text
from turbosparse.errors import ModelFileError
from turbosparse.measure import NUMBERS
from turbosparse.measure.measurement import measure
from turbosparse.measure.report import plain, read_measurement, write_numbers
from turbosparse.measure.summary import Table
from turbosparse.runtime.measured_file import MeasuredFile, require_measurable
from turbosparse.runtime.model_file import ModelFile
from turbosparse.sparsity.quality import cut_windows

if TYPE_CHECKING:
    from turbosparse.measure.config import MeasureConfig
    from turbosparse.measure.source import Source

__all__ = ["brief", "check_measurable", "labels", "measured", "open_source", "run_record", "show"]


def check_measurable(name: str, *, device: str = "cpu") -> None:
    """Find out before any work whether a name is that of a measurement or of a model.

    Parameters
    ----------
    name : str
        Directory of a measurement, model file, or Hugging Face directory or id.
    device : str
        Where torch will run the model, if it does.

    Raises
    ------
    ConfigError
        If the measurement cannot be read, or torch cannot use the device.
    ModelFileError
        If there is no such model.
    """
    if (Path(name) / NUMBERS).exists():
        read_measurement(Path(name))
        return
    _check_model(name)
    if device != "cpu" and not Path(name).is_file():
        from turbosparse.measure.hugging_face import check_device

        check_device(device)


def _check_model(name: str) -> None:
    path = Path(name)
    if path.is_file():
        require_measurable(ModelFile(path))
        return
    check_model_name(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelFileError(
            f"[{name}] expected a Hugging Face model (config.json) or a measurement ({NUMBERS}), got neither"
        )


def labels(names: Sequence[str]) -> list[str]:
    """Give short names that tell models apart.

    Parameters
    ----------
    names : sequence of str
        Paths, or ids on the Hugging Face hub.

    Returns
    -------
    list of str
        The ends of the paths, with as many folders as it takes; numbered where paths are the same.
    """
    paths = [Path(name).resolve() if Path(name).exists() else Path(name) for name in names]
    ends = [path.parts[-1:] for path in paths]
    for length in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        ends = [
            path.parts[-length:] if _is_shared(end, paths, ends) else end
            for path, end in zip(paths, ends, strict=True)
        ]
    found: list[str] = []
    for end in ends:
        label = "/".join(end).lstrip("/")
        before = ends[: len(found)].count(end)
        found.append(f"{label} {before + 1}" if before else label)
    return found


def _is_shared(end: tuple[str, ...], paths: Sequence[Path], ends: Sequence[tuple[str, ...]]) -> bool:
    """Whether different paths have the same end."""
    return len({path for path, other in zip(paths, ends, strict=True) if other == end}) > 1


def measured(name: str, folder: Path, args: argparse.Namespace, config: "MeasureConfig") -> dict[str, Any]:
    """Read a measurement, or make it.

    Parameters
    ----------
    name : str
        Directory of a measurement, model file, or Hugging Face directory or id.
    folder : Path
        Where the numbers of a new measurement go.
    args : argparse.Namespace
        Options of the verb.
    config : MeasureConfig
        What to measure.

    Returns
    -------
    dict
        The record, as `turbosparse.measure.report.read_measurement` gives it.
    """
    if (Path(name) / NUMBERS).exists():
        return read_measurement(Path(name))
    from turbosparse.runtime.texts import HELD_OUT

    path = args.text or HELD_OUT
    text = read_text(path)
    started = time.monotonic()
    source = open_source(name, scratch=args.output, threads=args.threads, device=args.device)
    torch = "torch" in source.description["kind"]
    try:
        if args.predict_layers:
            _check_predictable(source)
        record = measure(source, text, config, _bar)
        record["text"]["name"] = path.name
        if args.predict_layers:
            record["run"] = run_record(args.command, time.monotonic() - started, torch=torch)
            write_numbers(plain(record), folder)  # kept if what follows fails
            record["predictability"] = _predictability(source, name, text, record, args)
    finally:
        source.close()
    record["run"] = run_record(args.command, time.monotonic() - started, torch=torch)
    record = plain(record)
    write_numbers(record, folder)
    return record


def show(table: Table) -> None:
    """Print a table of a report; in a terminal too narrow for it, in parts with the same first column.

    Parameters
    ----------
    table : Table
        Nothing is printed if it has no rows.
    """
    if not table.rows:
        return
    columns = [[name, *(row[number].text for row in table.rows)] for number, name in enumerate(table.header)]
    for number, part in enumerate(_parts([max(map(cell_len, column)) for column in columns])):
        title = table.title if number == 0 else None
        shown = rich.table.Table(title=title, title_justify="left", box=None)
        for column in part:
            shown.add_column(columns[column][0], no_wrap=True)
        for row in table.rows:
            shown.add_row(*(row[column].text for column in part))
        if number:
            console().print()
        console().print(shown)


def _parts(widths: Sequence[int]) -> Iterator[list[int]]:
    """Columns of each part of a table that fits the terminal; all begin with the first."""
    padding = 2
    part, room = [0], console().width - widths[0] - padding
    for column, width in enumerate(widths[1:], 1):
        if width + padding > room and len(part) > 1:
            yield part
            part, room = [0], console().width - widths[0] - padding
        part.append(column)
        room -= width + padding
    yield part


def brief(record: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a record what belongs to single layers.

    Parameters
    ----------
    record : dict
        Of a measurement.

    Returns
    -------
    dict
        For one line of JSON.
    """
    return {key: value for key, value in record.items() if key not in ("units", "histograms", "routing")}


def _bar(label: str) -> AbstractContextManager[Callable[[float], None]]:
    return progress(1.0, label)


def run_record(command: str, seconds: float, *, torch: bool) -> dict[str, Any]:
    """Say how a report came about.

    Parameters
    ----------
    command : str
        As it was typed.
    seconds : float
        How long it took.
    torch : bool
        Whether torch ran the model.

    Returns
    -------
    dict
        As `turbosparse.measure.page.Provenance` has it.
    """
    packages = ["numpy", "matplotlib"] + (["torch", "transformers"] if torch else [])
    return {
        "command": command,
        "finished_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": seconds,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "versions": {
            "turbosparse": __version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
        "machine": describe_machine(),
    }


def open_source(name: str, *, scratch: Path, threads: int, device: str) -> "Source":
    """Open a model in the column that can run it.

    Parameters
    ----------
    name : str
        Model file, or Hugging Face directory or id.
    scratch : Path
        Directory for what a model file needs beside it.
    threads : int
        0 means physical cores, at most 8.
    device : str
        Where torch runs.

    Returns
    -------
    Source
        To be closed.

    Raises
    ------
    ConfigError
        If torch cannot use the device.
    ModelFileError
        If there is no such model.
    """
    _check_model(name)
    path = Path(name)
    if path.is_file():
        return MeasuredFile(path, scratch=scratch, threads=threads)
    import torch
    from transformers.utils.logging import disable_progress_bar

    from turbosparse.measure.hugging_face import open_hugging_face

    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if threads:
        torch.set_num_threads(threads)
    return open_hugging_face(name, device=device)


def _check_predictable(source: "Source") -> None:
    """Find out before the work what would stop the predictors."""
    from turbosparse.measure.hugging_face import HuggingFaceModel
    from turbosparse.predict.predictability import check_predictable

    if isinstance(source, HuggingFaceModel):
        check_predictable(source)


def _predictability(
    source: "Source", name: str, text: str, record: dict[str, Any], args: argparse.Namespace
) -> list[dict[str, Any]]:
    from turbosparse.measure.hugging_face import HuggingFaceModel
    from turbosparse.predict.predictability import predictability, recall_curves

    with progress(1.0, "fitting predictors") as advance:
        if isinstance(source, HuggingFaceModel):
            return predictability(source, text, record, layers=args.predict_layers, advance=advance)
        from turbosparse.export.predictor_source import ModelFileFFNs

        windows = cut_windows(
            source.text_ids(text)[: record["text"]["tokens"]], record["text"]["context"], source.bos_id
        )
        ffns = ModelFileFFNs(ModelFile(Path(name)), windows, threads=args.threads)
        units = range(len(source.units))
        return recall_curves(ffns, units, record, layers=args.predict_layers, advance=advance)
