"""Texts and conversations for causal language models: token ids, and a mask of the tokens to learn."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tutelage.errors import DataError, shorten

Learn = Literal["answers", "all"]
"""The tokens of a conversation to learn: those of the answers, or all."""

Conversation = Sequence[Mapping[str, Any]]
"""Messages, each with ``role`` and ``content``."""


def as_conversation(values: Sequence[Any]) -> str | Conversation:
    """Convert the columns of a row to a text or a conversation.

    Args:
        values: a text; the messages of a conversation; or a prompt and its answer.

    Raises:
        DataError: messages without ``role`` and ``content``, or without an answer.
    """
    if len(values) == 2:
        return [{"role": "user", "content": values[0]}, {"role": "assistant", "content": values[1]}]
    (value,) = values
    if isinstance(value, str):
        return value
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str) or "role" not in message:
            raise DataError(
                f"a message is {shorten(message)}",
                remedy="give each message a role (system, user or assistant) and a text as content",
            )
    if all(message["role"] != "assistant" for message in value):
        raise DataError(
            f"a conversation has no answer, only messages of {', '.join(sorted({m['role'] for m in value}))}",
            remedy="add messages with role assistant, which are learned",
        )
    return [_without_none(message) for message in value]


def _without_none(value: Any) -> Any:
    """``value`` without the keys that Arrow adds with ``None``, because messages of other rows have them."""
    if isinstance(value, Mapping):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value


def encode_learned(
    text: str | Conversation, tokenizer: Any, learn: Learn = "answers"
) -> tuple[list[int], list[bool]]:
    """Token ids, and for each token whether it is learned.

    All tokens of a text are learned, and the end-of-sequence token after it. A conversation is rendered with the
    tokenizer's chat template; its answers are learned, each from its first token to its end-of-turn token.

    Raises:
        DataError: the tokenizer has no chat template, or the answers cannot be located in it.
    """
    if isinstance(text, str):
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        end = tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        begins = int(bool(ids) and ids[0] == tokenizer.bos_token_id and len(ids) > 1)
        return ids, [False] * begins + [True] * (len(ids) - begins)
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer, a {type(tokenizer).__name__}, has no chat template for conversations",
            where="tokenizer",
            remedy="set tokenizer.chat_template and save it, or give plain texts",
        )
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        encoding = tokenizer.apply_chat_template(
            text, tokenize=True, return_dict=True, return_assistant_tokens_mask=learn == "answers"
        )
        ids = list(encoding["input_ids"])
        return ids, [bool(x) for x in encoding["assistant_masks"]] if learn == "answers" else [True] * len(ids)
    whole = render_conversation(text, tokenizer)
    cut = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(cut["input_ids"]), cut["offset_mapping"]
    if learn == "all":
        return ids, [True] * len(ids)
    spans = find_answer_spans(text, tokenizer, whole)
    return ids, [any(start <= a and a < stop for start, stop in spans) and b > a for a, b in offsets]


def find_answer_spans(text: Conversation, tokenizer: Any, whole: str) -> list[tuple[int, int]]:
    """The character spans of the answers in a rendered conversation, including their ends of turn.

    An answer is the difference between the conversation up to it and its prompt.

    Raises:
        DataError: the rendered beginning of a conversation is not a prefix of the rendered conversation.
    """
    spans = []
    for i, message in enumerate(text):
        if message["role"] != "assistant":
            continue
        before = render_conversation(text[:i], tokenizer, prompt=True) if i else ""
        upto = whole if i == len(text) - 1 else render_conversation(text[: i + 1], tokenizer)
        # A prompt may end with the beginning of an answer, such as an opening tag of a thought.
        pairs = zip(before, whole, strict=False)
        start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(whole)))
        if start < len(before.rstrip()) or not whole.startswith(upto.rstrip()):
            raise DataError(
                "the chat template renders the first messages of a conversation differently without the others, so "
                "the answers cannot be located",
                where="tokenizer.chat_template",
                remedy="put {% generation %} and {% endgeneration %} around the answers in the template, "
                "or set data.learn: all",
            )
        body = whole[start : len(upto)]
        spans.append((start, start + len(body.rstrip())))
    return spans


def render_conversation(text: Conversation, tokenizer: Any, prompt: bool = False) -> str:
    """Render a conversation with the tokenizer's chat template.

    Raises:
        DataError: the template rejects the conversation.
    """
    from jinja2 import TemplateError

    try:
        rendered: str = tokenizer.apply_chat_template(list(text), tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        raise DataError(
            f"the chat template rejects a conversation of {', '.join(m['role'] for m in text)}: {error}",
            where="tokenizer.chat_template",
            remedy="give the roles in the order that the template expects",
        ) from None
    return rendered
