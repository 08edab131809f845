"""The desk that all requests pass: it knows what was answered, what may be spent, and when to stop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from tutelage.config import EndpointConfig
from tutelage.errors import ConfigError, Interrupted
from tutelage.generation.budget import Budget
from tutelage.generation.journal import Journal
from tutelage.generation.requests import UNASKED, FailedRequest, Outcome, Request, canonical
from tutelage.generation.response_errors import RequestRefused, RetryableError, ValidResponse


class RequestBatch(NamedTuple):
    """Requests that do not wait for each other.

    Args:
        name: what a person reads while they are asked.
        requests: in the order in which their outcomes are wanted.
    """

    name: str
    requests: Sequence[Request]


class ProgressCounts:
    """What a person sees of a wave that is asked."""

    def __init__(self) -> None:
        self.name = ""
        self.total = self.done = self.kept = self.flying = self.aside = self.failed = 0


class PendingRequest:
    """A request on its way.

    Args:
        request: what is asked.
        tokens: the most that it can take.
        cost: the most that it can cost.
    """

    __slots__ = ("attempts", "cost", "request", "tokens")

    def __init__(self, request: Request, tokens: int, cost: int) -> None:
        self.request, self.tokens, self.cost, self.attempts = request, tokens, cost, 0


class ApiKey:
    """A key, which shows itself to nobody but the server.

    Args:
        endpoint: names the environment variable.

    Raises:
        ConfigError: the variable is not set, or holds no key.
    """

    def __init__(self, endpoint: EndpointConfig) -> None:
        self._words: list[str] = []
        self._headers: dict[str, str] = {}
        if endpoint.key_env is not None:
            key = os.environ.get(endpoint.key_env, "").strip()
            where = f"environment variable {endpoint.key_env}"
            if not key:
                raise ConfigError("is not set, and the key is read from it", where=where,
                                  remedy=f"export {endpoint.key_env}=..., or change endpoint.key_env")  # fmt: skip
            if not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("holds no key: keys are of printable ASCII characters", where=where,
                                  remedy="set it to the key alone")  # fmt: skip
            self._words.append(key)
            self._headers["authorization"] = f"Bearer {key}"
        elif endpoint.login is not None:
            import base64

            pair = ":".join(endpoint.login)
            self._words += [endpoint.login[1], coded := base64.b64encode(pair.encode()).decode()]
            self._headers["authorization"] = f"Basic {coded}"

    def __repr__(self) -> str:
        return "Secret(...)"

    @property
    def headers(self) -> dict[str, str]:
        """What lets a request in."""
        return self._headers

    def scrubbed(self, body: bytes) -> bytes:
        """A server's words without the key, should it have repeated it."""
        for word in self._words:
            if word and (found := word.encode()) in body:
                body = body.replace(found, b"***")
        return body


class RequestClient(Protocol):
    """Asks a server."""

    async def fetch(self, jobs: Sequence[PendingRequest]) -> None:
        """Ask for all jobs and tell the desk what came of each; return early once the desk says so."""

    async def close(self) -> None:
        """Close all connections."""


class Scheduler:
    """Hands requests to endpoints, unless the journal has their answers or the budget forbids them.

    Args:
        journal: open.
        budget: what may be spent.
        stop: whether a person asked to end it.
    """

    def __init__(self, journal: Journal, budget: Budget, stop: Callable[[], bool]) -> None:
        self.journal, self.budget, self.stop = journal, budget, stop
        self.endpoints: Mapping[str, RequestClient] = {}
        self.batch: set[str] = set()
        self.meter = ProgressCounts()
        self.refusal: str | None = None
        self.fatal: Exception | None = None
        self.asked = 0

    @property
    def over(self) -> bool:
        """Whether nothing more is to be asked."""
        return self.stop() or self.refusal is not None or self.fatal is not None or self.journal.failure is not None

    async def ask(self, wave: RequestBatch) -> list[Outcome]:
        """The outcomes of a wave's requests, in order.

        Raises:
            Interrupted: a person asked to stop; what was in flight is in the journal.
            EndpointError: the server refuses, or does not answer.
            RunDirectoryError: the journal cannot be written.
        """
        found: dict[str, Outcome] = {}
        missing: dict[str, dict[str, PendingRequest]] = {}
        for request in wave.requests:
            if request.key in found:
                continue
            known = self.journal.find(request)
            if known is not None:
                found[request.key] = known
            else:
                jobs = missing.setdefault(request.manner.to, {})
                if request.key not in jobs:
                    jobs[request.key] = self._job(request)
        self.meter.name, self.meter.total, self.meter.done = wave.name, len(wave.requests), len(found)
        self.meter.kept = len(found)
        if not self.over:
            await asyncio.gather(*(self.endpoints[to].fetch(list(jobs.values())) for to, jobs in missing.items()))
        await self.journal.flushed()
        if self.fatal is not None:
            raise self.fatal
        if self.stop():
            raise Interrupted("stopped; every answer is in the journal")
        return [found.get(r.key) or self.journal.find(r) or FailedRequest(r.key, UNASKED) for r in wave.requests]

    def _job(self, request: Request) -> PendingRequest:
        manner = request.manner
        price = self.budget.price(manner.model, batch=manner.to in self.batch)
        most = request.most_in
        return PendingRequest(request, most + manner.max_tokens, price.of(most, manner.max_tokens))

    # What endpoints tell -------------------------------------------------------------------------------------

    def forbids(self, job: PendingRequest) -> str | None:
        """The limit that a job could exceed."""
        return self.budget.forbids(job.tokens, job.cost)

    def sending(self, job: PendingRequest) -> None:
        """A call is about to be made."""
        job.attempts += 1
        self.asked += 1
        self.budget.hold(job.tokens, job.cost)
        self.journal.ask(job.request.key, job.tokens, job.cost)
        self.meter.flying += 1

    def resuming(self, job: PendingRequest) -> None:
        """A call that was made before this process began may still be answered."""
        self.journal.reopen(job.request.key)
        job.attempts += 1
        self.budget.hold(job.tokens, job.cost)
        self.meter.flying += 1

    def _billed(self, job: PendingRequest, usage: tuple[int, int] | None, whole: bool) -> tuple[int, int]:
        """Tokens and cost of a call, and what was held for it is free."""
        self.budget.free(job.tokens, job.cost)
        self.meter.flying -= 1
        if usage is None:
            return (job.tokens, job.cost) if whole else (0, 0)
        manner = job.request.manner
        price = self.budget.price(manner.model, batch=manner.to in self.batch)
        return sum(usage), price.of(*usage)

    def answered(self, job: PendingRequest, good: ValidResponse) -> None:
        """A call gave an answer."""
        tokens, cost = self._billed(job, good.usage, True)
        rest = b'"request":%b,"response":%b}' % (job.request.body, good.raw)
        self.journal.settle("key", job.request, tokens, cost, rest, self._done)

    def failed(self, job: PendingRequest, fault: RetryableError) -> None:
        """A call failed, and there will be another."""
        self.meter.failed += 1
        tokens, cost = self._billed(job, fault.usage, fault.billed)
        rest = canonical({"reason": fault.reason, "detail": fault.detail})[1:]
        self.journal.settle("fail", job.request, tokens, cost, rest, _nothing)

    def set_aside(self, job: PendingRequest, fault: RequestRefused | RetryableError, *, again: bool) -> None:
        """There will be no answer; with ``again``, unless the whole is run once more."""
        self.meter.aside += 1
        if isinstance(fault, RetryableError):
            self.meter.failed += 1
        tokens, cost = self._billed(job, fault.usage, fault.billed)
        rest = canonical({"reason": fault.reason, "detail": fault.detail, **({"again": True} if again else {})})[1:]
        self.journal.settle("aside", job.request, tokens, cost, rest, self._done)

    def _done(self) -> None:
        self.meter.done += 1


def _nothing() -> None:
    pass
