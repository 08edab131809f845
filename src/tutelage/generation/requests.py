"""What is asked of an endpoint, and what comes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from tutelage.config import EndpointConfig, SamplingConfig

Message = Mapping[str, str]
"""``role`` and ``content``."""


def canonical(value: Any) -> bytes:
    """JSON that is the same bytes for the same value."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


class RequestParameters:
    """Who is asked, and how: all that requests of one kind have in common.

    Args:
        endpoint: the server and its model.
        sampling: how it draws.
        to: the name of the endpoint in this generation, ``teacher`` or ``judge``.
    """

    def __init__(self, endpoint: EndpointConfig, sampling: SamplingConfig, to: str = "teacher") -> None:
        drawn = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            endpoint.limit_key: sampling.max_tokens,
            "stop": sampling.stop,
        }
        self.to, self.model, self.max_tokens = to, endpoint.model, sampling.max_tokens
        self.body = {"model": endpoint.model, **{k: v for k, v in drawn.items() if v is not None}, **sampling.extra}
        self.head = canonical(self.body)


class Request:
    """One answer that is wanted.

    Args:
        manner: who is asked, and how.
        messages: the conversation so far.
        sample: the number of the answer, where several are wanted to the same messages.
        slot: a name under which an answer in the journal is taken, whatever its messages were. Only where messages
            depend on what was kept before, and another filter shall read the same answers.
    """

    def __init__(
        self, manner: RequestParameters, messages: Sequence[Message], sample: int = 0, slot: str | None = None
    ) -> None:
        self.manner, self.messages, self.sample, self.slot = manner, messages, sample, slot

    @cached_property
    def asked(self) -> bytes:
        """The messages as JSON."""
        return canonical(list(self.messages))

    @cached_property
    def key(self) -> str:
        """The journal's name of the answer: a hash of model, parameters, messages and sample."""
        return hashlib.sha256(b"%b\n%b\n%d" % (self.manner.head, self.asked, self.sample)).hexdigest()[:32]

    @property
    def body(self) -> bytes:
        """What is sent."""
        return b'%b,"messages":%b}' % (self.manner.head[:-1], self.asked)

    @property
    def most_in(self) -> int:
        """Tokens that the messages cannot exceed: a token is a byte at least, and templates add some."""
        return len(self.asked) + 64 + 16 * len(self.messages)


class ChatAnswer(NamedTuple):
    """What a model said.

    Args:
        key: of the line in the journal.
        text: what it said.
        finish: why it ended, as the server gives it: ``stop``, ``length`` ...
    """

    key: str
    text: str
    finish: str | None


class FailedRequest(NamedTuple):
    """A request without an answer.

    Args:
        key: of the request.
        reason: one of a few words, such as ``content filter``.
        detail: what the server said.
    """

    key: str
    reason: str
    detail: str = ""


UNASKED = "not asked"
"""The reason where budget or a person ended things first."""

Outcome = ChatAnswer | FailedRequest
