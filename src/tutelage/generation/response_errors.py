"""Parses a server's reply: an answer, a transient error, a refused request, or an error that ends the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tutelage.servers import RETRYABLE, error_message, retry_after

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
