"""From a ``tokenizer.json`` to the tokenizer keys of a model file, checked to give the same ids.

Two kinds can be written: byte-level BPE, whose splitting rule has to be one that readers of model files know
by name, and SentencePiece BPE with byte fallback, whose scores follow from the order of its merges. What a
model file cannot hold (Unicode normalisation, for one) is logged or refused.
"""

import logging
import unicodedata
from pathlib import Path
from typing import Any

import tokenizers

from turbosparse.errors import TokenizerError
from turbosparse.export.hf_config import HFConfig
from turbosparse.export.weight_files import read_json
from turbosparse.runtime.model_file import StoredValue
from turbosparse.tokenizer import PATTERNS, Tokenizer, TokenType

__all__ = ["PROBE", "tokenizer_metadata"]

logger = logging.getLogger(__name__)

# What both tokenizers have to cut alike: cases, contractions, digits, spaces, scripts, emoji, code.
PROBE = (
    "Hello, World! I'm sure THEY'LL say we've 3.14159 or 1234567890 reasons;  two   spaces\tand tabs.\n\n\n"
    "def f(x):\n    return x**2  # über ½ naïve façade\r\n Ελληνικά русский язык עברית العربية हिन्दी ไทย\n"
    "日本語テキスト、中文文本。한국어 🙂👩‍👩‍👧🇩🇪 ² ③ Ⅷ é ﬁ … —“quoted”— camelCaseWord snake_case_word "
    "http://example.org/a?b=c&d=%20 \u00a0 \u3000 \u200b <tag/> [x] {y} $5.00 100% #1 @me C:\\dir\n \n"
    " end "
)
_MARKS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # Hugging Face's names, GGUF's
_UNDERLINE = "▁"


def tokenizer_metadata(directory: Path, config: HFConfig) -> dict[str, Any]:
    """Describe the tokenizer of a Hugging Face directory.

    Parameters
    ----------
    directory : Path
        With ``tokenizer.json`` and, where there are, ``tokenizer_config.json``, ``generation_config.json``
        and ``chat_template.jinja``.
    config : HFConfig
        Its configuration: the size of the vocabulary, and ids of special tokens that stand nowhere else.

    Returns
    -------
    dict
        ``tokenizer.*`` keys.

    Raises
    ------
    TokenizerError
        When ``tokenizer.json`` is missing, of an unknown kind, or would give other ids when read back.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        hint = "; transformers makes one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        raise TokenizerError(f"[{path}] expected a tokenizer, got no such file{hint}")
    content = read_json(path)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        metadata = _vocabulary(path, content, config.vocab_size)
    except TokenizerError:
        raise
    except Exception as error:  # noqa: BLE001 -- the library raises nothing narrower for a broken file
        raise TokenizerError(f"[{path}] expected a tokenizer, got: {error}") from None
    settings = _optional_json(directory / "tokenizer_config.json")
    metadata |= _special_ids(directory, settings, config, backend)
    metadata |= _beginning_and_end(settings, backend, metadata)
    metadata |= _chat_templates(directory, settings)
    _check(path, content, backend, metadata)
    types = "tokenizer.ggml.token_type"
    return metadata | {types: StoredValue("int32[]", metadata[types])}  # llama.cpp reads no other kind


def _vocabulary(path: Path, content: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise TokenizerError(f"[{path}] expected a BPE tokenizer, got {model.get('type')!r}")
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]  # embeddings that no token has
    types = [TokenType.UNUSED] * vocab_size
    byte_fallback = bool(model.get("byte_fallback"))
    added = {entry["id"]: entry for entry in content.get("added_tokens", [])}
    for text, number in (model["vocab"] | {entry["content"]: n for n, entry in added.items()}).items():
        if not 0 <= number < vocab_size:
            raise TokenizerError(f"[{path}] expected ids below {vocab_size} (vocab_size), got {number}")
        tokens[number] = text
        types[number] = _type(text, added.get(number), model, byte_fallback)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    common = {"tokens": tokens, "token_type": [int(kind) for kind in types]}
    if byte_fallback:
        kind = {"model": "llama", **common, "scores": _scores(tokens, merges)}
        kind["add_space_prefix"] = _prefixes_space(content)
    else:
        kind = {"model": "gpt2", "pre": _splitting_rule(path, content), **common, "merges": merges}
    return {f"tokenizer.ggml.{name}": value for name, value in kind.items()}


def _type(text: str, added: dict[str, Any] | None, model: dict[str, Any], byte_fallback: bool) -> TokenType:
    if byte_fallback and text == model.get("unk_token"):
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
    is_byte = byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece joins what scores best, BPE what merges first: a token's score is minus its first merge's
    place. A token that no merge makes is never joined, whatever its score.
    """
    first: dict[str, int] = {}
    for place, merge in enumerate(merges):
        first.setdefault(merge.replace(" ", "", 1), place)
    return [-float(first.get(token, len(merges))) for token in tokens]


def _prefixes_space(content: dict[str, Any]) -> bool:
    """Whether text begins with a space that it did not have."""
    parts = [*_parts(content.get("normalizer"), "normalizers"), *_splitters(content)]
    return any(
        part.get("type") == "Prepend"
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )


def _splitting_rule(path: Path, content: dict[str, Any]) -> str:
    patterns = []
    for part in _splitters(content):
        match part:
            case {
                "type": "Split",
                "pattern": {"Regex": str(pattern)},
                "behavior": "Isolated",
                "invert": False,
            }:
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False}:
                patterns += PATTERNS["gpt-2"] if part.get("use_regex", True) else []
            case _:
                raise TokenizerError(
                    f"[{path}: pre_tokenizer] expected Split, Digits and ByteLevel, got {str(part)[:80]}"
                )
    for name, known in PATTERNS.items():
        if patterns == known:
            return name
    expected = f"the splitting of one of {', '.join(PATTERNS)}"
    raise TokenizerError(f"[{path}: pre_tokenizer] expected {expected}, got {str(patterns)[:200]}")


def _splitters(content: dict[str, Any]) -> list[dict[str, Any]]:
    return _parts(content.get("pre_tokenizer"), "pretokenizers")


def _parts(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the one step."""
    if step is None:
        return []
    return list(step[name]) if step.get("type") == "Sequence" else [step]


def _special_ids(
    directory: Path, settings: dict[str, Any], config: HFConfig, backend: tokenizers.Tokenizer
) -> dict[str, int]:
    ids = {}
    for theirs, ours in _MARKS.items():
        token = settings.get(f"{theirs}_token")
        text = token.get("content") if isinstance(token, dict) else token
        number = backend.token_to_id(text) if isinstance(text, str) else None
        known = config.token_ids(theirs)
        if number is None and known:
            number = known[0]
        if number is not None:
            ids[f"tokenizer.ggml.{ours}_token_id"] = number
    generation = _optional_json(directory / "generation_config.json").get("eos_token_id")
    stops = [*(generation if isinstance(generation, list) else [generation]), *config.token_ids("eos")]
    eos = ids.get("tokenizer.ggml.eos_token_id")
    others = [item for item in stops if type(item) is int and 0 <= item < config.vocab_size and item != eos]
    if others:
        ids["tokenizer.ggml.eot_token_id"] = others[0]
    return ids


def _beginning_and_end(
    settings: dict[str, Any], backend: tokenizers.Tokenizer, metadata: dict[str, Any]
) -> dict[str, bool]:
    """Whether ids begin with the first and end with the last of a sequence, as Hugging Face's do."""
    ids = backend.encode("a").ids
    found = {}
    for name, got in (("bos", ids[:1]), ("eos", ids[-1:])):
        known = metadata.get(f"tokenizer.ggml.{name}_token_id")
        stated = settings.get(f"add_{name}_token")
        found[f"tokenizer.ggml.add_{name}_token"] = (
            bool(stated) if isinstance(stated, bool) else known is not None and got == [known]
        )
    return found


def _chat_templates(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    path = directory / "chat_template.jinja"
    stated = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    if isinstance(stated, str):
        return {"tokenizer.chat_template": stated}
    named = {item["name"]: item["template"] for item in stated or [] if {"name", "template"} <= item.keys()}
    keys: dict[str, Any] = {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    if "default" in named:
        keys["tokenizer.chat_template"] = keys.pop("tokenizer.chat_template.default")
    others = [name for name in named if name != "default"]
    return {**keys, "tokenizer.chat_templates": others} if others else keys


def _check(
    path: Path, content: dict[str, Any], backend: tokenizers.Tokenizer, metadata: dict[str, Any]
) -> None:
    """Read the keys back and compare ids, so that no text is cut in another way than in training."""
    ours = Tokenizer.from_metadata(metadata)
    forms = [part.get("type") for part in _parts(content.get("normalizer"), "normalizers")]
    text = unicodedata.normalize("NFC", PROBE)
    for line in (text, *text.splitlines(keepends=True)):
        if metadata["tokenizer.ggml.model"] == "llama":
            line = line.lstrip(" ")  # noqa: PLW2901 -- Metaspace adds no second space there, SentencePiece does
        got = ours.encode(line, add_special=False)
        expected = backend.encode(line, add_special_tokens=False).ids
        if got != expected:
            place = next((n for n, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), 0)
            raise TokenizerError(
                f"[{path}] expected the same ids from the model file's tokenizer, got others from token "
                f"{place} of {line[:40]!r}"
            )
    for form in forms:
        if form not in ("Prepend", "Replace"):
            logger.warning(
                "model files hold no Unicode normalisation (%s): text that is not normalised gets other ids",
                form,
            )
    added = content.get("added_tokens", [])
    stripping = [token["content"] for token in added if token.get("lstrip") or token.get("rstrip")]
    if stripping:
        logger.warning(
            "model files hold no rule by which a token swallows the white space beside it: text with white "
            "space beside %s gets other ids than in training",
            ", ".join(map(repr, stripping)),
        )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
