"""The live API: one HTTP request for each answer, many in flight."""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections import deque
from collections.abc import Sequence

from tutelage.config import EndpointConfig
from tutelage.errors import EndpointError, RunDirectoryError
from tutelage.generation.connections import ConnectionPool
from tutelage.generation.rate_limit import ConcurrencyLimit, RateLimit
from tutelage.generation.response_errors import CallError, FatalResponse, ValidResponse, parse_response
from tutelage.generation.scheduler import PendingRequest, Scheduler

FIRST_WAIT = 0.5
"""Mean seconds before the second attempt of a request; doubled for each further one."""

LONGEST_WAIT = 30.0
"""Most seconds between two attempts, where the server asks for no longer wait."""

MAX_REFUSED = 10
"""Refused requests before the first answer, after which the run ends."""


class ChatClient:
    """Sends chat completions to one server.

    Each retry passes the budget, the journal and the limits of the endpoint like a first attempt, so retries are
    queued here and not left to a library.
    """

    def __init__(self, endpoint: EndpointConfig, scheduler: Scheduler) -> None:
        self.endpoint, self.scheduler = endpoint, scheduler
        self.concurrency = ConcurrencyLimit(endpoint.concurrency, endpoint.max_retry_time)
        self.rate_limit = RateLimit(endpoint)
        self.connections = ConnectionPool(endpoint)
        self.jitter = random.Random(0)
        self.tasks: set[asyncio.Task[None]] = set()
        self.wake = asyncio.Event()
        self.retries: list[tuple[float, int, PendingRequest]] = []
        self.answers = self.refusals = 0

    async def fetch(self, pending: Sequence[PendingRequest]) -> None:
        """Send all requests until each has an outcome or the scheduler is over; waits for calls in flight."""
        ready = deque(pending)
        self.concurrency.restart()
        try:
            while (ready or self.retries or self.tasks) and not self.scheduler.is_over:
                now = time.monotonic()
                while self.retries and self.retries[0][0] <= now:
                    ready.append(heapq.heappop(self.retries)[2])
                if not ready or not self.concurrency.has_room(len(self.tasks), now):
                    await self._wait(now)
                    continue
                one = ready[0]
                exceeded = self.scheduler.exceeded_limit(one)
                if exceeded is not None:
                    if not self.tasks:
                        self.scheduler.exceeded = exceeded
                    else:  # calls in flight may cost less than is reserved for them
                        await self._wait(now)
                    continue
                estimate = one.request.max_prompt_tokens // 4 + one.request.parameters.max_tokens
                if not self.rate_limit.has_room(estimate):
                    await asyncio.sleep(0.01)
                    continue
                await self.rate_limit.take(estimate)
                ready.popleft()
                self.scheduler.sending(one)
                task = asyncio.create_task(self._call(one))
                self.tasks.add(task)
                task.add_done_callback(self._finished)
        finally:
            if self.tasks:
                await asyncio.wait(self.tasks)
            self.retries.clear()

    async def _wait(self, now: float) -> None:
        """Wait until a call ends, a pause ends, a retry is due, or at most 0.2 s."""
        until = min(now + 0.2, self.retries[0][0] if self.retries else now + 0.2)
        if self.concurrency.paused_until > now:
            until = min(until, self.concurrency.paused_until)
        handle = asyncio.get_running_loop().call_later(max(0.0, until - now), self.wake.set)
        await self.wake.wait()
        handle.cancel()
        self.wake.clear()

    def _finished(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self.wake.set()
        error = None if task.cancelled() else task.exception()
        if isinstance(error, RunDirectoryError):
            return  # the journal cannot be written, and remembers the error
        if isinstance(error, Exception):
            self.scheduler.fatal = self.scheduler.fatal or error

    async def _call(self, pending: PendingRequest) -> None:
        sent, timeout, url = time.monotonic(), self.endpoint.timeout, self.endpoint.url
        reply = await self.connections.send("POST", "/chat/completions", pending.request.body, timeout)
        response = reply if isinstance(reply, CallError) else parse_response(*reply)
        if isinstance(response, ValidResponse):
            self.concurrency.succeeded()
            self.answers += 1
            self.scheduler.answered(pending, response)
        elif isinstance(response, FatalResponse):
            models = await self.connections.list_models() if response.list_models else []
            remedy = response.remedy + (f"; it serves: {', '.join(models)}" if models else "")
            self.scheduler.failed(pending, CallError("refused", response.what))
            raise EndpointError(response.what, where=url, remedy=remedy)
        elif response.refused:
            self.concurrency.succeeded()
            self.refusals += 1
            self.scheduler.give_up(pending, response)
            if not self.answers and self.refusals >= MAX_REFUSED and response.reason != "content filter":
                raise EndpointError(
                    f"refuses every request ({response.detail})", where=url,
                    remedy="correct endpoint, sampling or templates, then run the same command again",
                )  # fmt: skip
        else:
            self._retry(pending, response, sent)

    def _retry(self, pending: PendingRequest, error: CallError, sent: float) -> None:
        scheduler, concurrency = self.scheduler, self.concurrency
        if error.server_works:
            concurrency.succeeded()
        else:
            concurrency.failed(sent, overloaded=error.overloaded, after=error.after)
        if pending.attempts >= self.endpoint.attempts and not concurrency.is_down:
            scheduler.give_up(pending, error)
            return
        scheduler.failed(pending, error)
        if concurrency.is_down:  # the request did not cause the failure
            pending.attempts = min(pending.attempts, self.endpoint.attempts - 1)
        if concurrency.is_given_up:
            scheduler.fatal = scheduler.fatal or EndpointError(
                f"fails repeatedly: {error.reason}" + (f" ({error.detail})" if error.detail else ""),
                where=self.endpoint.url, remedy="check whether the server runs, then run the same command again",
            )  # fmt: skip
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (pending.attempts - 1)) * self.jitter.uniform(0.5, 1.5)
        due = time.monotonic() + max(wait, error.after or 0.0)
        heapq.heappush(self.retries, (due, scheduler.calls, pending))

    async def close(self) -> None:
        """Close all connections."""
        await self.connections.close()
