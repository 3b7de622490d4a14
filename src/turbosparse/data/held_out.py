"""Which documents never meet training: by their hash, so that every process and every run agrees."""

import hashlib
from collections.abc import Collection

from turbosparse.data.config import DataConfig
from turbosparse.data.readers import Document, open_reader
from turbosparse.errors import DataError

__all__ = ["HeldOutSplit", "document_hash", "split_of"]


def document_hash(document: Document) -> str:
    """Hash a document by its words, so that a copy with other white space is the same document.

    Parameters
    ----------
    document : str, list of dict or list of int
        Text, the messages of a chat, or token ids.

    Returns
    -------
    str
        SHA-256, 64 hexadecimal digits.

    Examples
    --------
    >>> document_hash("two  words") == document_hash("two words\\n")
    True
    """
    if isinstance(document, str):
        text = document
    else:
        text = "\n".join(part["content"] if isinstance(part, dict) else str(part) for part in document)
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).hexdigest()


class HeldOutSplit:
    """Decides by hash whether a document is held out.

    Parameters
    ----------
    percent : float
        Share of all documents to hold out, 0 to 100.
    excluded : collection of str
        Hashes of further documents to hold out, such as those of an evaluation text.
    """

    def __init__(self, percent: float, excluded: Collection[str] = ()) -> None:
        self.percent = percent
        self._limit = int(percent / 100 * 16**8)
        self._excluded = frozenset(excluded)

    def is_held_out(self, document: Document) -> bool:
        """Whether training must not see this document.

        Parameters
        ----------
        document : str, list of dict or list of int
            Text, the messages of a chat, or token ids.

        Returns
        -------
        bool
            The same in every process and run.
        """
        digest = document_hash(document)
        return int(digest[:8], 16) < self._limit or digest in self._excluded


def split_of(data: DataConfig) -> HeldOutSplit:
    """Hold out a share of all documents, and every document of the evaluation sources.

    Parameters
    ----------
    data : DataConfig
        Its ``held_out_percent`` and ``held_out``; the latter are read as a whole.

    Returns
    -------
    HeldOutSplit
        The split.

    Raises
    ------
    DataError
        If an evaluation source is empty.
    """
    excluded: set[str] = set()
    for source in data.held_out:
        hashes = {document_hash(document) for document in open_reader(source, data.max_corrupt_percent)}
        if not hashes:
            raise DataError(f"[{source.path}] expected documents to hold out, got none")
        excluded |= hashes
    return HeldOutSplit(data.held_out_percent, excluded)
