"""What a server's reply means: an answer, another try, a request to set aside, or the end of it all."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple


class ValidResponse(NamedTuple):
    """An answer.

    Args:
        raw: the reply, as one line of JSON.
        text: what the model said.
        finish: why it ended.
        usage: tokens of the prompt and of the answer, where the server counts them.
    """

    raw: bytes
    text: str
    finish: str | None
    usage: tuple[int, int] | None


class RetryableError(NamedTuple):
    """A fault that may pass.

    Args:
        reason: in a few words.
        after: seconds that the server asks to wait.
        overloaded: the server has too much to do.
        billed: the server may have generated, and charged for, what was lost.
        detail: what it said.
        usage: tokens, where the server counts them all the same.
        final: the server is well, and only this answer is not.
    """

    reason: str
    after: float | None = None
    overloaded: bool = False
    billed: bool = False
    detail: str = ""
    usage: tuple[int, int] | None = None
    final: bool = False


class RequestRefused(NamedTuple):
    """A request that this server will not answer."""

    reason: str
    detail: str = ""
    billed: bool = False
    usage: tuple[int, int] | None = None


class FatalResponse(NamedTuple):
    """Nothing that is asked will be answered.

    Args:
        what: is wrong.
        remedy: what to do.
        served: whether a list of the models that are served would help.
    """

    what: str
    remedy: str
    served: bool = False


ParsedResponse = ValidResponse | RetryableError | RequestRefused | FatalResponse

LONGEST_WAIT = 3600.0
"""Seconds of Retry-After above which it is better to stop."""

NO_MODEL = ("model_not_found", "model_not_supported", "invalid_model")
NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")


def parse_response(status: int, headers: Mapping[str, str], body: bytes) -> ParsedResponse:
    """What a reply means.

    Args:
        status: of HTTP.
        headers: names in lower case.
        body: whole, as it came.
    """
    if 200 <= status < 300:
        return _answer(body)
    code, said = _error(body)
    detail = f"{status}: {said}" if said else str(status)
    if code in NO_MODEL or (status in (400, 404) and _denies(said)):
        return FatalResponse(f"the model is not served ({detail})", "correct endpoint.model", served=True)
    if code in NO_MONEY or status == 402:
        return FatalResponse(f"the account is exhausted ({detail})", "fill it up, then run the same command again")
    if status == 401:
        return FatalResponse(
            f"the key is not accepted ({detail})", "set the variable that endpoint.key_env names to a valid key"
        )
    if status == 403:
        return FatalResponse(f"access is refused ({detail})", "check what the key may do, and endpoint.model")
    if status == 404:
        return FatalResponse(
            f"there is nothing at that address ({detail})", "correct endpoint.url: most end in /v1", served=True
        )
    if 300 <= status < 400:
        return FatalResponse(f"the server sends elsewhere ({detail})", "give the final address as endpoint.url")
    if status in (408, 409, 425, 429) or status >= 500:
        after = retry_after(headers)
        if after is not None and after > LONGEST_WAIT:
            return FatalResponse(
                f"the server asks to wait {after / 3600:.1f} hours ({detail})", "run the same command again then"
            )
        return RetryableError(
            f"status {status}", after=after, overloaded=status in (408, 429, 503, 504, 529),
            billed=status in (408, 504), detail=detail,
        )  # fmt: skip
    if "content_filter" in (code, said) or "content_policy_violation" in code:
        return RequestRefused("content filter", detail)
    return RequestRefused("refused by the server", detail)


def _answer(body: bytes) -> ParsedResponse:
    try:
        reply = json.loads(body.decode("utf-8"))
        if not isinstance(reply, dict):
            raise ValueError
    except ValueError:
        return RetryableError("invalid reply", billed=True, detail=f"{len(body)} bytes that are no JSON object")
    usage = _usage(reply.get("usage"))
    if reply.get("error"):
        return RetryableError(
            "error in the reply", billed=usage is None, detail=str(reply["error"])[:300], usage=usage
        )
    try:
        choice = reply["choices"][0]
        finish = choice.get("finish_reason")
        text = choice["message"].get("content")
        if not isinstance(finish, str | None) or not isinstance(text, str | None):
            raise ValueError
    except (LookupError, TypeError, AttributeError, ValueError):
        return RetryableError("no choices", billed=usage is None, usage=usage, final=True)
    if finish == "content_filter":
        return RequestRefused("content filter", "the server cut the answer", usage is None, usage)
    if not text or not text.strip():
        return RetryableError("empty answer", billed=usage is None, usage=usage, final=True)
    raw = body.strip()
    if b"\n" in raw or b"\r" in raw:  # between values: inside of texts JSON has none
        raw = raw.replace(b"\r", b" ").replace(b"\n", b" ")
    return ValidResponse(raw, text, finish, usage)


def _usage(given: Any) -> tuple[int, int] | None:
    try:
        found = (int(given["prompt_tokens"]), int(given["completion_tokens"]))
    except (TypeError, KeyError, ValueError):
        return None
    return found if min(found) >= 0 else None


def _error(body: bytes) -> tuple[str, str]:
    """Code and message of an error's body."""
    try:
        given = json.loads(body.decode("utf-8"))
        error = given.get("error", given) if isinstance(given, dict) else given
        if isinstance(error, dict):
            said = error.get("message") or error.get("detail") or ""
            return str(error.get("code") or error.get("type") or ""), " ".join(str(said).split())[:300]
        return "", " ".join(str(error).split())[:300]
    except ValueError:
        return "", " ".join(body[:300].decode("utf-8", "replace").split())


def _denies(said: str) -> bool:
    """Whether a server says that it has no such model; that of `transformers serve` is pinned to another."""
    words = ("not found", "does not exist", "not served", "unknown", "not exist")
    low = said.lower()
    return "pinned to" in low or ("model" in low and any(word in low for word in words))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, as a number or a date."""
    given = headers.get("retry-after-ms")
    try:
        if given is not None:
            return max(0.0, float(given) / 1000)
        given = headers.get("retry-after")
        if given is None:
            return None
        try:
            return max(0.0, float(given))
        except ValueError:
            return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
