"""Tokenizers of Hugging Face directories: the model file gives the same ids, or the export is refused."""

import functools
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from turbosparse.errors import TokenizerError
from turbosparse.export.hf_config import HFConfig
from turbosparse.export.tokenizer_metadata import PROBE, tokenizer_metadata
from turbosparse.runtime.model_file import plain_value
from turbosparse.runtime.texts import CALIBRATION, HELD_OUT, read_text
from turbosparse.tokenizer import PATTERNS, Tokenizer, TokenType

GOLDEN = Path(__file__).parents[1] / "tokenizer_golden"
VOCABULARY = 700
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}
Edit = Callable[[dict[str, Any]], Any]


def byte_level(splits: Any, normalizer: Any = None) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splits
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 20, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([PROBE * 4, read_text(CALIBRATION)[:8_000]], trainer)
    return tokenizer


@functools.cache
def trained_gpt2() -> str:
    return str(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)).to_str())


def gpt2() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(trained_gpt2())


def split_by(patterns: list[str]) -> Any:
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def sentencepiece() -> tokenizers.Tokenizer:
    """The golden SentencePiece model as transformers converts it: merges in the order of scores."""
    stored = json.loads((GOLDEN / "sentencepiece.json").read_text(encoding="utf-8"))
    vocabulary = {token: number for number, token in enumerate(stored["tokens"])}
    scores = dict(zip(stored["tokens"], stored["scores"], strict=True))
    normal = {t for t, kind in zip(stored["tokens"], stored["token_type"], strict=True) if kind == 1}
    merges = sorted(
        ((token[:cut], token[cut:]) for token in normal for cut in range(1, len(token))),
        key=lambda pair: (-scores[pair[0] + pair[1]], len(pair[0])),
    )
    merges = [pair for pair in merges if normal.issuperset(pair)]
    backend = models.BPE(
        vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"
    )
    tokenizer = tokenizers.Tokenizer(backend)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def write(
    directory: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """Save the tokenizer and return the keys that it becomes."""
    tokenizer.save(str(directory / "tokenizer.json"))
    sizes = CONFIG | {"vocab_size": max(VOCABULARY, tokenizer.get_vocab_size())} | (config or {})
    (directory / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    metadata = tokenizer_metadata(directory, HFConfig(directory))
    return {key: plain_value(value) for key, value in metadata.items()}


def assert_same_ids(metadata: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> None:
    ours = Tokenizer.from_metadata(metadata)
    for text in (PROBE, read_text(HELD_OUT)[:30_000], "", " ", "\n\n a", "é\u0301\u0301x", "\u200d" * 3):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special=False) == expected, text[:40]


@pytest.mark.parametrize("name", PATTERNS)
def test_every_splitting_rule(name: str, tmp_path: Path) -> None:
    tokenizer = byte_level(split_by(PATTERNS[name]))
    metadata = write(tmp_path, tokenizer)
    assert metadata["tokenizer.ggml.pre"] == name
    assert_same_ids(metadata, tokenizer)


def test_digits_as_smollm_writes_them(tmp_path: Path) -> None:
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer = byte_level(pre_tokenizers.Sequence(steps))
    metadata = write(tmp_path, tokenizer)
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert_same_ids(metadata, tokenizer)


def test_normalisation_is_said_to_be_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level(split_by(PATTERNS["qwen2"]), normalizers.NFC())
    with caplog.at_level(logging.WARNING):
        metadata = write(tmp_path, tokenizer)
    assert "no Unicode normalisation (NFC)" in caplog.text
    ours = Tokenizer.from_metadata(metadata)
    text = read_text(HELD_OUT)[:30_000]
    assert ours.encode(text) == tokenizer.encode(text).ids


def test_tokens_that_strip_are_said_to_be_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level(split_by(PATTERNS["qwen2"]))
    tokenizer.add_special_tokens([tokenizers.AddedToken("<|user|>", rstrip=True), "<|end|>"])
    with caplog.at_level(logging.WARNING):
        write(tmp_path, tokenizer)
    assert "white space beside '<|user|>' gets other ids" in caplog.text


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece(prefix: bool, legacy: bool, tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    if legacy:
        steps = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    else:
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    metadata = write(tmp_path, tokenizer, bos_token="<s>", eos_token={"content": "</s>"}, add_bos_token=True)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] == prefix
    assert metadata["tokenizer.ggml.token_type"][:4] == [
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.CONTROL,
        TokenType.BYTE,
    ]
    ours = Tokenizer.from_metadata(metadata)
    assert ours.encode("the") == [1, *tokenizer.encode("the", add_special_tokens=False).ids]
    for case in json.loads((GOLDEN / "sentencepiece.json").read_text(encoding="utf-8"))["cases"]:
        text = case["text"]
        if text and not re.search("^ |▁|</?s>", text):
            got = ours.encode(text, add_special=False)
            assert got == tokenizer.encode(text, add_special_tokens=False).ids
            assert not prefix or got == case["ids"]


def test_special_tokens(tmp_path: Path) -> None:
    tokenizer = gpt2()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens(["<|extra|>"])
    metadata = write(
        tmp_path,
        tokenizer,
        {"eos_token_id": [2, 0], "bos_token_id": 1, "vocab_size": 720},
        eos_token="<|im_end|>",
        pad_token={"content": "<|end|>"},
        unk_token=None,
    )
    marks = {key.rpartition(".")[2]: value for key, value in metadata.items() if key.endswith("_token_id")}
    assert marks == {"bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 0, "eot_token_id": 0}
    assert len(metadata["tokenizer.ggml.tokens"]) == 720
    ours = Tokenizer.from_metadata(metadata)
    types = metadata["tokenizer.ggml.token_type"]
    kinds = {
        "<tool>": TokenType.USER_DEFINED,
        "<|extra|>": TokenType.CONTROL,
        "<|im_start|>": TokenType.CONTROL,
    }
    for token, kind in kinds.items():
        assert types[tokenizer.token_to_id(token)] == kind
    assert types[719] == TokenType.UNUSED
    text = "a <tool> b<|im_start|>c <|extra|>d"
    assert ours.encode(text, parse_special=True) == tokenizer.encode(text).ids
    assert {0, 2} <= ours.stop_ids


def test_beginning_of_sequence(tmp_path: Path) -> None:
    tokenizer = gpt2()
    assert not write(tmp_path, tokenizer, bos_token="<|end|>")["tokenizer.ggml.add_bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", pair="<|end|> $A $B", special_tokens=[("<|end|>", 0)]
    )
    metadata = write(tmp_path, tokenizer, bos_token="<|end|>")
    assert metadata["tokenizer.ggml.add_bos_token"]
    assert not metadata["tokenizer.ggml.add_eos_token"]
    assert Tokenizer.from_metadata(metadata).encode("hello") == tokenizer.encode("hello").ids
    stated = write(tmp_path, tokenizer, bos_token="<|end|>", add_bos_token=False)
    assert not stated["tokenizer.ggml.add_bos_token"]


def test_chat_templates(tmp_path: Path) -> None:
    tokenizer = gpt2()
    assert "tokenizer.chat_template" not in write(tmp_path, tokenizer)
    assert write(tmp_path, tokenizer, chat_template="{{ a }}")["tokenizer.chat_template"] == "{{ a }}"
    named = [{"name": "default", "template": "{{ b }}"}, {"name": "tool_use", "template": "{{ c }}"}]
    keys = write(tmp_path, tokenizer, chat_template=named)
    assert keys["tokenizer.chat_template"] == "{{ b }}"
    assert keys["tokenizer.chat_template.tool_use"] == "{{ c }}"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]
    (tmp_path / "chat_template.jinja").write_text("{{ d }}", encoding="utf-8")
    assert write(tmp_path, tokenizer, chat_template="{{ a }}")["tokenizer.chat_template"] == "{{ d }}"


def test_the_likeliest_end_of_turn_of_a_chat_model(tmp_path: Path) -> None:
    generation = {"eos_token_id": [0, 2]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    assert write(tmp_path, gpt2(), eos_token="<|end|>")["tokenizer.ggml.eot_token_id"] == 2


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda c: c["model"].update(type="Unigram", vocab=[["a", 0.0]], unk_id=0),
            "expected a BPE tokenizer",
        ),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "expected Split, Digits and ByteLevel"),
        (lambda c: c.update(pre_tokenizer=None), "expected the splitting of one of gpt-2"),
        (lambda c: c["model"]["merges"].append(["never", "seen"]), "expected a tokenizer, got: "),
        (lambda c: c["model"].update(vocab={}), "expected a tokenizer, got: "),
        (lambda c: c["added_tokens"][0].update(id=900), "expected ids below 700 (vocab_size), got 900"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "expected the same ids from the model file's"),
        (lambda c: c.pop("model"), "expected a tokenizer, got: "),
    ],
    ids=["unigram", "prefix", "nothing", "merges", "vocabulary", "ids", "lowercase", "empty"],
)
def test_what_a_model_file_cannot_hold(edit: Edit, message: str, tmp_path: Path) -> None:
    write(tmp_path, gpt2())
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(TokenizerError) as caught:
        tokenizer_metadata(tmp_path, HFConfig(tmp_path))
    assert message in str(caught.value)
