"""Models that start from random weights: a shape, a tokenizer of their own size, and a directory of both."""

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbosparse.data.config import DataConfig
from turbosparse.data.held_out import split_of
from turbosparse.data.readers import open_reader
from turbosparse.errors import ConfigError, DataError
from turbosparse.models.activations import Activation, parse_activation

if TYPE_CHECKING:
    from turbosparse.sparsify.recipe import Recipe

__all__ = ["FreshModel", "start_fresh", "train_tokenizer", "write_once", "write_start"]

_LOG = logging.getLogger(__name__)
_START = "start"
_SETTINGS_FILE = "turbosparse_start.json"
_END = "<|endoftext|>"
_TOKENIZER_CHARACTERS = 20_000_000  # read to train a tokenizer; a vocabulary of 32,000 needs no more


@dataclass(frozen=True, kw_only=True)
class FreshModel:
    """Shape of a Llama model with random weights, or of a Mixtral where there are experts."""

    hidden_size: int
    """D, a multiple of the heads."""
    intermediate_size: int
    """F, of an expert where there are experts."""
    num_hidden_layers: int
    """At least 1."""
    num_attention_heads: int
    """At least 1."""
    num_key_value_heads: int = 0
    """A divisor of the heads; 0: as many as heads."""
    gated: bool = True
    """Gate, up and down, or up and down alone (the type Arcee: Llama with plain FFNs)."""
    num_experts: int = 0
    """E; 0: one FFN per layer."""
    num_experts_per_tok: int = 2
    """1 to E; not used without experts."""
    vocab_size: int = 32_000
    """Tokens of the tokenizer trained on the data, at least 257; not used with another one."""
    tokenizer: str = ""
    """Hugging Face directory or id of a tokenizer; empty trains a byte-level BPE on the training text."""
    context_length: int = 2048
    """Positions, at least the length of the training sequences."""
    tie_word_embeddings: bool = True
    """Share the embedding with the output head."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"[fresh.{name}] expected at least 1, got {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ConfigError(
                f"[fresh.hidden_size] expected a multiple of twice the {self.num_attention_heads} heads, got "
                f"{self.hidden_size}"
            )
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"[fresh.num_key_value_heads] expected a divisor of {self.num_attention_heads}, got "
                f"{self.num_key_value_heads}"
            )
        if self.num_experts < 0:
            raise ConfigError(f"[fresh.num_experts] expected at least 0, got {self.num_experts}")
        used = self.num_experts_per_tok
        if self.num_experts and not 1 <= used <= self.num_experts:
            raise ConfigError(f"[fresh.num_experts_per_tok] expected 1 to {self.num_experts}, got {used}")
        if self.num_experts and not self.gated:
            raise ConfigError("[fresh.gated] expected gated experts, got plain ones")
        if not self.tokenizer and self.vocab_size < 257:
            raise ConfigError(
                f"[fresh.vocab_size] expected at least 257, all bytes and an end, got {self.vocab_size}"
            )


def start_fresh(recipe: "Recipe") -> "Recipe":
    """Write the configuration and the tokenizer of a recipe's fresh model, once.

    Parameters
    ----------
    recipe : Recipe
        Any; one without ``fresh`` is returned as it is.

    Returns
    -------
    Recipe
        That starts from random weights of the directory ``start`` in its output.

    Raises
    ------
    ConfigError
        If the activation does not fit the FFN, sequences are longer than the model's context, or the run
        began with another shape.
    """
    shape = recipe.fresh
    if shape is None:
        return recipe
    longest = max(recipe.data_of(stage).sequence_length for stage in recipe.stages)
    if longest > shape.context_length:
        raise ConfigError(f"[fresh.context_length] expected at least {longest}, got {shape.context_length}")
    start = Path(recipe.output) / _START
    activation = parse_activation(recipe.activation)
    tokenizer = shape.tokenizer
    if tokenizer and Path(tokenizer).is_dir():  # may move together with the run
        tokenizer = os.path.relpath(tokenizer, recipe.output)
    settings = dataclasses.asdict(shape) | {"tokenizer": tokenizer}
    write_start(
        start,
        {"start": "fresh", **{f"fresh.{name}": value for name, value in settings.items()}},
        lambda staging: _write_configuration(staging, shape, activation, recipe.data),
    )
    return dataclasses.replace(recipe, model=str(start), fresh=None, from_scratch=True)


def write_start(folder: Path, settings: dict[str, Any], write: Callable[[Path], object]) -> bool:
    """Write what a run starts from, once, and what it was made with.

    Parameters
    ----------
    folder : Path
        Directory of the start.
    settings : dict
        Names as in a recipe, and values that JSON can hold.
    write : callable
        Fills the folder it is given.

    Returns
    -------
    bool
        False if it was there.

    Raises
    ------
    ConfigError
        If it was made with other settings. One of an earlier version, which has none, is taken as it is.
    """
    if not folder.is_dir():

        def _write_all(staging: Path) -> None:
            write(staging)
            (staging / _SETTINGS_FILE).write_text(json.dumps(settings, indent=1), encoding="utf-8")

        write_once(folder, _write_all)
        return True
    record = folder / _SETTINGS_FILE
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if before.get(name, value) != value:
                raise ConfigError(
                    f"[{name}] expected {before[name]!r}, with which {folder} was made, got {value!r}; give "
                    "the run another output"
                )
    return False


def write_once(folder: Path, write: Callable[[Path], object]) -> None:
    """Fill a folder that other processes may be filling too.

    Parameters
    ----------
    folder : Path
        Of the same contents, whoever writes it; whole as soon as it has its name.
    write : callable
        Fills the folder it is given.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
    ) as private:
        staging = Path(private) / folder.name  # with the usual permissions
        staging.mkdir()
        try:
            write(staging)
            staging.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def _write_configuration(folder: Path, shape: FreshModel, activation: Activation, data: DataConfig) -> None:
    from transformers import ArceeConfig, AutoTokenizer, LlamaConfig, MixtralConfig  # noqa: PLC0415 -- slow to import

    if shape.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(shape.tokenizer)
    else:
        tokenizer = train_tokenizer(data, shape.vocab_size)
    if not shape.gated and activation.hidden_act is None:
        raise ConfigError(f"[fresh.gated] expected a gated FFN for {activation}, got a plain one")
    kind = MixtralConfig if shape.num_experts else LlamaConfig if shape.gated else ArceeConfig
    experts = {"num_local_experts": shape.num_experts, "num_experts_per_tok": shape.num_experts_per_tok}
    config = kind(
        **(experts if shape.num_experts else {}),
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads or shape.num_attention_heads,
        head_dim=shape.hidden_size // shape.num_attention_heads,
        hidden_act=activation.hidden_act or "silu",
        max_position_embeddings=shape.context_length,
        tie_word_embeddings=shape.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)


def train_tokenizer(data: DataConfig, vocab_size: int) -> Any:
    """Train a byte-level BPE on training text, equal parts of every source.

    Parameters
    ----------
    data : DataConfig
        Where the text comes from; held-out documents are left out.
    vocab_size : int
        Tokens, with the one that ends a document.

    Returns
    -------
    PreTrainedTokenizerFast
        The tokenizer.

    Raises
    ------
    DataError
        If the sources hold no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 -- slow to import

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    _LOG.info("training a tokenizer of %d tokens", vocab_size)
    texts = list(_texts(data))
    if not texts:
        raise DataError("[data.sources] expected text to train a tokenizer on, got none")
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=_END, pad_token=_END)


def _texts(data: DataConfig) -> Iterator[str]:
    """Training documents, one of each source in turn."""
    split = split_of(data)
    characters = 0
    readers = [open_reader(source, data.max_corrupt_percent) for source in data.sources if source.weight]
    for documents in zip_longest(*readers):
        for document in documents:
            if isinstance(document, str) and not split.is_held_out(document):
                characters += len(document)
                yield document
        if characters > _TOKENIZER_CHARACTERS:
            return
