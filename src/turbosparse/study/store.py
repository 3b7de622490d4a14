"""What a study has finished, on disk: one file per result, so that an interrupted study goes on."""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from turbosparse.errors import ConfigError
from turbosparse.measure.report import plain

__all__ = ["Store"]

logger = logging.getLogger(__name__)

_BEGUN = "begun.json"
_FINGERPRINT = "_fingerprint"


class Store:
    """Results of one study.

    Parameters
    ----------
    folder : Path
        Of the study; made if it is not there.
    kind : str
        Which study.
    settings : mapping
        What results depend on, ready for JSON: a study goes on only with the settings it began with. One
        that ends in ``_fingerprint`` stands for what it is of, whose path may then change; studies of older
        versions have none.
    undecided : sequence of str
        Settings that this call has none of; a study that it begins takes those of the next.

    Attributes
    ----------
    seconds : float
        That the results asked for have taken, in this call or before.

    Raises
    ------
    ConfigError
        When the folder holds another study, one with other settings (the message names the first), or a
        broken one.
    """

    def __init__(
        self, folder: Path, kind: str, settings: Mapping[str, Any], *, undecided: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self.seconds = 0.0
        self._results = folder / "results"
        self._results.mkdir(parents=True, exist_ok=True)
        begun = folder / _BEGUN
        wanted = plain({"study": kind, "settings": dict(settings)})
        if undecided:
            wanted["undecided"] = list(undecided)
        if not begun.exists():
            _write(begun, wanted)
        found = _read(begun, ("study", "settings"))
        if found["study"] != kind:
            raise ConfigError(f"[{folder}] expected the study {kind} or nothing there, got {found['study']}")
        known = found["settings"]
        left_open = found.get("undecided", [])
        new = {
            name
            for name in wanted["settings"]
            if name not in known and (name.endswith(_FINGERPRINT) or name in left_open)
        }
        for name, value in wanted["settings"].items():
            if name in new or f"{name}{_FINGERPRINT}" in known:
                continue
            if known.get(name) != value:
                raise ConfigError(
                    f"[{folder}] expected the {name} that this study began with, "
                    f"{_short(known.get(name))}, got {_short(value)}; give another output"
                )
        if new:
            taken = {name: wanted["settings"][name] for name in new}
            _write(begun, {"study": kind, "settings": known | taken} | _left(left_open, new))

    def result(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Read a result, or compute and keep it.

        Parameters
        ----------
        name : str
            Unique in the study.
        compute : callable
            Makes the result, ready for JSON but for NaN.

        Returns
        -------
        dict
            With ``seconds`` that it took.

        Raises
        ------
        ConfigError
            When the result on disk is broken.
        """
        path = self._results / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.json"
        if path.exists():
            logger.info("[%s] is there already", name)
        else:
            started = time.monotonic()
            value = compute()
            _write(path, plain(value | {"seconds": time.monotonic() - started}))
        found = _read(path, ("seconds",))
        self.seconds += found["seconds"]
        return found


def _left(undecided: Sequence[str], taken: set[str]) -> dict[str, list[str]]:
    left = [name for name in undecided if name not in taken]
    return {"undecided": left} if left else {}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """A file with this name is whole."""
    staging = path.with_suffix(f".{os.getpid()}.incomplete")
    staging.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    staging.replace(path)


def _read(path: Path, names: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        found = error
    if not isinstance(found, dict) or not all(name in found for name in names):
        raise ConfigError(f"[{path}] expected what a study kept, got another text; remove it to go on")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else f"{text[:57]}..."
