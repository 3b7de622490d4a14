"""From chat messages to the one text that a model was tuned on.

Model files carry a Jinja template, which is code from outside: it runs in Jinja's immutable sandbox, with the
functions and settings that Hugging Face's ``apply_chat_template`` provides, so that the text is the same.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from turbosparse.errors import ConfigError, TokenizerError
from turbosparse.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Message"]

Message = Mapping[str, Any]

_BODIES = {"content", "tool_calls"}
_CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ChatTemplate:
    """A compiled chat template.

    Parameters
    ----------
    source : str
        Jinja source, from the key ``tokenizer.chat_template``.
    bos_token : str
        Spelling of the begin of sequence token, which templates may print.
    eos_token : str
        Spelling of the end of sequence token.

    Raises
    ------
    TokenizerError
        If the source is not a valid template.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self._special = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TokenizerError(
                f"[tokenizer.chat_template] expected a Jinja template, got {error}"
            ) from error

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> "ChatTemplate":
        """Take the template of a model file, or ChatML where the file has only ChatML's tokens.

        Parameters
        ----------
        metadata : Mapping[str, Any]
            The file's keys and values.
        tokenizer : Tokenizer
            The same file's tokenizer.

        Returns
        -------
        ChatTemplate
            Ready to render.

        Raises
        ------
        TokenizerError
            If the file has no template and its vocabulary lacks ``<|im_start|>`` or ``<|im_end|>``.
        """
        source = metadata.get("tokenizer.chat_template")
        if source is None:
            if None in (tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")):
                raise TokenizerError(
                    "[tokenizer.chat_template] expected a chat template or ChatML's tokens in the file, got "
                    "neither: this model was not made for chat; give it a plain prompt"
                )
            source = _CHATML
        names = {
            name: "" if token is None else tokenizer.id_to_piece(token)
            for name, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
        }
        return cls(source, **names)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Write a conversation as the model expects it.

        Parameters
        ----------
        messages : sequence of Message
            Mappings with a ``role`` and a ``content`` (or ``tool_calls``).
        add_generation_prompt : bool
            End with the header of an answer, so that the model writes one.
        tools : sequence of mappings, optional
            JSON schemas of functions that the model may call.

        Returns
        -------
        str
            Text with control tokens spelled out: encode it with ``parse_special``, without ``add_special``.

        Raises
        ------
        ConfigError
            If the template refuses the messages, say because roles do not alternate.
        """
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message or not message.keys() & _BODIES:
                raise ConfigError(f"[messages] expected a role and a content, got {message!r} at {i}")
        try:
            return self._template.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ConfigError(
                f"[messages] expected messages that fit the chat template, got {error}"
            ) from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the answers for training; here its body is plain text."""

    tags = {"generation"}  # noqa: RUF012 -- Jinja's own interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was tuned on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
