"""Texts: the two that ship with the package (README.md here), and how any text file is read."""

from pathlib import Path

from turbosparse.errors import TextError

__all__ = ["CALIBRATION", "HELD_OUT", "read_text"]

CALIBRATION = Path(__file__).with_name("calibration.txt")
"""What thresholds are found on where no other text is given; about 24,000 tokens."""
HELD_OUT = Path(__file__).with_name("heldout.txt")
"""What quality is judged on; about 13,000 tokens. Nothing is ever fitted to it."""


def read_text(path: Path) -> str:
    """Read a text file.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    str
        Its text.

    Raises
    ------
    TextError
        When it is not UTF-8, or holds nothing but white space.
    OSError
        When it cannot be read.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"[{path}] expected UTF-8, got byte 0x{data[error.start]:02x} at position {error.start}"
        ) from None
    if not text.strip():
        raise TextError(f"[{path}] expected text, got nothing but white space")
    return text
