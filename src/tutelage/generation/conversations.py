"""What a generation makes: conversations, and what became of those that are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tutelage.generation.requests import UNASKED, FailedRequest, Message


@dataclass
class Conversation:
    """A conversation that could be kept.

    Args:
        name: its own.
        prompt: the name of what began it: several answers to it share that.
        instruction: what was asked for, without the words around it.
        messages: all of it.
        keys: of the answers in the journal that it was made of.
        finishes: why each of the assistant's messages ended.
        source: what it was made from.
        score: the judge's, where one chose.
    """

    name: str
    prompt: str
    instruction: str
    messages: list[Message]
    keys: list[str]
    finishes: list[str | None]
    source: str = ""
    score: float | None = None

    @property
    def answers(self) -> list[str]:
        """What the assistant says."""
        return [message["content"] for message in self.messages if message["role"] == "assistant"]


class RejectedConversation(NamedTuple):
    """Something that is not kept, and why."""

    name: str
    reason: str
    detail: str
    messages: Sequence[Message]
    keys: Sequence[str]


@dataclass
class GenerationOutput:
    """What a generation came to.

    Args:
        items: that could be kept, in order.
        rejected: set aside or not worth an answer.
        unasked: how many were not asked for, because something ended it first.
    """

    items: list[Conversation] = field(default_factory=list)
    rejected: list[RejectedConversation] = field(default_factory=list)
    unasked: int = 0

    def without_answer(self, name: str, aside: FailedRequest, messages: Sequence[Message]) -> None:
        """Note a conversation whose answer is missing."""
        if aside.reason == UNASKED:
            self.unasked += 1
        else:
            self.rejected.append(RejectedConversation(name, aside.reason, aside.detail, messages, [aside.key]))
