"""A server that answers JSON, asked until it has: what may be better next time is asked again, what never will be is
an error."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from tutelage.errors import EndpointError, require

FIRST_WAIT = 0.5
"""Seconds before a second attempt, about; doubled for each further one."""
LONGEST_WAIT = 30.0
ATTEMPTS = 4
"""Times that a server that is well may give an answer that is not whole."""

T = TypeVar("T")


class TransientServerError(Exception):
    """What may be better next time.

    Args:
        what: happened.
        after: seconds that the server asks to wait.
        answered: whether the server is well, and only its answer is not.
    """

    def __init__(self, what: str, *, after: float = 0.0, answered: bool = False) -> None:
        super().__init__(what)
        self.what, self.after, self.answered = what, after, answered


class JsonRequest(Protocol):
    """Sends JSON to a path of a server, from its root (``/``) or from the address that was given, and returns its
    JSON; without a body asks for what is there."""

    def __call__(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The reply."""
        ...


class JsonClient:
    """Connections to a server, a few at once.

    Args:
        url: where it is; of one that speaks OpenAI's protocol most often with ``/v1`` at its end.
        where: the section of a recipe that says so, for messages.
        key_env: name of the environment variable that holds the key.
        concurrency: most requests at once.
        timeout: seconds for an answer.
        max_retry_time: seconds without an answer after which the server is given up.

    Raises:
        EndpointError: the variable of the key is not set.
    """

    def __init__(
        self,
        url: str,
        where: str,
        *,
        key_env: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        max_retry_time: float = 300.0,
    ) -> None:
        require("httpx2", "language", where)
        import httpx2

        if key_env is not None and key_env not in os.environ:
            raise EndpointError(
                f"the environment variable {key_env} is not set", where=url, remedy="put the key into it"
            )
        self.url, self.where, self.max_retry_time = url.rstrip("/"), where, max_retry_time
        headers = {} if key_env is None else {"authorization": f"Bearer {os.environ[key_env]}"}
        self._client = httpx2.Client(headers=headers, timeout=timeout)
        self._threads = ThreadPoolExecutor(concurrency, "served")
        self._dice = random.Random(0)  # of waits only

    def close(self) -> None:
        """End all connections; what was asked and not answered is dropped."""
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def submit(self, ask: Callable[[], T]) -> Future[T]:
        """What :meth:`retry` gives, once one of the connections is free."""
        return self._threads.submit(self.retry, ask)

    def retry(self, ask: Callable[[], T]) -> T:
        """What is asked for, asked again where that may help.

        Raises:
            EndpointError: it does not.
        """
        began, wait, odd = time.monotonic(), FIRST_WAIT, 0
        while True:
            try:
                return ask()
            except TransientServerError as fault:
                odd += fault.answered
                pause = max(wait * self._dice.uniform(0.5, 1.5), fault.after)
                if odd >= ATTEMPTS or time.monotonic() + pause - began > self.max_retry_time:
                    tried = f"{odd} times" if odd >= ATTEMPTS else f"for {time.monotonic() - began:.0f} s"
                    raise EndpointError(
                        f"{fault.what}, asked {tried}", where=self.url,
                        remedy="see whether the server runs, and what it says; then go on with the same command",
                    ) from None  # fmt: skip
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One request, as :class:`JsonRequest`.

        Raises:
            Fault: it may be answered another time.
            EndpointError: it is refused.
        """
        reply = self._reply(path, body)
        try:
            return reply.json()
        except ValueError:
            raise TransientServerError(f"answers no JSON: {reply.text[:80]!r}", answered=True) from None

    def send(self, path: str, body: Mapping[str, Any]) -> None:
        """One request of which it matters only that it is not refused; raises as :meth:`post`."""
        self._reply(path, body)

    def _reply(self, path: str, body: Mapping[str, Any] | None) -> Any:
        import httpx2

        root = self.url.removesuffix("/v1") if path.startswith("/") else f"{self.url}/"
        try:
            reply = self._client.request("GET" if body is None else "POST", root + path, json=body)
        except httpx2.TimeoutException:
            raise TransientServerError("does not answer in time") from None
        except (httpx2.HTTPError, OSError) as error:
            raise TransientServerError(f"cannot be reached: {str(error)[:200] or type(error).__name__}") from None
        if reply.status_code in (408, 409, 425, 429) or reply.status_code >= 500:
            raise TransientServerError(
                f"answers {reply.status_code}: {_said(reply)}", after=_after(reply.headers.get("retry-after"))
            )
        if reply.status_code >= 400:
            raise EndpointError(
                f"refuses ({reply.status_code}): {_said(reply)}", where=root + path, remedy=self._remedy(reply)
            )
        return reply

    def _remedy(self, reply: Any) -> str:
        if reply.status_code in (401, 403):
            return f"give the key: {self.where}.key_env"
        if "logprobs" in _said(reply) and self.where == "teacher.endpoint":
            return f"set {self.where}.k to what the server allows, or start it with --max-logprobs"
        return f"correct {self.where}, or how the server was started"


def list_models(post: JsonRequest) -> list[dict[str, Any]]:
    """What a server that speaks OpenAI's protocol says of its models.

    Raises:
        Fault: no list of models.
    """
    reply = post("/v1/models")
    try:
        return list(reply["data"])
    except (LookupError, TypeError):
        raise TransientServerError(f"lists no models: {str(reply)[:80]}", answered=True) from None


def _said(reply: Any) -> str:
    try:
        told = reply.json()
        error = told.get("error", told)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = reply.text
    return " ".join(str(text).split())[:300]


def _after(header: str | None) -> float:
    try:
        return min(max(float(header or 0), 0.0), 600.0)
    except ValueError:
        return 0.0
