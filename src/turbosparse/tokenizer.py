"""Text to token ids and back, from the tokenizer that a GGUF file carries in its metadata.

Two kinds exist in files of the supported architectures: byte-level BPE (``gpt2``: SmolLM2, Qwen, Llama 3) and
SentencePiece BPE with byte fallback (``llama``: Llama 2, Mistral 7B, TinyLlama). Both run in the `tokenizers`
library; what this module adds is the reading of the metadata, control tokens that are parsed only on request,
and decoding by bytes, so that a stream never shows half a character.

Ids follow llama.cpp where Hugging Face's own files say more than a GGUF holds: no Unicode normalisation, and
a SentencePiece prefix space after every control token.
"""

import codecs
import logging
import re
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from turbosparse.errors import TokenizerError

__all__ = ["PATTERNS", "StreamDecoder", "TokenType", "Tokenizer"]

logger = logging.getLogger(__name__)


class TokenType(IntEnum):
    """GGUF's ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Splitting before BPE, by the name of a family: patterns that are applied one after the other.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PATH_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

PATTERNS = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "qwen2": [rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_PUNCTUATION}|{_SPACE}"],
    "llama-bpe": [rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACE}"],
    "tekken": [rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_PATH_PUNCTUATION}|{_SPACE}"],
    "gpt-4o": [
        rf"{_CASED[0]}{_CONTRACTION}?|{_CASED[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_PATH_PUNCTUATION}|{_SPACE}"
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACE}",
    ],
}
_FAMILY = {
    **{name: name for name in PATTERNS},
    **dict.fromkeys(["mpt", "olmo", "phi-2", "jina-es", "jina-de", "trillion"], "gpt-2"),
    **dict.fromkeys(["starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"], "smollm"),
    **dict.fromkeys(["stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"], "qwen2"),
    **dict.fromkeys(
        ["llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "dbrx", "smaug-bpe", "chatglm-bpe"],
        "llama-bpe",
    ),
    "llama4": "gpt-4o",
}
# Families whose vocabulary was not built by its merges alone: a word that is a token stays whole.
_WHOLE_WORDS = {"llama-bpe", "tekken"}
_BOS_BY_DEFAULT = {"llama-bpe", "tekken"}

# Control tokens by which models end a turn, whatever the file calls end of sequence.
_END_OF_TURN = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|end_of_role|>",
        "<EOT>",
        "<|EOT|>",
        "<｜end▁of▁sentence｜>",
        "</s>",
    }
)
_UNDERLINE = "▁"  # SentencePiece's spelling of a space


def _byte_spelling() -> dict[str, int]:
    """GPT-2's printable character for each byte, reversed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class StreamDecoder:
    """Turns ids into text one at a time and holds back bytes until they complete a character.

    Parameters
    ----------
    tokenizer : Tokenizer
        Whose ids come in.
    skip_special : bool
        Leave control tokens out instead of spelling them.
    """

    def __init__(self, tokenizer: "Tokenizer", *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Take one token.

        Parameters
        ----------
        token_id : int
            The next id.

        Returns
        -------
        str
            Text that became complete with it; often empty inside Chinese or emoji.
        """
        if self._skip_special and self._tokenizer.is_control(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """End the stream.

        Returns
        -------
        str
            What is left: U+FFFD where the ids stop inside a character.
        """
        return self._decoder.decode(b"", final=True)


class Tokenizer:
    """A tokenizer with its control tokens; build it with `from_metadata`.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
        Encodes text without control tokens.
    tokens : list of str
        Spelling by id.
    types : list of int
        `TokenType` by id.
    metadata : Mapping[str, Any]
        Where begin, end and turn ids and the flags are read from.
    family : str
        ``llama`` for SentencePiece, else the splitting rule.
    """

    def __init__(
        self,
        *,
        backend: tokenizers.Tokenizer,
        tokens: list[str],
        types: list[int],
        metadata: Mapping[str, Any],
        family: str,
    ) -> None:
        self._backend = backend
        self._tokens = tokens
        self._types = types
        self._sentencepiece = family == "llama"
        self._spelling = {} if self._sentencepiece else _byte_spelling()
        self._ids = {text: i for i, text in reversed(list(enumerate(tokens)))}
        self.bos_id = _token_id(metadata, "bos", len(tokens))
        self.eos_id = _token_id(metadata, "eos", len(tokens))
        self.add_bos = self._flag(metadata, "add_bos_token", self._sentencepiece or family in _BOS_BY_DEFAULT)
        self.add_eos = self._flag(metadata, "add_eos_token", False)
        self._space_prefix = self._sentencepiece and self._flag(metadata, "add_space_prefix", True)
        self.stop_ids = self._find_stop_ids(metadata)
        user_defined = [t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.USER_DEFINED]
        control = [t for t, kind in zip(tokens, types, strict=True) if kind in _CONTROL_TYPES]
        self._split_user_defined = _splitter(user_defined)
        self._split_all = _splitter(user_defined + control)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Build the tokenizer that a model file describes.

        Parameters
        ----------
        metadata : Mapping[str, Any]
            The file's keys and values; only those beginning with ``tokenizer.ggml.`` are read.

        Returns
        -------
        Tokenizer
            Ready to encode and decode.

        Raises
        ------
        TokenizerError
            If the metadata has no tokenizer, or one of a kind, splitting rule or shape that is not known.
        """
        kind = metadata.get("tokenizer.ggml.model")
        if kind is None:
            raise TokenizerError(
                "[tokenizer] expected the key tokenizer.ggml.model in the model file, got none"
            )
        tokens = _array(metadata, "tokens", str)
        types = _array(
            metadata, "token_type", int, size=len(tokens), default=[TokenType.NORMAL] * len(tokens)
        )
        if kind == "gpt2":
            family = _pre_tokenizer_family(metadata.get("tokenizer.ggml.pre"))
            backend = _byte_level_bpe(tokens, _array(metadata, "merges", str), family)
        elif kind == "llama":
            family = "llama"
            scores = _array(metadata, "scores", float, size=len(tokens))
            backend = _sentencepiece_bpe(tokens, types, scores)
        else:
            raise TokenizerError(f"[tokenizer.ggml.model] expected 'gpt2' or 'llama', got {kind!r}")
        return cls(backend=backend, tokens=tokens, types=types, metadata=metadata, family=family)

    @property
    def vocab_size(self) -> int:
        """Count the ids.

        Returns
        -------
        int
            Unused ids included.
        """
        return len(self._tokens)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Turn text into ids.

        Parameters
        ----------
        text : str
            Any text, also empty.
        add_special : bool
            Put the begin (and end) of sequence id around it where the model file asks for that.
        parse_special : bool
            Read control tokens such as ``<|im_start|>`` where the text spells them. Otherwise they are plain
            characters, so that text from outside cannot pretend to be a turn. Tokens that the model's makers
            added as ordinary text are always found.

        Returns
        -------
        list of int
            Token ids.
        """
        ids = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        splitter = self._split_all if parse_special else self._split_user_defined
        after_special = True
        for i, part in enumerate(splitter.split(text) if splitter else [text]):
            if i % 2:  # a captured token
                ids.append(self._ids[part])
                after_special = True
            elif part:
                ids.extend(self._encode_plain(part, after_special))
                after_special = False
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Turn ids into text.

        Parameters
        ----------
        ids : iterable of int
            Token ids.
        skip_special : bool
            Leave control tokens out instead of spelling them.

        Returns
        -------
        str
            The text; bytes that are not UTF-8 become U+FFFD.
        """
        stream = StreamDecoder(self, skip_special=skip_special)
        text = "".join(map(stream.push, ids)) + stream.finish()
        return text.removeprefix(" ") if self._space_prefix else text

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """Make a decoder that takes one id after the other.

        Parameters
        ----------
        skip_special : bool
            Leave control tokens out instead of spelling them.

        Returns
        -------
        StreamDecoder
            With nothing in it.
        """
        return StreamDecoder(self, skip_special=skip_special)

    def is_control(self, token_id: int) -> bool:
        """Tell whether an id marks structure and has no text of its own.

        Parameters
        ----------
        token_id : int
            Below `vocab_size`.

        Returns
        -------
        bool
            True for control tokens and the unknown token.
        """
        return self._types[token_id] in _CONTROL_TYPES

    def token_bytes(self, token_id: int) -> bytes:
        """Spell an id in bytes.

        Parameters
        ----------
        token_id : int
            Below `vocab_size`.

        Returns
        -------
        bytes
            UTF-8, perhaps only part of a character; a control token's name.
        """
        text, kind = self._tokens[token_id], self._types[token_id]
        if kind == TokenType.BYTE:
            return bytes([int(text[3:-1], 16)])  # <0x0A>
        if kind != TokenType.NORMAL:
            return text.encode()
        if self._sentencepiece:
            return text.replace(_UNDERLINE, " ").encode()
        if all(character in self._spelling for character in text):
            return bytes(self._spelling[character] for character in text)
        return text.encode()

    def id_to_piece(self, token_id: int) -> str:
        """Spell an id so that people can read it.

        Parameters
        ----------
        token_id : int
            Below `vocab_size`.

        Returns
        -------
        str
            U+FFFD stands where the id is part of a character.
        """
        return self.token_bytes(token_id).decode(errors="replace")

    def token_to_id(self, token: str) -> int | None:
        """Find a token.

        Parameters
        ----------
        token : str
            As the vocabulary spells it.

        Returns
        -------
        int or None
            Its id, or None where the vocabulary lacks it.
        """
        return self._ids.get(token)

    def _encode_plain(self, text: str, after_special: bool) -> list[int]:
        if self._sentencepiece:
            prefix = _UNDERLINE if self._space_prefix and after_special else ""
            text = prefix + text.replace(" ", _UNDERLINE)
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _find_stop_ids(self, metadata: Mapping[str, Any]) -> frozenset[int]:
        named = (_token_id(metadata, name, len(self._tokens)) for name in ("eos", "eot", "eom"))
        stops = {i for i in named if i is not None}
        stops |= {i for text in _END_OF_TURN if (i := self._ids.get(text)) is not None and self.is_control(i)}
        return frozenset(stops)

    @staticmethod
    def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
        return bool(metadata.get(f"tokenizer.ggml.{name}", default))


_CONTROL_TYPES = (TokenType.CONTROL, TokenType.UNKNOWN)


def _token_id(metadata: Mapping[str, Any], name: str, vocab_size: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is not None and not 0 <= value < vocab_size:
        raise TokenizerError(f"[{key}] expected an id below {vocab_size}, got {value}")
    return value


def _array(
    metadata: Mapping[str, Any],
    name: str,
    kind: type,
    *,
    size: int | None = None,
    default: list[Any] | None = None,
) -> list[Any]:
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key, default)
    if not isinstance(value, list) or not value:
        raise TokenizerError(f"[{key}] expected a list of {kind.__name__}, got {type(value).__name__}")
    if not all(isinstance(item, kind) for item in value):
        raise TokenizerError(f"[{key}] expected a list of {kind.__name__}, got other items in it")
    if size is not None and len(value) != size:
        raise TokenizerError(f"[{key}] expected {size} items, as many as tokens, got {len(value)}")
    return value


def _splitter(tokens: list[str]) -> re.Pattern[str] | None:
    """Longest token first, so that ``<|im_start|>`` wins over ``<|im``."""
    ordered = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None


def _pre_tokenizer_family(name: str | None) -> str:
    if name is None or name == "default":
        logger.warning("the model file does not say how text is split before BPE; splitting as GPT-2 does")
        return "gpt-2"
    if name not in _FAMILY:
        raise TokenizerError(
            f"[tokenizer.ggml.pre] expected one of {', '.join(sorted(_FAMILY))}, got {name!r}"
        )
    return _FAMILY[name]


def _byte_level_bpe(tokens: list[str], merges: list[str], family: str) -> tokenizers.Tokenizer:
    pairs = [merge.partition(" ")[::2] for merge in merges]
    vocab = {text: i for i, text in reversed(list(enumerate(tokens)))}
    backend = _backend(vocab=vocab, merges=pairs, ignore_merges=family in _WHOLE_WORDS)
    splits = [pre_tokenizers.Split(tokenizers.Regex(p), behavior="isolated") for p in PATTERNS[family]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    return backend


def _sentencepiece_bpe(tokens: list[str], types: list[int], scores: list[float]) -> tokenizers.Tokenizer:
    """SentencePiece's "join the neighbours whose union scores best" as an ordered list of merges."""
    vocab = {text: i for i, text in reversed(list(enumerate(tokens)))}
    plain = (TokenType.NORMAL, TokenType.UNUSED)
    mergeable = {text for text, kind in zip(tokens, types, strict=True) if kind in plain}
    ranked = []
    for text in mergeable:
        order = -scores[vocab[text]], vocab[text]
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((order, cut, left, right))
    ranked.sort()
    pairs = [(left, right) for *_, left, right in ranked]
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), None)
    return _backend(vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def _backend(**options: Any) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(**options))
    except Exception as error:  # what the library raises for merges outside the vocabulary
        raise TokenizerError(
            f"[tokenizer.ggml.merges] expected merges of tokens in the vocabulary, got {error}"
        ) from error
