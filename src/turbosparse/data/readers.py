"""Readers of documents from text, jsonl and parquet files and from Hugging Face datasets, all streaming.

A reader yields one document at a time and can say where it stands (`tell`) and return there (`seek`); a
position is plain JSON, so that a checkpoint can hold it.
"""

import glob
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from turbosparse.data.config import SourceConfig
from turbosparse.errors import DataError

__all__ = ["Document", "DocumentReader", "open_reader"]

_CHUNK_BYTES = 1 << 20
_MIN_RECORDS_FOR_LIMIT = 100

Document = str | list[dict[str, str]] | list[int]
"""Plain text, the messages of a chat, or token ids made beforehand."""

_LOG = logging.getLogger(__name__)


class DocumentReader(ABC):
    """A resumable stream of documents.

    Parameters
    ----------
    config : SourceConfig
        What to read.
    max_corrupt_percent : float
        Unreadable records tolerated, in percent of those read.
    """

    def __init__(self, config: SourceConfig, max_corrupt_percent: float) -> None:
        self.config = config
        self.records = 0
        self.corrupt = 0
        self._max_corrupt_percent = max_corrupt_percent

    @abstractmethod
    def tell(self) -> Any:
        """Return the position of the next document, as JSON."""

    @abstractmethod
    def seek(self, position: Any) -> None:
        """Go to a position.

        Parameters
        ----------
        position : JSON value or None
            What `tell` returned; None is the start.
        """

    def order_key(self, position: Any) -> str:
        """Name a position in a pass, by the same name however often the reader was resumed before.

        Parameters
        ----------
        position : JSON value
            What `tell` returned.

        Returns
        -------
        str
            The name.
        """
        return str(position)

    @abstractmethod
    def read(self) -> Document | None:
        """Return the next document, or None at the end."""

    def __iter__(self) -> Iterator[Document]:
        while (document := self.read()) is not None:
            yield document

    def count_corrupt(self, place: str, reason: str) -> None:
        """Count a record that cannot be used.

        Parameters
        ----------
        place : str
            Where it stands.
        reason : str
            What is wrong with it.

        Raises
        ------
        DataError
            If these are more than are tolerated.
        """
        self.corrupt += 1
        if self.corrupt == 1:
            _LOG.warning(
                "[%s] skipped an unreadable record: %s (further ones are only counted)", place, reason
            )
        limit = self._max_corrupt_percent / 100 * max(self.records, _MIN_RECORDS_FOR_LIMIT)
        if self.corrupt > limit:
            raise DataError(
                f"[{place}] expected at most {self._max_corrupt_percent:g} % unreadable records, got "
                f"{self.corrupt} of {self.records}; the last one: {reason}"
            )

    def _field(self, record: Any, place: str) -> Document | None:
        value = record.get(self.config.field) if isinstance(record, dict) else None
        if _is_document(value):
            return value
        self.count_corrupt(place, f"no text, messages of text or token ids in field {self.config.field!r}")
        return None


def _is_document(value: Any) -> TypeGuard[Document]:
    if not isinstance(value, list):
        return isinstance(value, str) and bool(value.strip()) and _is_unicode(value)
    if all(type(token) is int for token in value):
        return bool(value) and min(value) >= 0
    contents = [message.get("content") if isinstance(message, dict) else None for message in value]
    return all(isinstance(content, str) and _is_unicode(content) for content in contents)


def _is_unicode(text: str) -> bool:
    """Whether it has no lone half of a surrogate pair, which JSON can spell and tokenizers do not take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _glob(pattern: str) -> list[str]:
    """Return the paths of a pattern, which may be absolute, in order."""
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 -- Path.glob refuses absolute patterns


class _FileReader(DocumentReader):
    """Goes through the sorted files of a glob; subclasses read one file from an offset on."""

    def __init__(self, config: SourceConfig, max_corrupt_percent: float) -> None:
        super().__init__(config, max_corrupt_percent)
        self.files = [Path(name) for name in _glob(config.path) if Path(name).is_file()]
        if not self.files:
            raise DataError(f"[{config.path}] expected a file or a dataset id, got nothing of that name")
        self.seek(None)

    def tell(self) -> Any:
        return [self._file, self._offset]

    def seek(self, position: Any) -> None:
        self._file: int
        self._offset: int
        self._file, self._offset = (0, 0) if position is None else position
        self._open: Iterator[tuple[Document, int]] | None = None

    def read(self) -> Document | None:
        while self._file < len(self.files):
            if self._open is None:
                self._open = self._documents(self.files[self._file], self._offset)
            for document, offset in self._open:
                self._offset = offset
                return document
            self._file, self._offset, self._open = self._file + 1, 0, None
        return None

    @abstractmethod
    def _documents(self, path: Path, offset: int) -> Iterator[tuple[Document, int]]:
        """Yield each document from `offset` on, with the offset behind it."""


class _TextReader(_FileReader):
    def _documents(self, path: Path, offset: int) -> Iterator[tuple[Document, int]]:
        separator = self.config.separator.encode()
        with path.open("rb") as file:
            file.seek(offset)
            pending = b""
            while True:
                chunk = file.read(_CHUNK_BYTES)
                parts = (pending + chunk).split(separator)
                pending = parts.pop() if chunk else b""
                for part in parts:
                    # The last part of a file may have no separator behind it; its offset is then past the
                    # end.
                    offset += len(part) + len(separator)
                    text = self._decode(part, path)
                    if text:
                        yield text, offset
                if not chunk:
                    return

    def _decode(self, part: bytes, path: Path) -> str:
        self.records += 1
        try:
            return part.decode().strip()
        except UnicodeDecodeError as error:
            self.count_corrupt(str(path), f"not UTF-8: {error.reason}")
            return ""


class _JsonLinesReader(_FileReader):
    def _documents(self, path: Path, offset: int) -> Iterator[tuple[Document, int]]:
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if offset == 0 and line.lstrip().startswith(b"["):
                    raise DataError(f"[{path}] expected one JSON object per line, got a JSON array")
                offset += len(line)
                if not line.strip():
                    continue
                self.records += 1
                try:
                    record = json.loads(line)
                except ValueError as error:
                    self.count_corrupt(str(path), f"not JSON: {error}")
                    continue
                document = self._field(record, str(path))
                if document is not None:
                    yield document, offset


class _ParquetReader(_FileReader):
    def _documents(self, path: Path, offset: int) -> Iterator[tuple[Document, int]]:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415 -- only where a source needs it

        try:
            file = parquet.ParquetFile(path)
        except (ArrowException, OSError) as error:
            raise DataError(f"[{path}] expected a parquet file, got: {error}") from error
        if self.config.field not in file.schema_arrow.names:
            raise DataError(
                f"[{path}] expected a column {self.config.field!r}, got {', '.join(file.schema_arrow.names)}"
            )
        start = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if offset < start + rows:
                try:
                    column = file.read_row_group(group, columns=[self.config.field]).column(0)
                except (ArrowException, OSError) as error:
                    raise DataError(f"[{path}] expected a whole parquet file, got: {error}") from error
                for row in range(max(offset - start, 0), rows):
                    self.records += 1
                    try:
                        record = {self.config.field: column[row].as_py()}
                    except UnicodeDecodeError as error:
                        self.count_corrupt(str(path), f"not UTF-8: {error.reason}")
                        continue
                    document = self._field(record, str(path))
                    if document is not None:
                        yield document, start + row + 1
            start += rows


class _HubReader(DocumentReader):
    """Reads a dataset; a position is the number of rows before it in the pass, and the dataset's state there.

    `datasets` has several states for one position: which one depends on where it was resumed.
    """

    def __init__(self, config: SourceConfig, max_corrupt_percent: float) -> None:
        super().__init__(config, max_corrupt_percent)
        from datasets import load_dataset  # noqa: PLC0415 -- only where a source needs it

        try:
            self._dataset = load_dataset(
                config.path, config.subset or None, split=config.split, streaming=True
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"[{config.path}] expected a file or the id of a dataset that can be reached, got: {error}"
            ) from error
        self._start = self._dataset.state_dict()
        self.seek(None)

    def tell(self) -> Any:
        # Before its first row a dataset still has the state of what was read before.
        if self._pending is not None:
            return self._pending
        return {"row": self._row, "dataset": self._dataset.state_dict()}

    def seek(self, position: Any) -> None:
        if position is None:
            position = {"row": 0, "dataset": self._start}
        elif "row" not in position:  # checkpoints of older versions have the state alone
            position = {"row": 0, "dataset": position}
        self._row: int = position["row"]
        self._pending: Any = position
        self._dataset.load_state_dict(position["dataset"])
        self._rows = iter(self._dataset)

    def order_key(self, position: Any) -> str:
        return str(position.get("row", position))

    def read(self) -> Document | None:
        self._pending = None
        for record in self._rows:
            self._row += 1
            self.records += 1
            document = self._field(record, self.config.path)
            if document is not None:
                return document
        return None


_BY_FORMAT: dict[str, Callable[[SourceConfig, float], DocumentReader]] = {
    "text": _TextReader,
    "jsonl": _JsonLinesReader,
    "parquet": _ParquetReader,
    "hub": _HubReader,
}
_BY_SUFFIX = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".7z")


def open_reader(config: SourceConfig, max_corrupt_percent: float = 1.0) -> DocumentReader:
    """Open a source of documents.

    Parameters
    ----------
    config : SourceConfig
        What to read. A path without a known ending that is no file is taken for a dataset: its directory, or
        its id on the hub.
    max_corrupt_percent : float, default 1.0
        Unreadable records tolerated, in percent of those read (of 100, as long as fewer were read).

    Returns
    -------
    DocumentReader
        Standing before the first document.

    Raises
    ------
    DataError
        If there is no such file or dataset, or the file is a compressed one.
    """
    kind = config.format
    if kind == "auto":
        matches = _glob(config.path)
        name = Path(matches[0] if matches else config.path)
        if name.suffix in _COMPRESSED and name.is_file():
            raise DataError(f"[{name}] expected text, jsonl or parquet, got a compressed file: unpack it")
        kind = _BY_SUFFIX.get(name.suffix, "text" if name.is_file() else "hub")
    return _BY_FORMAT[kind](config, max_corrupt_percent)
