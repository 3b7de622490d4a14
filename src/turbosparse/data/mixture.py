"""A weighted mixture of sources, tokenised and packed into full sequences; resumable at the exact sequence.

Every source has its own packed stream. The next sequence comes from the source that is furthest behind its
share, so that the shares of tokens hold at every moment and no random choice has to be stored. Documents of a
source are shuffled in blocks by (seed, source, epoch, block). A sequence is filled with whole documents up to
its end; what is left of the last one starts the next sequence. ``position_ids`` start at 0 with each
document, from which transformers derives a mask that keeps documents apart.
"""

import copy
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from turbosparse.data.config import DataConfig, SourceConfig
from turbosparse.data.held_out import HeldOutSplit
from turbosparse.data.readers import Document, DocumentReader, open_reader
from turbosparse.errors import DataError

__all__ = ["DocumentError", "Encoder", "Mixture", "PackedSequence", "SourceCounts", "held_out_sequences"]

Encoder = Callable[[Document], tuple[list[int], list[int]]]
"""Turns a document into token ids and labels (-100 where there is nothing to learn) of the same length."""


class DocumentError(DataError):
    """An encoder cannot take this document, but may take others: it counts as an unreadable record."""


@dataclass(frozen=True, kw_only=True)
class PackedSequence:
    """One row of a batch; three lists of ``sequence_length`` integers."""

    input_ids: list[int]
    position_ids: list[int]
    labels: list[int]


@dataclass(kw_only=True)
class SourceCounts:
    """What was really drawn from a source."""

    documents: int = 0
    tokens: int = 0
    held_out_documents: int = 0
    passes: int = 0


# Held-out text for evaluation is spread over so many times as much, out of so many characters read.
_SPREAD = 100
_MOST_CHARACTERS = 1_000_000_000
_LOG = logging.getLogger(__name__)


class _SourceStream:
    """Packed sequences of one source."""

    def __init__(
        self, index: int, data: DataConfig, encode: Encoder, *, seed: int, split: HeldOutSplit
    ) -> None:
        self.config = data.sources[index]
        self.name = data.source_names()[index]
        self.counts = SourceCounts()
        self._reader = open_reader(self.config, data.max_corrupt_percent)
        self._encode = encode
        self._block_size = data.shuffle_documents
        self._length = data.sequence_length
        self._max_characters = data.max_document_characters
        self._seed = f"{seed}/{index}"
        self._split = split
        self._block_start: Any = None
        self._block: list[Document] = []
        self._next = 0  # index into the block
        self._ids: list[int] = []
        self._positions: list[int] = []
        self._labels: list[int] = []
        self._check_not_empty()

    def _check_not_empty(self) -> None:
        """Look for one document to train on, before a run spends time on anything else."""
        for document in self._reader:
            if self._split.is_held_out(document):
                self.counts.held_out_documents += 1
            # Any tokenizer takes a text; chats and token ids show whether it is the one for them.
            elif isinstance(document, str) or _encoded(document, self._encode, self._reader)[0]:
                break
        else:
            count = self.counts.held_out_documents
            found = f"none: all {count} are held out" if count else "none"
            raise DataError(f"[{self.name}] expected documents to train on, got {found}")
        self.counts = SourceCounts()
        self._reader.seek(None)
        self._reader.records = self._reader.corrupt = 0

    def draw(self) -> PackedSequence | None:
        """Return the next sequence, or None when the source is dry and shall stop."""
        while len(self._ids) < self._length:
            document = self._next_document()
            if document is None:
                return None
            ids, labels = _encoded(document, self._encode, self._reader)
            self.counts.documents += bool(ids)
            self._ids += ids
            self._labels += labels
            self._positions += range(len(ids))
        n = self._length
        sequence = PackedSequence(
            input_ids=self._ids[:n], position_ids=_restart(self._positions[:n]), labels=self._labels[:n]
        )
        self._ids, self._positions, self._labels = self._ids[n:], self._positions[n:], self._labels[n:]
        self.counts.tokens += n
        return sequence

    def _next_document(self) -> Document | None:
        if self._next >= len(self._block):
            self._read_block(self._reader.tell())
            if not self._block:
                return None
        self._next += 1
        return self._block[self._next - 1]

    def _read_block(self, start: Any) -> None:
        """Read the block that starts at a position; at the end of the source, what `on_end` says."""
        self._block_start, self._next = start, 0
        self._block = self._fill_block()
        if self._block:
            return
        self.counts.passes += 1
        if self.config.on_end == "error":
            raise DataError(
                f"[{self.config.path}] expected enough documents for the run, got the end after "
                f"{self.counts.documents} documents, {self.counts.tokens} tokens; set on_end to repeat"
            )
        if self.counts.passes == 1:
            _LOG.warning(
                "[%s] expected more documents, got the end after %d documents, %d tokens; %s",
                self.name,
                self.counts.documents,
                self.counts.tokens,
                "they are repeated" if self.config.on_end == "repeat" else "other sources fill its share",
            )
        if self.config.on_end == "repeat":
            self._reader.seek(None)
            self._block_start = self._reader.tell()
            self._block = self._fill_block()

    def _fill_block(self) -> list[Document]:
        block: list[Document] = []
        read = 0
        for document in self._reader:
            if self._split.is_held_out(document):
                self.counts.held_out_documents += 1
                continue
            block += _cut(document, self._max_characters) if isinstance(document, str) else [document]
            read += 1
            if read == self._block_size:
                break
        # Keyed by what is known after a resume as well: the same block gets the same order.
        start = self._reader.order_key(self._block_start)
        random.Random(f"{self._seed}/{self.counts.passes}/{start}").shuffle(block)
        return block

    def state(self) -> dict[str, Any]:
        return {
            "path": self.config.path,
            "block_start": copy.deepcopy(self._block_start),
            "next": self._next,
            "pending": [list(self._ids), list(self._positions), list(self._labels)],
            "counts": asdict(self.counts),
            "records": [self._reader.records, self._reader.corrupt],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.counts = SourceCounts(**state["counts"])
        self._ids, self._positions, self._labels = (list(values) for values in state["pending"])
        known = state.get("records")  # checkpoints of older versions do not know
        # The block's unreadable records were within the limit when it was read: as part of all that was read
        # by then, and counted once.
        self._reader.records, self._reader.corrupt = known[0] if known else 0, 0
        if state["block_start"] is not None:
            self._reader.seek(state["block_start"])
            self._block_start = state["block_start"]
            held_out = self.counts.held_out_documents
            self._block = self._fill_block()
            self.counts.held_out_documents = held_out
        if known:
            self._reader.records, self._reader.corrupt = known
        self._next = state["next"]


def _encoded(document: Document, encode: Encoder, reader: DocumentReader) -> tuple[list[int], list[int]]:
    """Encode a document; one that the encoder cannot take is counted, and becomes no tokens."""
    try:
        return encode(document)
    except DocumentError as error:
        reader.count_corrupt(reader.config.path, str(error))
        return [], []


def _cut(text: str, limit: int) -> list[str]:
    """Cut a text at blank lines into pieces of at most `limit` characters; longer paragraphs stay whole."""
    if not limit or len(text) <= limit:
        return [text]
    pieces: list[str] = []
    for paragraph in text.split("\n\n"):
        if pieces and len(pieces[-1]) + 2 + len(paragraph) <= limit:
            pieces[-1] += "\n\n" + paragraph
        else:
            pieces.append(paragraph)
    return [piece for piece in pieces if piece.strip()]


def _size(document: Document) -> int:
    """Count the characters of a document, four for a token id."""
    if isinstance(document, str):
        return len(document)
    return sum(len(part["content"]) if isinstance(part, dict) else 4 for part in document)


def _restart(positions: list[int]) -> list[int]:
    """Let the tail of a document that began in the sequence before start at 0."""
    first = positions[0]
    if first == 0:
        return positions
    end = next((i for i, position in enumerate(positions) if position == 0), len(positions))
    return [position - first for position in positions[:end]] + positions[end:]


class Mixture:
    """An endless (or, with ``on_end = "stop"``, finite) stream of packed sequences.

    Parameters
    ----------
    config : DataConfig
        Sources, weights and packing.
    encode : Encoder
        Turns a document into token ids and labels, the end-of-document token included.
    split : HeldOutSplit
        What must not be drawn.
    seed : int
        Decides the order of documents.

    Raises
    ------
    DataError
        If a source is missing or empty, or begins with chats or token ids that the encoder cannot take.
    """

    def __init__(self, config: DataConfig, encode: Encoder, *, split: HeldOutSplit, seed: int = 0) -> None:
        self.sequence_length = config.sequence_length
        self._order = {
            "seed": seed,
            "shuffle_documents": config.shuffle_documents,
            "max_document_characters": config.max_document_characters,
            "held_out_percent": split.percent,
        }
        self._streams = [
            _SourceStream(index, config, encode, seed=seed, split=split)
            for index, source in enumerate(config.sources)
            if source.weight > 0
        ]
        self._dry: set[int] = set()

    def __iter__(self) -> Iterator[PackedSequence]:
        while len(self._dry) < len(self._streams):
            live = [i for i in range(len(self._streams)) if i not in self._dry]
            index = min(live, key=lambda i: self._streams[i].counts.tokens / self._streams[i].config.weight)
            sequence = self._streams[index].draw()
            if sequence is None:
                self._dry.add(index)
            else:
                yield sequence

    def state(self) -> dict[str, Any]:
        """Return where the stream stands, as JSON."""
        return {
            "order": self._order,
            "sources": [stream.state() for stream in self._streams],
            "dry": sorted(self._dry),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken.

        Parameters
        ----------
        state : dict
            What `state` returned, of a mixture with the same sources in the same order.

        Raises
        ------
        DataError
            If the sources differ, or what decides the order of their documents.
        """
        for name, value in self._order.items():
            if state["order"][name] != value:
                raise DataError(
                    f"[resume] expected {name} {state['order'][name]} as before, got {value}: the place in "
                    "the data would be another; start a new run, or give the stage data of its own"
                )
        expected = [stream.config.path for stream in self._streams]
        got = [source["path"] for source in state["sources"]]
        if expected != got:
            raise DataError(f"[resume] expected the sources {expected} as before, got {got}")
        for stream, saved in zip(self._streams, state["sources"], strict=True):
            stream.restore(saved)
        self._dry = set(state["dry"])

    def report(self) -> dict[str, dict[str, float]]:
        """Return what was drawn from each source: counts, and its share of the tokens."""
        total = sum(stream.counts.tokens for stream in self._streams) or 1
        return {
            stream.name: {
                **asdict(stream.counts),
                "corrupt_records": stream._reader.corrupt,
                "token_share": stream.counts.tokens / total,
            }
            for stream in self._streams
        }


def held_out_sequences(
    source: SourceConfig, encode: Encoder, *, split: HeldOutSplit | None, sequence_length: int, count: int
) -> Sequence[PackedSequence]:
    """Pack held-out documents of a source for evaluation, sequences spread evenly over what there is.

    Parameters
    ----------
    source : SourceConfig
        Where to read.
    encode : Encoder
        Turns a document into token ids and labels.
    split : HeldOutSplit or None
        Take what this split holds out; None takes every document.
    sequence_length : int
        Tokens per sequence.
    count : int
        Sequences wanted.

    Returns
    -------
    sequence of PackedSequence
        At most `count`, each of other tokens, out of the source's first 100 times as many, and of its first
        1e9 characters.
    """
    reader = open_reader(source, max_corrupt_percent=100)
    ids: list[int] = []
    labels: list[int] = []
    characters = 0
    for document in reader:
        if len(ids) >= _SPREAD * count * sequence_length or characters >= _MOST_CHARACTERS:
            break
        characters += _size(document)
        if split is None or split.is_held_out(document):
            encoded, learnt = _encoded(document, encode, reader)
            ids += encoded
            labels += learnt[:1] + encoded[1:]  # what every document begins with is not predicted
    starts = range(0, len(ids) - sequence_length + 1, sequence_length)
    found = min(count, len(starts))
    positions = list(range(sequence_length))
    rows = []
    for i in range(found):
        begin = starts[i * len(starts) // found]
        end = begin + sequence_length
        rows.append(
            PackedSequence(input_ids=ids[begin:end], position_ids=positions, labels=labels[begin:end])
        )
    return rows
