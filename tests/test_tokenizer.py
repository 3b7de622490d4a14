"""Tokenizers from GGUF metadata against the tokenizers library, SentencePiece and transformers."""

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from tests.real_models import SMOLLM2, real_model
from tests.tiny_model import MERGES, SPECIAL_TOKENS, tiny_tokens
from turbosparse.errors import TokenizerError
from turbosparse.tokenizer import Tokenizer, TokenType

GOLDEN = Path(__file__).parent / "tokenizer_golden"
PAGE = json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))["text"]


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    tokens = tiny_tokens()
    control, normal = TokenType.CONTROL, TokenType.NORMAL
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [control if t in SPECIAL_TOKENS else normal for t in tokens],
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in MERGES],
        "tokenizer.ggml.bos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
    }
    changed = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in changed.items() if value is not None}


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    stored = json.loads((GOLDEN / "sentencepiece.json").read_text(encoding="utf-8"))
    metadata = {f"tokenizer.ggml.{key}": stored[key] for key in ("tokens", "scores", "token_type")}
    metadata |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


@pytest.mark.parametrize(
    ("pre", "splits"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (
            "smollm",
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
        ),
    ],
)
def test_same_ids_as_the_tokenizers_library(pre: str, splits: Any) -> None:
    reference = tokenizers.Tokenizer(models.BPE())
    reference.pre_tokenizer = splits
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    reference.train_from_iterator([PAGE] * 3, trainer)
    trained = json.loads(reference.to_str())["model"]
    tokens = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    merges = [" ".join(merge) for merge in trained["merges"]]
    ours = Tokenizer.from_metadata(
        byte_level_metadata(pre=pre, tokens=tokens, merges=merges, token_type=None)
    )
    assert ours.encode(PAGE) == reference.encode(PAGE).ids
    assert ours.decode(ours.encode(PAGE)) == PAGE


@pytest.mark.parametrize(
    "pre", ["qwen2", "llama-bpe", "tekken", "gpt-4o", "deepseek-coder", "deepseek-v3", "llama4"]
)
def test_every_splitting_rule_loses_nothing(pre: str) -> None:
    tokenizer = Tokenizer.from_metadata(byte_level_metadata(pre=pre))
    assert tokenizer.decode(tokenizer.encode(PAGE, add_special=False)) == PAGE


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("qwen2", "IT'S 123", ["IT", "'S", "Ġ", "1", "2", "3"]),
        ("llama-bpe", "it's 12345", ["it", "'s", "Ġ", "123", "45"]),
        ("tekken", "camelCase/\n", ["camel", "Case", "/Ċ"]),
        ("gpt-4o", "They'Re 1234", ["They'Re", "Ġ", "123", "4"]),
        ("smollm", "a\n\n9 10", ["a", "ĊĊ", "9", "Ġ", "1", "0"]),
    ],
)
def test_where_words_end(pre: str, text: str, words: list[str]) -> None:
    # A vocabulary that merges everything it is allowed to: one token per word that splitting yields.
    merges, tokens = [], tiny_tokens()[:256]
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
                tokens.append(word[:end])
    changes = {"tokens": tokens, "merges": merges, "token_type": None, "eos_token_id": 0, "bos_token_id": 0}
    tokenizer = Tokenizer.from_metadata(byte_level_metadata(pre=pre, add_bos_token=False, **changes))
    assert [tokens[i] for i in tokenizer.encode(text)] == words


@pytest.mark.parametrize("name", ["sentencepiece"])
def test_same_ids_as_sentencepiece(name: str) -> None:
    tokenizer = Tokenizer.from_metadata(sentencepiece_metadata())
    for case in json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["cases"]:
        assert tokenizer.encode(case["text"], add_special=False) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"].replace("▁", " ")


def test_sentencepiece_spaces() -> None:
    tokenizer = Tokenizer.from_metadata(sentencepiece_metadata())
    bare = Tokenizer.from_metadata(sentencepiece_metadata(add_space_prefix=False))
    assert tokenizer.encode("the") == [1, *bare.encode(" the", add_special=False)]
    assert bare.decode(bare.encode(" the")) == " the"
    # A prefix space also after a control token, as llama.cpp has it.
    ids = tokenizer.encode("the</s>the", parse_special=True)
    assert ids == [*tokenizer.encode("the"), 2, *tokenizer.encode("the", add_special=False)]
    assert tokenizer.add_bos
    assert not tokenizer.add_eos


def test_control_tokens_only_on_request() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level_metadata())
    text = "the <|im_start|>and<|im_end|>"
    start, end = (tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
    parsed = tokenizer.encode(text, parse_special=True)
    assert start in parsed
    assert parsed[-1] == end
    assert not {start, end} & set(tokenizer.encode(text))
    assert tokenizer.decode(parsed) == "the and"
    assert tokenizer.decode(parsed, skip_special=False) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_that_users_added_are_always_found() -> None:
    tokens = [*tiny_tokens(), "<tool_call>", "<tool"]
    types = [TokenType.NORMAL] * (len(tokens) - 2) + [TokenType.USER_DEFINED] * 2
    tokenizer = Tokenizer.from_metadata(byte_level_metadata(tokens=tokens, token_type=types))
    assert tokenizer.encode("<tool_call><tool") == [len(tokens) - 2, len(tokens) - 1]
    assert tokenizer.decode([len(tokens) - 2]) == "<tool_call>"


def test_begin_and_end_of_sequence() -> None:
    metadata = byte_level_metadata(add_bos_token=True, add_eos_token=True)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("") == [tokenizer.bos_id, tokenizer.eos_id]
    assert tokenizer.encode("", add_special=False) == []
    assert tokenizer.stop_ids == {tokenizer.eos_id, tokenizer.token_to_id("<|endoftext|>")}
    assert Tokenizer.from_metadata(byte_level_metadata(pre="llama-bpe")).add_bos
    assert not Tokenizer.from_metadata(byte_level_metadata()).add_bos
    with_eot = Tokenizer.from_metadata(byte_level_metadata(eot_token_id=5))
    assert 5 in with_eot.stop_ids


@given(st.text())
def test_a_stream_ends_in_the_same_text(text: str) -> None:
    tokenizer = Tokenizer.from_metadata(byte_level_metadata())
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == text == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_a_stream_holds_back_half_a_character() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level_metadata())
    ids = tokenizer.encode("é🎉")
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["", "é", "", "", "", "🎉"]
    assert stream.finish() == ""
    stream.push(ids[0])
    assert stream.finish() == "\ufffd"
    assert tokenizer.id_to_piece(ids[0]) == "\ufffd"
    assert tokenizer.id_to_piece(tokenizer.encode("the")[0]) == "the"
    assert tokenizer.vocab_size == len(tiny_tokens())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "expected the key tokenizer.ggml.model in the model file, got none"),
        ({"model": "t5"}, "expected 'gpt2' or 'llama', got 't5'"),
        ({"pre": "unheard-of"}, "got 'unheard-of'"),
        ({"tokens": None}, r"\[tokenizer.ggml.tokens\] expected a list of str"),
        ({"tokens": [1, 2]}, "expected a list of str, got other items"),
        ({"merges": ["no where"]}, "expected merges of tokens in the vocabulary"),
        ({"merges": ["alone"]}, "expected merges of tokens in the vocabulary"),
        ({"token_type": [1]}, "items, as many as tokens, got 1"),
        ({"eos_token_id": 10**6}, r"\[tokenizer.ggml.eos_token_id\] expected an id below"),
    ],
)
def test_broken_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata(byte_level_metadata(**changes))


def test_an_unnamed_splitting_rule_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = Tokenizer.from_metadata(byte_level_metadata(pre=None))
    assert "splitting as GPT-2 does" in caplog.text
    assert tokenizer.encode("the and") == Tokenizer.from_metadata(byte_level_metadata()).encode("the and")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("golden", "file"),
    [("smollm2", SMOLLM2), ("qwen2.5-coder", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf")],
)
def test_same_ids_as_transformers(golden: str, file: str) -> None:
    """The ids are those of transformers 5.23 (SmolLM2 with the digit splitting of its own repository)."""
    reader = gguf.GGUFReader(real_model(file))
    tokenizer = Tokenizer.from_metadata({name: entry.contents() for name, entry in reader.fields.items()})
    stored = json.loads((GOLDEN / f"{golden}.json").read_text(encoding="utf-8"))
    assert tokenizer.encode(stored["text"], parse_special=True) == stored["ids"]
    assert tokenizer.decode(stored["ids"], skip_special=False) == stored["text"]
