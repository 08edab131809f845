"""Requests to an endpoint, their outcomes, and the meaning of the server's replies."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from tutelage.config import EndpointConfig, SamplingConfig
from tutelage.servers import RETRYABLE, error_message, retry_after

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


TokenUsage = tuple[int, int]
"""Tokens of the prompt and of the answer."""


class ValidResponse(NamedTuple):
    """A JSON reply with an answer, and its token usage where the server counts tokens."""

    raw: bytes
    usage: TokenUsage | None


class CallError(NamedTuple):
    """A call without an answer.

    Attributes:
        reason: a short category.
        billed: the server may have generated an answer that was lost, and charge for it.
        refused: the server will not answer this request. Other errors may be temporary.
        server_works: only this answer is invalid.
        after: seconds to wait, as the server requests.
    """

    reason: str
    detail: str = ""
    billed: bool = False
    usage: TokenUsage | None = None
    refused: bool = False
    server_works: bool = False
    overloaded: bool = False
    after: float | None = None


class FatalResponse(NamedTuple):
    """An error that every request would get; ``list_models``: whether to show the names of the server's models."""

    what: str
    remedy: str
    list_models: bool = False


ParsedResponse = ValidResponse | CallError | FatalResponse

LONGEST_RETRY_AFTER = 3600.0
"""Seconds; the run ends if the server requests a longer wait."""

NO_MODEL = ("model_not_found", "model_not_supported", "invalid_model")
NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")

FATAL = {
    401: ("the server does not accept the API key", "set the variable that endpoint.key_env names to a valid key"),
    402: ("the account has no credit", "add credit, then run the same command again"),
    403: ("the server refuses access", "check the permissions of the key, and endpoint.model"),
    404: ("the server has no such address", "correct endpoint.url: most addresses end in /v1"),
}
"""Status codes that end the run, with what is wrong and what to do."""


def parse_response(status: int, headers: Mapping[str, str], body: bytes) -> ParsedResponse:
    """Parse a reply: its HTTP status, headers (names in lower case) and body."""
    if 200 <= status < 300:
        return _answer(body)
    code, message = error_message(body)
    detail = f"{status}: {message}" if message else str(status)
    if code in NO_MODEL or (status in (400, 404) and _has_no_model(message)):
        return FatalResponse(
            f"the server does not have the model ({detail})", "correct endpoint.model", list_models=True
        )
    if code in NO_MONEY:
        status = 402
    if status in FATAL:
        what, remedy = FATAL[status]
        return FatalResponse(f"{what} ({detail})", remedy, list_models=status == 404)
    if 300 <= status < 400:
        return FatalResponse(f"the server redirects the request ({detail})", "set endpoint.url to the final address")
    if status in RETRYABLE or status >= 500:
        after = retry_after(headers)
        if after is not None and after > LONGEST_RETRY_AFTER:
            return FatalResponse(
                f"the server requests a wait of {after / 3600:.1f} hours ({detail})",
                "wait that long, then run the same command again",
            )
        overloaded = status in (408, 429, 503, 504, 529)
        return CallError(f"status {status}", detail, billed=status in (408, 504), overloaded=overloaded, after=after)
    is_filtered = "content_filter" in (code, message) or "content_policy_violation" in code
    return CallError("content filter" if is_filtered else "refused by the server", detail, refused=True)


def _answer(body: bytes) -> ParsedResponse:
    try:
        reply = json.loads(body.decode("utf-8"))
        if not isinstance(reply, dict):
            raise ValueError
    except ValueError:
        return CallError("invalid reply", f"{len(body)} bytes, not a JSON object", billed=True)
    usage = _usage(reply.get("usage"))
    billed = usage is None
    if reply.get("error"):
        return CallError("error in the reply", str(reply["error"])[:300], billed, usage)
    try:
        choice = reply["choices"][0]
        finish = choice.get("finish_reason")
        text = choice["message"].get("content")
        if not isinstance(finish, str | None) or not isinstance(text, str | None):
            raise ValueError
    except (LookupError, TypeError, AttributeError, ValueError):
        return CallError("no choices", "", billed, usage, server_works=True)
    if finish == "content_filter":
        return CallError("content filter", "the server cut the answer", billed, usage, refused=True)
    if not text or not text.strip():
        return CallError("empty answer", "", billed, usage, server_works=True)
    return ValidResponse(body, usage)


def _usage(value: Any) -> TokenUsage | None:
    try:
        usage = (int(value["prompt_tokens"]), int(value["completion_tokens"]))
    except (TypeError, KeyError, ValueError):
        return None
    return usage if min(usage) >= 0 else None


def _has_no_model(message: str) -> bool:
    """Whether a message reports an unknown model; `transformers serve` writes that it is "pinned to" another one."""
    low = message.lower()
    phrases = ("not found", "does not exist", "not served", "unknown", "not exist")
    return "pinned to" in low or ("model" in low and any(phrase in low for phrase in phrases))
