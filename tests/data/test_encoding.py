"""Text and chats to tokens."""

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from tests.tiny_hf import make_tokenizer
from turbosparse.data.encoding import IGNORED_LABEL, make_encoder
from turbosparse.data.mixture import DocumentError
from turbosparse.errors import DataError

CHAT = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def test_text_ends_with_the_end_token(tokenizer: Any) -> None:
    ids, labels = make_encoder(tokenizer)("abc")
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "abc"
    assert labels == ids


@pytest.mark.parametrize("document", ["abc", [65, 66, 67], [1, 65, 66, 67]])
def test_text_begins_as_the_tokenizer_begins_it(document: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "!"
    begin = tokenizer.bos_token_id
    assert begin == 1
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", begin)])
    ids, labels = make_encoder(tokenizer)(document)
    assert ids == [begin, *make_encoder(make_tokenizer())("abc")[0]]
    given = isinstance(document, list) and document[0] == begin
    assert labels == (ids if given else [IGNORED_LABEL, *ids[1:]])
    chat = make_encoder(tokenizer)(CHAT)[0]
    assert tokenizer.decode(chat) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_only_answers_are_learnt(tokenizer: Any) -> None:
    ids, labels = make_encoder(tokenizer, answers_only=True)(CHAT)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    learnt = [label for label in labels if label != IGNORED_LABEL]
    assert tokenizer.decode(learnt) == "4\nyes\n"
    assert all(label in (IGNORED_LABEL, token) for token, label in zip(ids, labels, strict=True))


def test_all_of_a_chat_is_learnt_by_default(tokenizer: Any) -> None:
    ids, labels = make_encoder(tokenizer)(CHAT)
    assert labels == ids


def test_unknown_end_token_and_missing_template(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"expected a token of the model's vocabulary, got '<none>'"):
        make_encoder(tokenizer, "<none>")
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match="expected a tokenizer with a chat template"):
        make_encoder(bare)(CHAT)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template takes, got: roles must alternate"),
        ("{{ messages[0]['name'] + ':' }}", "chat template takes, got: .* has no attribute 'name'"),
        ("{{ messages[-1]['content'] }}", "expected a chat template that only appends"),
    ],
)
def test_a_chat_that_the_template_refuses(template: str, reason: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DocumentError, match=rf"\[chat\] .*{reason}"):
        make_encoder(tokenizer)(CHAT)


def test_token_ids_made_beforehand(tokenizer: Any) -> None:
    ids, labels = make_encoder(tokenizer)([5, 6, 7])
    assert ids == labels == [5, 6, 7, tokenizer.eos_token_id]


def test_token_ids_of_another_vocabulary(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"\[token ids\] expected .* 0 to 256, got 999"):
        make_encoder(tokenizer)([5, 999])
