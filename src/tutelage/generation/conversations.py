"""The conversations that a generation makes, and the requests that gave none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tutelage.generation.requests import NOT_SENT, FailedRequest, Message


@dataclass
class Conversation:
    """A conversation that may go into the data.

    Attributes:
        prompt: name of the prompt that it answers; several answers share one.
        instruction: the request without the template around it.
        keys: of its answers in the journal.
        finishes: the ``finish_reason`` of each of the assistant's messages.
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
        """The assistant's messages."""
        return [message["content"] for message in self.messages if message["role"] == "assistant"]


class RejectedConversation(NamedTuple):
    """A conversation or instruction that does not go into the data, and why."""

    name: str
    reason: str
    detail: str
    messages: Sequence[Message]
    keys: Sequence[str]


@dataclass
class GenerationOutput:
    """The result of a strategy; ``not_sent`` counts requests that the end of the run prevented."""

    conversations: list[Conversation] = field(default_factory=list)
    rejected: list[RejectedConversation] = field(default_factory=list)
    not_sent: int = 0

    def add_failure(self, name: str, failure: FailedRequest, messages: Sequence[Message]) -> None:
        """Add a conversation without an answer."""
        if failure.reason == NOT_SENT:
            self.not_sent += 1
        else:
            self.reject(name, (failure.reason, failure.detail), messages, failure.key)

    def reject(self, name: str, reason: tuple[str, str], messages: Sequence[Message], key: str) -> None:
        """Add a conversation that is rejected for a reason, which has a detail."""
        self.rejected.append(RejectedConversation(name, *reason, messages, [key]))
