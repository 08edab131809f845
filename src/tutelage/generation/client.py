"""Requests one by one, many in flight, over HTTP.

The transport of httpx2 is used as it is, a connection for each request in flight: the openai package builds a typed
object of every reply and retries out of sight, which here would hide calls from the budget
(``benchmarks/generate.py`` measures both).
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
import urllib.request
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tutelage.config import EndpointConfig
from tutelage.errors import EndpointError, RunDirectoryError
from tutelage.generation.rate_limit import ConcurrencyLimit, RateLimit
from tutelage.generation.response_errors import (
    FatalResponse,
    ParsedResponse,
    RequestRefused,
    RetryableError,
    ValidResponse,
    parse_response,
)
from tutelage.generation.scheduler import ApiKey, PendingRequest, Scheduler

if TYPE_CHECKING:
    import ssl

    import httpx2

FIRST_WAIT = 0.5
"""Seconds before a request's second attempt, on average; doubled for each further one."""

LONGEST_WAIT = 30.0
"""Seconds between two attempts, at most, where the server says nothing."""

REFUSED = 10
"""Requests refused at the start, before any answer, after which all would be."""


class ChatClient:
    """Chat completions of one server.

    Args:
        endpoint: where, and how fast.
        desk: is told what came of each request.
    """

    def __init__(self, endpoint: EndpointConfig, desk: Scheduler) -> None:
        self.endpoint, self.desk = endpoint, desk
        self.secret = ApiKey(endpoint)
        self.pace = ConcurrencyLimit(endpoint.concurrency, endpoint.max_retry_time)
        self.minute = RateLimit(endpoint)
        self.lines = ConnectionPool(endpoint, self.secret)
        self.dice = random.Random(0)  # of waits only
        self.flying: set[asyncio.Task[None]] = set()
        self.wake = asyncio.Event()
        self.later: list[tuple[float, int, PendingRequest]] = []
        self.answers = self.refusals = 0

    async def fetch(self, jobs: Sequence[PendingRequest]) -> None:
        """Ask until all jobs are answered or set aside, or the desk says stop; what is in flight is waited for."""
        ready = deque(jobs)
        self.pace.began()
        try:
            while (ready or self.later or self.flying) and not self.desk.over:
                now = time.monotonic()
                while self.later and self.later[0][0] <= now:
                    ready.append(heapq.heappop(self.later)[2])
                if not ready or not self.pace.allows(len(self.flying), now):
                    await self._wait(now)
                    continue
                job = ready[0]
                forbidden = self.desk.forbids(job)
                if forbidden is not None:
                    if not self.flying:
                        self.desk.refusal = forbidden
                    else:  # what is in flight may take less than it holds
                        await self._wait(now)
                    continue
                estimate = job.request.most_in // 4 + job.request.manner.max_tokens
                if not self.minute.has_room(estimate):
                    await asyncio.sleep(0.01)
                    continue
                await self.minute.take(estimate)
                ready.popleft()
                self.desk.sending(job)
                task = asyncio.create_task(self._carry(job))
                self.flying.add(task)
                task.add_done_callback(self._landed)
        finally:
            if self.flying:
                await asyncio.wait(self.flying)
            self.later.clear()

    async def _wait(self, now: float) -> None:
        """Until something lands, a pause ends, a retry is due, or it is time to see whether to stop."""
        until = min(now + 0.2, self.later[0][0] if self.later else now + 0.2)
        if self.pace.paused > now:
            until = min(until, self.pace.paused)
        loop = asyncio.get_running_loop()
        handle = loop.call_later(max(0.0, until - now), self.wake.set)
        await self.wake.wait()
        handle.cancel()
        self.wake.clear()

    def _landed(self, task: asyncio.Task[None]) -> None:
        self.flying.discard(task)
        self.wake.set()
        fault = None if task.cancelled() else task.exception()
        if isinstance(fault, Exception):  # of our own: it ends all, and is seen
            self.desk.fatal = self.desk.fatal or fault

    async def _carry(self, job: PendingRequest) -> None:
        sent = time.monotonic()
        try:
            self._settle(job, await self._call(job), sent)
        except EndpointError as error:
            self.desk.fatal = self.desk.fatal or error
        except RunDirectoryError:
            return  # the journal cannot be written, and remembers it

    def _settle(self, job: PendingRequest, verdict: ParsedResponse, sent: float) -> None:
        desk = self.desk
        match verdict:
            case ValidResponse():
                self.pace.answered()
                self.answers += 1
                desk.answered(job, verdict)
            case RequestRefused():
                self.pace.answered()
                self.refusals += 1
                desk.set_aside(job, verdict, again=False)
                if not self.answers and self.refusals >= REFUSED and verdict.reason != "content filter":
                    desk.fatal = EndpointError(
                        f"refuses every request ({verdict.detail})", where=self.endpoint.url,
                        remedy="correct endpoint, sampling or templates, then run the same command again",
                    )  # fmt: skip
            case RetryableError():
                self._retry(job, verdict, sent)
            case FatalResponse():
                desk.failed(job, RetryableError("refused", detail=verdict.what))
                raise EndpointError(verdict.what, where=self.endpoint.url, remedy=verdict.remedy)

    def _retry(self, job: PendingRequest, fault: RetryableError, sent: float) -> None:
        desk, pace = self.desk, self.pace
        if fault.final:  # the server is well, and only this answer is not
            pace.answered()
        else:
            pace.failed(sent, overloaded=fault.overloaded, after=fault.after)
        if job.attempts >= self.endpoint.attempts and not pace.down:
            desk.set_aside(job, fault, again=not fault.final)
            return
        desk.failed(job, fault)
        if pace.down:
            job.attempts = min(job.attempts, self.endpoint.attempts - 1)  # no fault of this request
        if pace.given_up:
            desk.fatal = desk.fatal or EndpointError(
                f"fails call after call: {fault.reason}" + (f" ({fault.detail})" if fault.detail else ""),
                where=self.endpoint.url, remedy="see whether the server runs, then run the same command again",
            )  # fmt: skip
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (job.attempts - 1)) * self.dice.uniform(0.5, 1.5)
        heapq.heappush(self.later, (time.monotonic() + max(wait, fault.after or 0.0), desk.asked, job))

    async def _call(self, job: PendingRequest) -> ParsedResponse:
        reply = await self.lines.send("POST", "/chat/completions", job.request.body, self.endpoint.timeout)
        if isinstance(reply, RetryableError):
            return reply
        verdict = parse_response(*reply)
        if isinstance(verdict, FatalResponse) and verdict.served:
            names = await served(self.lines)
            if names:
                return verdict._replace(remedy=f"{verdict.remedy}; it serves: {', '.join(names)}")
        return verdict

    async def close(self) -> None:
        """Close all connections."""
        await self.lines.close()


async def served(lines: ConnectionPool) -> list[str]:
    """Names of the models that a server says it has, a few of them."""
    reply = await lines.send("GET", "/models", b"", 10.0)
    if isinstance(reply, RetryableError):
        return []
    try:
        import json

        return [str(model["id"]) for model in json.loads(reply[2])["data"]][:8]
    except (ValueError, LookupError, TypeError):
        return []


class ConnectionPool:
    """Connections to a server, each for one request at a time.

    Args:
        endpoint: where it is.
        secret: what lets requests in.
    """

    def __init__(self, endpoint: EndpointConfig, secret: ApiKey) -> None:
        import httpx2

        self._secret = secret
        self.url = httpx2.URL(endpoint.url + "/")
        self._headers = {
            "host": self.url.netloc.decode(), "accept": "application/json", "accept-encoding": "gzip",
            "content-type": "application/json", "user-agent": "tutelage", **secret.headers,
        }  # fmt: skip
        self._targets: dict[str, Any] = {}
        self._idle: list[httpx2.AsyncHTTPTransport] = []
        self._context: ssl.SSLContext | bool = httpx2.create_ssl_context() if self.url.scheme == "https" else False
        proxy = None if urllib.request.proxy_bypass(self.url.host) else urllib.request.getproxies()
        self._proxy = (proxy or {}).get(self.url.scheme) or (proxy or {}).get("all")

    def _open(self) -> httpx2.AsyncHTTPTransport:
        import httpx2

        if self._idle:
            return self._idle.pop()
        limits = httpx2.Limits(max_connections=1, max_keepalive_connections=1)
        return httpx2.AsyncHTTPTransport(verify=self._context, limits=limits, proxy=self._proxy)

    async def send(
        self, method: str, path: str, body: bytes, timeout: float, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes] | RetryableError:
        """Status, headers and body of a reply, or what went wrong on the way. The key is in neither."""
        import httpx2

        url = self._targets.get(path) or self._targets.setdefault(path, self.url.join(path.lstrip("/")))
        request = httpx2.Request(
            method, url, content=body, headers={**self._headers, **(headers or {})},
            extensions={"timeout": {"connect": timeout, "read": timeout, "write": timeout, "pool": timeout}},
        )  # fmt: skip
        line = self._open()
        whole = False
        try:
            async with asyncio.timeout(timeout):
                response = await line.handle_async_request(request)
                try:
                    raw = await response.aread()
                    whole = True
                finally:
                    await response.aclose()
        except TimeoutError:
            return RetryableError("time-out", overloaded=True, billed=True, detail=f"{timeout:g} s")
        except httpx2.TimeoutException:
            return RetryableError("time-out", overloaded=True, billed=True, detail=f"{timeout:g} s")
        except httpx2.ConnectError as error:
            return RetryableError("cannot be reached", detail=self._said(error))
        except (httpx2.HTTPError, OSError) as error:
            return RetryableError("connection lost", billed=True, detail=self._said(error))
        finally:
            if whole:
                self._idle.append(line)
            else:
                await asyncio.shield(_closed(line))
        found = {name.lower(): value for name, value in response.headers.items()}
        return response.status_code, found, self._secret.scrubbed(raw)

    def _said(self, error: Exception) -> str:
        return self._secret.scrubbed(str(error)[:200].encode()).decode()

    async def close(self) -> None:
        """Close all connections."""
        for line in self._idle:
            await _closed(line)
        self._idle.clear()


async def _closed(line: httpx2.AsyncHTTPTransport) -> None:
    try:
        await line.aclose()
    except Exception:  # noqa: BLE001  (a connection that is broken may not even close)
        return
