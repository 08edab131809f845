"""The live API: one HTTP request for each answer, many in flight."""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tutelage.config import EndpointConfig
from tutelage.errors import EndpointError, RunDirectoryError
from tutelage.generation.requests import CallError, FatalResponse, ValidResponse, parse_response
from tutelage.generation.scheduler import PendingRequest, RequestClient, Scheduler

if TYPE_CHECKING:
    from aiolimiter import AsyncLimiter

FIRST_WAIT = 0.5
"""Mean seconds before the second attempt of a request; doubled for each further one."""

LONGEST_WAIT = 30.0
"""Maximum of seconds between two attempts, unless the server requests a longer wait."""

MAX_REFUSED = 10
"""The run ends after this many refused requests if no request was answered."""

DOWN_AFTER = 10
"""Failed calls in a row after which a server counts as down. Then one call at a time tests whether it is back."""

LONGEST_PAUSE = 60.0
"""Maximum of seconds between calls to a server that is down."""


class ConcurrencyLimit:
    """The number of requests in flight: fewer when the server is overloaded, more while it answers (AIMD).

    A server that only fails is given up after ``max_retry_time`` seconds without an answer.
    """

    def __init__(self, maximum: int, max_retry_time: float) -> None:
        self.maximum, self.max_retry_time = maximum, max_retry_time
        self.limit = 1.0  # a wrong key or model costs one call
        self.paused_until = 0.0
        self.failures = 0
        self.answers = 0
        self.last_cut = 0.0
        self.last_answer = time.monotonic()

    @property
    def is_down(self) -> bool:
        """Whether the server only fails."""
        return self.failures >= DOWN_AFTER

    @property
    def is_given_up(self) -> bool:
        """Whether the server is down, and has not answered for too long."""
        max_retry_time = self.max_retry_time if self.answers else self.max_retry_time / 10
        return self.is_down and time.monotonic() - self.last_answer > max_retry_time

    def restart(self) -> None:
        """Start to measure the time without an answer again, before requests are sent."""
        self.last_answer = time.monotonic()

    def has_room(self, in_flight: int, now: float) -> bool:
        """Whether one more request may be sent."""
        return now >= self.paused_until and in_flight < (1 if self.is_down else int(self.limit))

    def succeeded(self) -> None:
        """The server answered or refused a request."""
        self.failures = 0
        self.last_answer = time.monotonic()
        if not self.answers:
            self.limit = float(self.maximum)
        self.answers += 1
        self.limit = min(float(self.maximum), self.limit + 0.25)

    def failed(self, sent: float, *, overloaded: bool, after: float | None) -> None:
        """A call that was sent at ``sent`` failed."""
        now = time.monotonic()
        if not self.is_down or sent >= self.paused_until:  # calls in flight together cause one pause, not one each
            self.failures += 1
            if self.is_down:
                pause = min(LONGEST_PAUSE, 0.5 * 2.0 ** (self.failures - DOWN_AFTER))
                self.paused_until = max(self.paused_until, now + pause)
        if overloaded and sent >= self.last_cut:  # calls that were sent before the last cut give no new information
            self.limit = max(1.0, self.limit * 0.75)
            self.last_cut = now
        if after is not None:
            self.paused_until = max(self.paused_until, now + after)


class RateLimit:
    """The provider's limits on requests and tokens per minute."""

    def __init__(self, endpoint: EndpointConfig) -> None:
        self.requests = _limiter(endpoint.requests_per_minute, 1.0)
        self.tokens = _limiter(endpoint.tokens_per_minute, (endpoint.tokens_per_minute or 0) / 4)

    def has_room(self, tokens: int) -> bool:
        """Whether a request of so many tokens may be sent now."""
        return (self.requests is None or self.requests.has_capacity()) and (
            self.tokens is None or self.tokens.has_capacity(min(float(tokens), self.tokens.max_rate))
        )

    async def take(self, tokens: int) -> None:
        """Count a request of so many tokens, which is sent now."""
        if self.requests is not None:
            await self.requests.acquire()
        if self.tokens is not None:
            await self.tokens.acquire(min(float(tokens), self.tokens.max_rate))


def _limiter(per_minute: int | None, burst: float) -> AsyncLimiter | None:
    """A limiter for any 60 s: the burst, which is at least the share of one second, is subtracted from the rate."""
    if per_minute is None:
        return None
    from aiolimiter import AsyncLimiter

    burst = min(max(1.0, burst, per_minute / 60), float(per_minute))
    rate = max(per_minute - burst, per_minute / 2) / 60
    return AsyncLimiter(burst, burst / rate)


class ChatClient(RequestClient):
    """Sends chat completions to one server.

    Each retry passes the budget, the journal and the limits of the endpoint like a first attempt, so retries are
    queued here and not left to a library.
    """

    def __init__(self, endpoint: EndpointConfig, scheduler: Scheduler) -> None:
        super().__init__(endpoint, scheduler)
        self.concurrency = ConcurrencyLimit(endpoint.concurrency, endpoint.max_retry_time)
        self.rate_limit = RateLimit(endpoint)
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
                exceeded = self.scheduler.budget.exceeded_limit(one.tokens, one.cost)
                if exceeded is not None:
                    if not self.tasks:
                        self.scheduler.exceeded = exceeded
                    else:  # calls in flight may cost less than their maximum
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
            return  # the journal cannot be written, and raises the error itself
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
                    f"the server refuses every request ({response.detail})", where=url,
                    remedy="correct endpoint, sampling or templates in the recipe, then run the same command again",
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
                f"calls fail repeatedly: {error.reason}" + (f" ({error.detail})" if error.detail else ""),
                where=self.endpoint.url, remedy="check whether the server runs, then run the same command again",
            )  # fmt: skip
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (pending.attempts - 1)) * self.jitter.uniform(0.5, 1.5)
        due = time.monotonic() + max(wait, error.after or 0.0)
        heapq.heappush(self.retries, (due, scheduler.calls, pending))
