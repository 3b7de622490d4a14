"""What would stop a result from being written, found out before hours of work."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from turbosparse.errors import ConfigError

__all__ = ["check_matplotlib", "check_output", "check_writable"]


def check_matplotlib() -> None:
    """Find out whether figures can be drawn.

    Raises
    ------
    ConfigError
        If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "[measure] expected matplotlib for the figures, got none; pip install 'turbosparse[report]'"
        ) from None


def check_output(output: Path, names: Sequence[str], folders: Sequence[Path], *, force: bool) -> None:
    """Find out whether a report can be written without replacing another.

    Parameters
    ----------
    output : Path
        Where the report goes.
    names : sequence of str
        Models, and directories of measurements, which keep what they have.
    folders : sequence of Path
        Where numbers and page of each go.
    force : bool
        Whether reports may be replaced.

    Raises
    ------
    ConfigError
        If there is a report, or a folder cannot be written to.
    """
    from turbosparse.measure import NUMBERS, PAGE

    written = [(output, part) for part in (NUMBERS, PAGE)]
    for name, folder in zip(names, folders, strict=True):
        written += [(folder, part) for part in (NUMBERS, PAGE) if not (Path(name) / part).exists()]
    for folder, part in written:
        if (folder / part).exists() and not force:
            raise ConfigError(f"[{folder}] expected no report there, got {part}; --force replaces it")
    for folder in dict.fromkeys(folder for folder, _ in written):
        check_writable(folder)


def check_writable(folder: Path) -> None:
    """Make a folder, and a file in it that goes again: permissions alone do not tell root.

    Parameters
    ----------
    folder : Path
        Where results go.

    Raises
    ------
    ConfigError
        If it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"[{folder}] expected a directory that can be written to, got: {error.strerror}"
        ) from error
