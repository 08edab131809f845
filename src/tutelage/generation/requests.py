"""Requests to an endpoint, and their outcomes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from tutelage.config import EndpointConfig, SamplingConfig

Message = Mapping[str, str]
"""A chat message: ``role`` and ``content``."""


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


class RequestParameters:
    """The model and sampling parameters that requests to the endpoint of a role (``teacher``, ``judge``) share."""

    def __init__(self, endpoint: EndpointConfig, sampling: SamplingConfig, role: str = "teacher") -> None:
        options = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            endpoint.limit_key: sampling.max_tokens,
            "stop": sampling.stop,
        }
        self.role, self.model, self.max_tokens = role, endpoint.model, sampling.max_tokens
        self.body = {"model": endpoint.model, **{k: v for k, v in options.items() if v is not None}, **sampling.extra}
        self.json = canonical_json(self.body)


class Request:
    """A request for one answer.

    Args:
        sample: index of the answer, where several are requested for the same messages.
        slot: a second name of the answer in the journal. An answer with this slot is used even if its messages were
            different. Needed if the messages depend on earlier filtering, so that other filters use the same answers.
    """

    def __init__(
        self, parameters: RequestParameters, messages: Sequence[Message], sample: int = 0, slot: str | None = None
    ) -> None:
        self.parameters, self.messages, self.sample, self.slot = parameters, messages, sample, slot

    @cached_property
    def messages_json(self) -> bytes:
        """The messages as JSON."""
        return canonical_json(list(self.messages))

    @cached_property
    def key(self) -> str:
        """Name of the answer in the journal: a hash of model, parameters, messages and sample."""
        return hashlib.sha256(b"%b\n%b\n%d" % (self.parameters.json, self.messages_json, self.sample)).hexdigest()[
            :32
        ]

    @property
    def body(self) -> bytes:
        """The JSON body of the HTTP request."""
        return b'%b,"messages":%b}' % (self.parameters.json[:-1], self.messages_json)

    @property
    def max_prompt_tokens(self) -> int:
        """Upper bound of the prompt's tokens: one for each byte, and some for the chat template."""
        return len(self.messages_json) + 64 + 16 * len(self.messages)


class ChatAnswer(NamedTuple):
    """An answer: its key in the journal, its text, and the server's ``finish_reason``."""

    key: str
    text: str
    finish: str | None


class FailedRequest(NamedTuple):
    """A request without an answer: its key, a short category, and the message of the server."""

    key: str
    reason: str
    detail: str = ""


NOT_SENT = "not asked"
"""The reason of a request that was not sent, because the budget or the user ended the run before."""

Outcome = ChatAnswer | FailedRequest
