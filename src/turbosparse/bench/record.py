"""How results leave the program: llama-bench's table with our columns, and files that say how to repeat."""

import datetime
import hashlib
import importlib.metadata
import os
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from turbosparse import __version__
from turbosparse.bench.benchmark import Row
from turbosparse.bench.profile import Profile
from turbosparse.bench.roofline import ONE_IN, Roofline

__all__ = [
    "as_table",
    "describe_machine",
    "profile_table",
    "result_record",
    "roofline_table",
    "unused_path",
]

_MEBI, _GIBI = 2**20, 2**30
_HEADER = (
    *(
        "model",
        "size",
        "params",
        "backend",
        "threads",
        "test",
        "t/s",
        "mode",
        "active",
        "recall",
        "precision",
    ),
    *(
        "predictor MB",
        "MB/token",
        "GB/s",
        "bandwidth",
        "hits",
        "foreseen",
        "disk MB/token",
        "disk wait",
        "peak RAM",
    ),
    *("vs dense", "vs llama.cpp", "vs first depth", "bytes allow"),
)
# Where a line has no room for all columns: what need not stand in every row, and what tells rows apart.
_SAID_ONCE = ("model", "size", "params", "threads", "predictor MB")
_KEYS = ("model", "backend", "threads", "test", "mode")
_Column = tuple[str, ...]


def as_table(rows: Sequence[Row], *, width: int | None = None) -> str:
    """Lay rows out as a Markdown table.

    Parameters
    ----------
    rows : sequence of Row
        What was measured.
    width : int, optional
        Characters that a line may have. A wider table becomes several, each with the columns that tell rows
        apart; what is the same in all rows then stands above, once.

    Returns
    -------
    str
        llama-bench's columns, then ours; "-" where a number was not measured, and no column where none was.
    """
    lines = [
        _HEADER,
        *(
            (
                f"{row.model} {row.quant}",
                _size(row.size_bytes),
                f"{row.params / 1e6:.2f} M" if row.params < 1e9 else f"{row.params / 1e9:.2f} B",
                row.backend,
                str(row.threads),
                row.test,
                f"{row.tok_per_s:.2f} ± {row.tok_per_s_sd:.2f}",
                row.mode,
                _number(row.active_ratio, "{:.1%}"),
                _number(row.recall, "{:.1%}"),
                _number(row.precision, "{:.1%}"),
                _number(row.predictor_bytes and row.predictor_bytes / 1e6, "{:.1f}"),
                _number(row.bytes_per_token and row.bytes_per_token / 1e6, "{:.1f}"),
                _number(row.bandwidth_gb_per_s, "{:.1f}"),
                _number(row.bandwidth_share, "{:.0%}"),
                _number(row.hit_ratio, "{:.1%}"),
                _number(row.foreseen_ratio, "{:.1%}"),
                _number(row.disk_bytes_per_token and row.disk_bytes_per_token / 1e6, "{:.1f}"),
                _number(row.disk_wait_ratio, "{:.0%}"),
                "-" if row.peak_resident_bytes is None else _size(row.peak_resident_bytes),
                _number(row.ratio_to_dense, "{:.2f}x"),
                _number(row.ratio_to_baseline, "{:.2f}x"),
                _number(row.ratio_to_first_depth, "{:.2f}x"),
                _number(row.byte_ratio_to_first_depth, "{:.2f}x"),
            )
            for row in rows
        ),
    ]
    columns = [column for column in zip(*lines, strict=True) if set(column[1:]) != {"-"}]
    if width is None or _width(columns) <= width:
        return _markdown(columns)
    above, left = _said_once(columns)
    text = [line for said in above for line in textwrap.wrap(said, width)]
    return "\n".join([*text, "", _markdown(left, keys=_KEYS, width=width)])


def _said_once(columns: Sequence[_Column]) -> tuple[list[str], list[_Column]]:
    """What is the same in all rows of a backend, a line for each of them, and the columns left."""
    backends = next(column[1:] for column in columns if column[0] == "backend")
    rows_of = {name: [i for i, other in enumerate(backends, 1) if other == name] for name in backends}
    once: list[_Column] = []
    said: dict[str, list[str]] = {name: [] for name in rows_of}
    for column in columns:
        values = {name: {column[i] for i in rows} - {"-"} for name, rows in rows_of.items()}
        if column[0] in _SAID_ONCE and all(len(found) <= 1 for found in values.values()):
            once.append(column)
            for name, found in values.items():
                said[name] += [f"{column[0]} {value}" for value in found]
    if len(rows_of) == 1:
        once += [column for column in columns if column[0] == "backend"]
    left = [column for column in columns if column not in once]
    return [f"{name}: {', '.join(parts)}" for name, parts in said.items() if parts], left


def roofline_table(rooflines: Sequence[Roofline], *, width: int | None = None) -> str:
    """Lay read bandwidths out as a Markdown table.

    Parameters
    ----------
    rooflines : sequence of Roofline
        One per thread count.
    width : int, optional
        Characters that a line may have; a wider table becomes several.

    Returns
    -------
    str
        GB/s of a stream, and of rows by their size.
    """
    sizes = sorted({size for roofline in rooflines for size in roofline.rows_gb_per_s})
    percent = f"{100 / ONE_IN:.0f} % of rows of"
    lines = [
        ("read bandwidth, GB/s", "stream", *(f"{percent} {size / 1024:g} KiB" for size in sizes)),
        *(
            (
                f"{roofline.threads} thread{'s' if roofline.threads > 1 else ''}",
                f"{roofline.stream_gb_per_s:.1f}",
                *(f"{roofline.rows_gb_per_s[size]:.1f}" for size in sizes),
            )
            for roofline in rooflines
        ),
    ]
    columns = list(zip(*lines, strict=True))
    return _markdown(columns, keys=columns[0][:1], width=width) + "\n"


def profile_table(profiles: Sequence[Profile], *, width: int | None = None) -> str:
    """Lay profiles out as a Markdown table.

    Parameters
    ----------
    profiles : sequence of Profile
        At least one.
    width : int, optional
        Characters that a line may have; a wider table becomes several.

    Returns
    -------
    str
        A line per part, a column per test and mode: microseconds per token and their share of the sum.
    """
    sums = [sum(profile.us_per_token.values()) for profile in profiles]
    names = [f"{p.test} {p.mode}, {p.threads} thread{'s' * (p.threads > 1)}" for p in profiles]
    if len({profile.model for profile in profiles}) > 1:
        names = [f"{profile.model} {name}" for profile, name in zip(profiles, names, strict=True)]
    lines: list[tuple[str, ...]] = [("us per token", *names)]
    for part in max((profile.us_per_token for profile in profiles), key=len):
        times = [profile.us_per_token.get(part, 0.0) for profile in profiles]
        cells = [f"{time:.1f} ({time / total:.0%})" for time, total in zip(times, sums, strict=True)]
        lines.append((part, *cells))
    lines.append(("sum", *(f"{total:.1f}" for total in sums)))
    columns = list(zip(*lines, strict=True))
    return _markdown(columns, keys=columns[0][:1], width=width)


def _markdown(columns: Sequence[_Column], *, keys: Sequence[str] = (), width: int | None = None) -> str:
    """A table of columns, the header first in each; if too wide, several that all have the key columns."""
    if width is None or _width(columns) <= width:
        return _one_table(columns)
    key_columns = [column for column in columns if column[0] in keys]
    others = [column for column in columns if column[0] not in keys]
    others.sort(key=lambda column: column[0] in _SAID_ONCE)  # what is measured first
    parts = [key_columns]
    for column in others:
        if len(parts[-1]) > len(key_columns) and _width([*parts[-1], column]) > width:
            parts.append(key_columns)
        parts[-1] = [*parts[-1], column]
    return "\n\n".join(_one_table([column for column in columns if column in part]) for part in parts)


def _one_table(columns: Sequence[_Column]) -> str:
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    header, *lines = ("| " + " | ".join(cells) + " |" for cells in zip(*padded, strict=True))
    rule = "|" + "|".join("-" * (len(column[0]) + 2) for column in padded) + "|"
    return "\n".join([header, rule, *lines])


def _width(columns: Sequence[_Column]) -> int:
    """Characters in a line of their table."""
    return sum(max(map(len, column)) + 3 for column in columns) + 1


def result_record(
    rows: Sequence[Row], rooflines: Sequence[Roofline], *, command: str, files: Sequence[Path]
) -> dict[str, Any]:
    """Collect what a result file holds.

    Parameters
    ----------
    rows : sequence of Row
        What was measured.
    rooflines : sequence of Roofline
        Read bandwidths, where they were asked for.
    command : str
        Command that measures it again.
    files : sequence of Path
        Model files that were read.

    Returns
    -------
    dict
        Command, time, versions, machine, hashes of the files, and the rows with every single round.
    """
    return {
        "command": command,
        "finished_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "turbosparse": __version__,
            "python": platform.python_version(),
            "llama_cpp_python": _version("llama-cpp-python")
            if any(row.backend == "llama.cpp" for row in rows)
            else None,
        },
        "machine": describe_machine(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("OMP_")},
        "kv_cache": "filled once per depth, in the first mode, for all modes and rounds",
        "files": [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
        ],
        "roofline": [asdict(roofline) for roofline in rooflines],
        "rows": [asdict(row) for row in rows],
    }


def describe_machine() -> dict[str, Any]:
    """Say what machine this is.

    Returns
    -------
    dict
        CPU model, logical CPUs, memory in GiB, system.
    """
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "logical_cpus": os.cpu_count(),
        "memory_gib": round(memory / _GIBI, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def unused_path(folder: Path, name: str) -> Path:
    """Name a result file that does not exist yet.

    Parameters
    ----------
    folder : Path
        Where result files lie.
    name : str
        What was measured.

    Returns
    -------
    Path
        ``folder/DATE-name.json``, with a number behind the name from the second of a day on.
    """
    stem = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}-{name}"
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.json", number + 1
    return path


def _size(count: int) -> str:
    return f"{count / _MEBI:.2f} MiB" if count < _GIBI else f"{count / _GIBI:.2f} GiB"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
