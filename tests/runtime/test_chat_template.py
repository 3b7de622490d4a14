"""Chat templates give transformers' text, stay in their sandbox and fail in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_tokenizer import byte_level_metadata
from turbosparse.errors import ConfigError, TokenizerError
from turbosparse.runtime.chat_template import ChatTemplate
from turbosparse.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "tokenizer_golden"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5-coder"])
def test_same_text_as_transformers(name: str) -> None:
    stored = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    template = ChatTemplate(stored["chat_template"])
    assert len(stored["chats"]) >= 4
    for chat in stored["chats"]:
        text = template.render(
            chat["messages"], add_generation_prompt=chat["add_generation_prompt"], tools=chat["tools"]
        )
        assert text == chat["text"]


def test_the_files_own_template_and_its_special_tokens() -> None:
    metadata = byte_level_metadata()
    tokenizer = Tokenizer.from_metadata(metadata)
    metadata["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content | trim }}{{ eos_token }}"
    template = ChatTemplate.from_metadata(metadata, tokenizer)
    assert template.render([{"role": "user", "content": " a "}]) == "<|endoftext|>a<|im_end|>"


def test_chatml_where_the_file_has_only_its_tokens() -> None:
    metadata = byte_level_metadata()
    template = ChatTemplate.from_metadata(metadata, Tokenizer.from_metadata(metadata))
    assert template.render(HELLO) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(HELLO, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"
    tokens = [t.replace("im_start", "other") for t in metadata["tokenizer.ggml.tokens"]]
    without = Tokenizer.from_metadata(byte_level_metadata(tokens=tokens))
    with pytest.raises(TokenizerError, match="was not made for chat"):
        ChatTemplate.from_metadata({}, without)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}end", "end"),
        ("  {% if true %}\na\n  {% endif %}\nb", "a\nb"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ strftime_now('%%') }}", "%"),
        ("{% generation %}answer{% endgeneration %}", "answer"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
    ],
)
def test_what_hugging_face_templates_may_use(source: str, text: str) -> None:
    assert ChatTemplate(source).render(HELLO) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_template_that_refuses_or_breaks_out(source: str) -> None:
    with pytest.raises(ConfigError, match=r"\[messages\] expected messages that fit the chat template"):
        ChatTemplate(source).render(HELLO)


def test_a_broken_template() -> None:
    with pytest.raises(TokenizerError, match="expected a Jinja template"):
        ChatTemplate("{% for %}")


@pytest.mark.parametrize("messages", [[{"role": "user"}], ["hello"]])
def test_broken_messages(messages: list[Any]) -> None:
    with pytest.raises(ConfigError, match="expected a role and a content"):
        ChatTemplate("{{ messages }}").render(messages)
