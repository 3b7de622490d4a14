"""Settings of the training text: what is read, in which shares, and what is kept out."""

from dataclasses import dataclass, field

from turbosparse.errors import ConfigError

__all__ = ["DataConfig", "SourceConfig"]

FORMATS = ("auto", "text", "jsonl", "parquet", "hub")
ON_END = ("repeat", "stop", "error")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents."""

    path: str
    """File, glob of files, or id of a Hugging Face dataset."""
    weight: float = 1.0
    """Share of the drawn tokens, relative to the other sources; at least 0."""
    license: str = ""
    """Licence of the text, for the model card of what is trained on it."""
    format: str = "auto"
    """auto (by the file name's ending), text, jsonl, parquet or hub."""
    field: str = "text"
    """Field that holds the text in jsonl, parquet and hub sources; a list of chat messages in it is
    rendered by the tokenizer's chat template, a list of integers is taken for token ids."""
    separator: str = "\n\n\n"
    """What stands between two documents of a text file."""
    subset: str = ""
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    on_end: str = "repeat"
    """When the source runs dry: repeat it, stop drawing from it (the others fill its share), or error."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("[data.sources] expected a path or dataset id, got an empty one")
        if not self.weight >= 0:
            raise ConfigError(f"[{self.path}] expected a weight of at least 0, got {self.weight}")
        if self.format not in FORMATS:
            raise ConfigError(f"[{self.path}] expected a format of {', '.join(FORMATS)}, got {self.format!r}")
        if self.on_end not in ON_END:
            raise ConfigError(f"[{self.path}] expected on_end of {', '.join(ON_END)}, got {self.on_end!r}")
        if not self.separator:
            raise ConfigError(f"[{self.path}] expected a separator, got an empty one")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A mixture, how it is packed, and the held-out text."""

    sources: tuple[SourceConfig, ...] = field(default_factory=tuple)
    """At least one, with weights that sum to more than 0."""
    sequence_length: int = 2048
    """Tokens per packed sequence, at least 8."""
    document_end: str = ""
    """Token put after each document; the tokenizer's end-of-sequence token if empty. Before each goes the
    token that the tokenizer itself begins a text with, if any."""
    shuffle_documents: int = 1000
    """Documents shuffled together, per source; at least 1 (1 keeps the order)."""
    max_document_characters: int = 0
    """Longer texts are cut at blank lines, and the pieces shuffled like documents: a few books then do not
    fill whole batches. At least 100, or 0 to keep them whole."""
    held_out_percent: float = 2.0
    """Share of every source's documents that never meets training, chosen by their hash; 0 to 50."""
    held_out: tuple[SourceConfig, ...] = field(default_factory=tuple)
    """Sources for evaluation alone; none of their documents is trained on, wherever it turns up."""
    max_corrupt_percent: float = 1.0
    """Unreadable records tolerated per source, 0 to 100; they are counted and skipped. A chat that the
    tokenizer's chat template refuses is one."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("[data.sources] expected at least one source, got none")
        if not sum(source.weight for source in self.sources) > 0:
            raise ConfigError("[data.sources] expected weights that sum to more than 0, got only zeros")
        if self.sequence_length < 8:
            raise ConfigError(f"[data.sequence_length] expected at least 8, got {self.sequence_length}")
        if self.shuffle_documents < 1:
            raise ConfigError(f"[data.shuffle_documents] expected at least 1, got {self.shuffle_documents}")
        if self.max_document_characters and self.max_document_characters < 100:
            got = self.max_document_characters
            raise ConfigError(f"[data.max_document_characters] expected 0 or at least 100, got {got}")
        if not 0 <= self.held_out_percent <= 50:
            raise ConfigError(f"[data.held_out_percent] expected 0 to 50, got {self.held_out_percent}")
        if not 0 <= self.max_corrupt_percent <= 100:
            raise ConfigError(f"[data.max_corrupt_percent] expected 0 to 100, got {self.max_corrupt_percent}")

    def source_names(self) -> tuple[str, ...]:
        """Name the sources apart.

        Returns
        -------
        tuple of str
            One for each: its path, and with it what sources of one path differ in.
        """
        names: list[str] = []
        for source in self.sources:
            same = [other for other in self.sources if other.path == source.path]
            fields = [f for f in ("subset", "split", "field") if len({getattr(s, f) for s in same}) > 1]
            name = source.path
            if fields:
                name += f" ({', '.join(getattr(source, f) or 'default' for f in fields)})"
            count = sum(known == name or known.startswith(f"{name} #") for known in names)
            names.append(f"{name} #{count + 1}" if count else name)
        return tuple(names)
