"""A JSON client that retries transient errors, and functions to read error replies."""

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from tutelage.errors import EndpointError, require

FIRST_WAIT = 0.5
"""Mean seconds before the second attempt; doubled for each further attempt."""
LONGEST_WAIT = 30.0
LONGEST_RETRY_AFTER = 600.0
MAX_INVALID = 4
"""A request fails after so many invalid replies of a server that works."""

THREADS = "json-client"
"""Start of the names of a client's threads."""

RETRYABLE = (408, 409, 425, 429)
"""HTTP status codes of transient errors below 500; all codes from 500 on are transient."""

T = TypeVar("T")


class TransientServerError(Exception):
    """An error after which another attempt may succeed.

    Args:
        what: what is wrong.
        after: seconds to wait before the next attempt, as the server requires.
        answered: whether the server works and only this reply is invalid.
        status: the HTTP status code, if there is a reply.
    """

    def __init__(self, what: str, *, after: float = 0.0, answered: bool = False, status: int | None = None) -> None:
        super().__init__(what)
        self.what, self.after, self.answered, self.status = what, after, answered, status


JsonRequest = Callable[..., Any]
"""``(path, body=None) -> reply``: sends JSON and returns the JSON reply; a GET request if there is no body.

A path that begins with ``/`` is relative to the server's root, any other path to the client's URL.
"""


class JsonClient:
    """A client of one server.

    Args:
        url: URL of the server; with OpenAI's protocol it usually ends with ``/v1``.
        where: the section of the recipe that has the URL, for messages.
        key_env: name of the environment variable that holds the API key.
        concurrency: maximum number of requests in flight.
        timeout: seconds to wait for a reply.
        max_retry_time: a request fails after so many seconds without a valid reply.

    Raises:
        EndpointError: ``key_env`` is not set.
    """

    def __init__(
        self, url: str, where: str, *, key_env: str | None = None, concurrency: int = 8, timeout: float = 120.0,
        max_retry_time: float = 300.0,
    ) -> None:  # fmt: skip
        require("httpx2", "language", where)
        import httpx2

        if key_env is not None and key_env not in os.environ:
            raise EndpointError(
                f"the environment variable {key_env} is not set", where=url, remedy="set it to the API key"
            )
        self.url, self.where, self.max_retry_time = url.rstrip("/"), where, max_retry_time
        headers = {} if key_env is None else {"authorization": f"Bearer {os.environ[key_env]}"}
        self._client = httpx2.Client(headers=headers, timeout=timeout)
        self._threads = ThreadPoolExecutor(concurrency, THREADS)
        self._jitter = random.Random(0)

    def close(self) -> None:
        """Close all connections and cancel requests that have not started."""
        own = threading.current_thread().name.startswith(THREADS)  # the garbage collector may call from any thread
        self._threads.shutdown(wait=not own, cancel_futures=True)
        self._client.close()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """:meth:`retry` in a thread, as soon as one is free."""
        return self._threads.submit(self.retry, call)

    def retry(self, call: Callable[[], T]) -> T:
        """The result of ``call``, which is retried after each :class:`TransientServerError`.

        Raises:
            EndpointError: the server still fails after ``max_retry_time``, or its replies are invalid.
        """
        start, wait, invalid = time.monotonic(), FIRST_WAIT, 0
        while True:
            try:
                return call()
            except TransientServerError as error:
                invalid += error.answered
                pause = max(wait * self._jitter.uniform(0.5, 1.5), error.after)
                if invalid >= MAX_INVALID or time.monotonic() + pause - start > self.max_retry_time:
                    tried = f"{invalid} times" if invalid >= MAX_INVALID else f"for {time.monotonic() - start:.0f} s"
                    raise EndpointError(
                        f"{error.what}, tried {tried}", where=self.url,
                        remedy="check that the server runs and read its log; then run the same command again",
                    ) from None  # fmt: skip
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send one request, as a :data:`JsonRequest`.

        Raises:
            TransientServerError: another attempt may succeed.
            EndpointError: the server rejects the request.
        """
        reply = self.send(path, body)
        try:
            return reply.json()
        except ValueError:
            raise TransientServerError(f"the reply is not JSON: {reply.text[:80]!r}", answered=True) from None

    def models(self) -> dict[str, dict[str, Any]]:
        """The server's models by name, as OpenAI's protocol lists them.

        Raises:
            TransientServerError: the reply is no list of models.
            EndpointError: the server has no such list at this URL.
        """
        try:
            reply = self.post("models")
        except EndpointError as error:
            try:
                self.post("/v1/models")
            except (EndpointError, TransientServerError):
                raise error from None
            raise self.missing_v1() from None
        try:
            return {str(each["id"]): dict(each) for each in reply["data"]}
        except (LookupError, TypeError, ValueError):
            raise TransientServerError(f"lists no models: {str(reply)[:80]}", answered=True) from None

    def missing_v1(self) -> EndpointError:
        """The error for a URL that does not end with ``/v1``."""
        return EndpointError(
            "the server's API begins with /v1, and the URL does not end with it", where=f"{self.where}.url",
            remedy=f"set it to {self.url}/v1",
        )  # fmt: skip

    def send(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send one request whose reply may be other than JSON; raises the errors of :meth:`post`."""
        import httpx2

        root = self.url.removesuffix("/v1") if path.startswith("/") else f"{self.url}/"
        try:
            reply = self._client.request("GET" if body is None else "POST", root + path, json=body)
        except httpx2.TimeoutException:
            raise TransientServerError("does not answer in time") from None
        except (httpx2.HTTPError, OSError) as error:
            raise TransientServerError(f"cannot be reached: {str(error)[:200] or type(error).__name__}") from None
        if reply.status_code < 400:
            return reply
        message = error_message(reply.content)[1]
        if reply.status_code in RETRYABLE or reply.status_code >= 500:
            after = min(retry_after(reply.headers) or 0.0, LONGEST_RETRY_AFTER)
            raise TransientServerError(
                f"answers with status {reply.status_code}: {message}", after=after, status=reply.status_code
            )
        remedy = f"correct {self.where}, or how the server was started"
        if reply.status_code in (401, 403):
            remedy = f"set {self.where}.key_env to the environment variable that holds the API key"
        elif "logprobs" in message and self.where == "teacher.endpoint":
            remedy = f"set {self.where}.k to what the server allows, or start it with --max-logprobs"
        raise EndpointError(f"refuses the request ({reply.status_code}): {message}", where=root + path, remedy=remedy)


def error_message(body: bytes) -> tuple[str, str]:
    """Code and message of an error reply; ``""`` for one that is missing."""
    try:
        reply = json.loads(body.decode("utf-8"))
    except ValueError:
        return "", " ".join(body[:300].decode("utf-8", "replace").split())
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    if not isinstance(error, dict):
        return "", " ".join(str(error).split())[:300]
    message = error.get("message") or error.get("detail") or ""
    return str(error.get("code") or error.get("type") or ""), " ".join(str(message).split())[:300]


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from the header ``retry-after-ms`` or ``retry-after`` (a number or a date)."""
    try:
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            return max(0.0, float(milliseconds) / 1000)
        if (value := headers.get("retry-after")) is None:
            return None
        try:
            return max(0.0, float(value))
        except ValueError:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
