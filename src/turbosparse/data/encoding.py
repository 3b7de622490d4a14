"""From documents to tokens: plain text, and chats whose answers alone are learnt."""

from typing import Any

from jinja2 import TemplateError

from turbosparse.data.mixture import DocumentError, Encoder
from turbosparse.data.readers import Document
from turbosparse.errors import DataError

__all__ = ["IGNORED_LABEL", "make_encoder"]

IGNORED_LABEL = -100


def make_encoder(tokenizer: Any, document_end: str = "", *, answers_only: bool = False) -> Encoder:
    """Make the function that turns documents into tokens and labels.

    A document begins with the beginning-of-sequence token where the tokenizer puts it before a text by
    itself, as those of Llama and Mistral do; it is not learnt. What a chat begins with is up to the template.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        A Hugging Face tokenizer.
    document_end : str, default ""
        Token put behind each document; the tokenizer's end-of-sequence token if empty.
    answers_only : bool, default False
        In chats, learn nothing but the assistant's messages.

    Returns
    -------
    Encoder
        The function.

    Raises
    ------
    DataError
        If the token is unknown; from the function, if token ids made beforehand are not of the vocabulary, or
        the tokenizer has no chat template.
    DocumentError
        From the function, if the chat template refuses a chat.
    """
    end = tokenizer.convert_tokens_to_ids(document_end) if document_end else tokenizer.eos_token_id
    if end is None or (
        document_end and end == tokenizer.unk_token_id and document_end != tokenizer.unk_token
    ):
        raise DataError(
            f"[data.document_end] expected a token of the model's vocabulary, got {document_end!r}"
        )

    vocabulary = len(tokenizer)
    begin = tokenizer("a")["input_ids"][:1]
    if begin != [tokenizer.bos_token_id]:
        begin = []

    def _whole(ids: list[int]) -> tuple[list[int], list[int]]:
        before = [] if ids[: len(begin)] == begin else begin
        return [*before, *ids, end], [*[IGNORED_LABEL] * len(before), *ids, end]

    def _encode(document: Document) -> tuple[list[int], list[int]]:
        if isinstance(document, str):
            return _whole(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        messages = [part for part in document if isinstance(part, dict)]
        if messages:
            return _encode_chat(tokenizer, messages, answers_only=answers_only)
        ids = [part for part in document if isinstance(part, int)]
        if max(ids) >= vocabulary:  # not one bad record: all of them are another tokenizer's
            raise DataError(
                f"[token ids] expected ids of the model's vocabulary, 0 to {vocabulary - 1}, got {max(ids)}"
            )
        return _whole(ids)

    return _encode


def _encode_chat(
    tokenizer: Any, messages: list[dict[str, str]], *, answers_only: bool
) -> tuple[list[int], list[int]]:
    """Render a chat by the tokenizer's template; an answer is what it adds to the text before it."""
    if tokenizer.chat_template is None:
        raise DataError("[chat] expected a tokenizer with a chat template, got one without")

    def render(count: int, *, prompt: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
            )
        except TemplateError as error:
            raise DocumentError(
                f"[chat] expected one that the tokenizer's chat template takes, got: {error}"
            ) from error

    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for index, message in enumerate(messages):
        is_answer = message.get("role") == "assistant"
        if is_answer:
            head = render(index, prompt=True) if index else ""
            _append(tokenizer, head[len(done) :], ids, labels, learn=not answers_only)
            done = head
        text = render(index + 1, prompt=False)
        if not text.startswith(done):
            raise DocumentError(
                "[chat] expected a chat template that only appends, got one that rewrites earlier turns"
            )
        _append(tokenizer, text[len(done) :], ids, labels, learn=is_answer or not answers_only)
        done = text
    return ids, labels


def _append(tokenizer: Any, text: str, ids: list[int], labels: list[int], *, learn: bool) -> None:
    piece = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    ids += piece
    labels += piece if learn else [IGNORED_LABEL] * len(piece)
