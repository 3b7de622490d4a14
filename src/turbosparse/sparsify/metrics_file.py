"""The metrics of a run, as JSON lines."""

import json
from pathlib import Path
from typing import Any

__all__ = ["METRICS_FILE", "forget_metrics", "read_metrics"]

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics, without those that a crash or a full disk cut.

    Parameters
    ----------
    path : Path
        The file; one that is missing has no lines.

    Returns
    -------
    list of dict
        One per line.
    """
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def forget_metrics(path: Path, stage: str, *, after: int) -> None:
    """Take out what is broken, and the lines of steps that are about to be done again.

    Parameters
    ----------
    path : Path
        The file.
    stage : str
        The stage that begins or goes on.
    after : int
        The last step that stays; what the original model was measured as stays anyway.
    """
    if not path.is_file():
        return
    kept = [
        record
        for record in read_metrics(path)
        if record.get("stage") != stage or record.get("step", 0) <= after or record.get("event") == "original"
    ]
    staging = path.with_suffix(".incomplete")
    staging.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    staging.replace(path)
