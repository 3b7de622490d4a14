"""Settings from files and command lines: TOML tables that fill frozen dataclasses."""

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from turbosparse.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["apply_setting", "fill", "read_toml"]

_T = TypeVar("_T")


def read_toml(path: Path, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Read a TOML file and apply settings on top.

    Parameters
    ----------
    path : Path
        A TOML file.
    settings : sequence of str
        As `apply_setting` takes them.

    Returns
    -------
    dict
        Nested tables.

    Raises
    ------
    ConfigError
        If the file is missing or broken, or a setting names no field.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"[{path}] expected a recipe file, got: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"[{path}] expected TOML, got: {error}") from error
    for setting in settings:
        apply_setting(values, setting)
    return values


def apply_setting(values: dict[str, Any], setting: str) -> None:
    """Change one field.

    Parameters
    ----------
    values : dict
        Nested tables; changed in place.
    setting : str
        ``field=value``, ``section.field=value`` or ``list.NAME.field=value`` for the table of that name in a
        list; values in TOML syntax, bare words are taken as strings.

    Raises
    ------
    ConfigError
        If it has no equals sign, or leads through something that is no table.
    """
    key, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"[--set] expected FIELD=VALUE, got {setting!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.strip().split(".")
    table: Any = values
    for name in path:
        if isinstance(table, list):
            table = next((item for item in table if item.get("name") == name), None)
        else:
            table = table.setdefault(name, {}) if isinstance(table, dict) else None
        if table is None:
            raise ConfigError(f"[--set] expected the name of a field or stage, got {name!r} in {setting!r}")
    if not isinstance(table, dict):
        raise ConfigError(f"[--set] expected the name of a stage before the field, got {setting!r}")
    table[last] = value


def fill(kind: type[_T], values: Mapping[str, Any], place: str) -> _T:
    """Build a dataclass from nested tables.

    Parameters
    ----------
    kind : type
        A dataclass; its fields are numbers, strings, tuples, dataclasses, or one of these or None.
    values : mapping
        As a TOML file gives them.
    place : str
        For messages.

    Returns
    -------
    kind
        Checked by its own rules too.

    Raises
    ------
    ConfigError
        If a field is unknown, missing, of another type or out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"[{place}] expected a table, got {values!r}")
    hints = typing.get_type_hints(kind)
    fields: dict[str, Any] = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"[{place}] expected fields of {', '.join(fields)}, got {', '.join(unknown)}")
    missing = [
        name
        for name, item in fields.items()
        if name not in values
        and item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"[{place}] expected the fields {', '.join(missing)}, got none")
    return kind(**{name: _convert(hints[name], value, f"{place}.{name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, place: str) -> Any:
    if typing.get_origin(hint) is types.UnionType:  # only X | None occurs
        return None if value is None else _convert(typing.get_args(hint)[0], value, place)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"[{place}] expected a list, got {value!r}")
        return tuple(
            _convert(typing.get_args(hint)[0], item, f"{place}[{i}]") for i, item in enumerate(value)
        )
    if dataclasses.is_dataclass(hint):
        return fill(typing.cast("type[Any]", hint), value, place)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"[{place}] expected {hint.__name__}, got {value!r}")
    return value
