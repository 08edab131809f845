"""The scheduler: answers requests from the journal, and sends the rest to endpoints within the budget."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tutelage.errors import Interrupted
from tutelage.generation.budget import Budget
from tutelage.generation.journal import Journal
from tutelage.generation.requests import NOT_SENT, FailedRequest, Outcome, Request
from tutelage.generation.response_errors import CallError, ValidResponse


class RequestBatch(NamedTuple):
    """Requests that do not depend on each other, and a name that the user sees."""

    name: str
    requests: Sequence[Request]


@dataclass
class ProgressCounts:
    """Counts that the user sees while a request batch is sent: requests in all, with an outcome in the journal
    already, with an outcome, and without an answer; calls in flight, and failed ones."""

    name: str = ""
    total: int = 0
    cached: int = 0
    done: int = 0
    in_flight: int = 0
    given_up: int = 0
    failed: int = 0


@dataclass(slots=True, eq=False)
class PendingRequest:
    """A request that has no outcome yet, the most that it can take and cost, and its calls so far."""

    request: Request
    tokens: int
    cost: int
    attempts: int = 0


class RequestClient(Protocol):
    """Sends requests to a server."""

    async def fetch(self, pending: Sequence[PendingRequest]) -> None:
        """Send all requests and report their outcomes to the scheduler; return early once it is over."""

    async def close(self) -> None:
        """Close all connections."""


class Scheduler:
    """Hands requests to clients, unless the journal has their outcomes or the budget forbids them.

    Attributes:
        clients: by the role of their endpoint.
        batch_roles: roles whose endpoint is used through its batch API.
        exceeded: the limit of the budget that ended the run.
        fatal: the error that ended the run.
        calls: made by this process.
    """

    def __init__(self, journal: Journal, budget: Budget, should_stop: Callable[[], bool]) -> None:
        self.journal, self.budget, self.should_stop = journal, budget, should_stop
        self.clients: Mapping[str, RequestClient] = {}
        self.batch_roles: set[str] = set()
        self.counts = ProgressCounts()
        self.exceeded: str | None = None
        self.fatal: Exception | None = None
        self.calls = 0

    @property
    def is_over(self) -> bool:
        """Whether no further request may be sent."""
        return bool(self.should_stop() or self.exceeded or self.fatal or self.journal.failure)

    async def outcomes(self, batch: RequestBatch) -> list[Outcome]:
        """The outcomes of a batch's requests, in order; raises the error or interruption that ended the run."""
        known: dict[str, Outcome] = {}
        pending: dict[str, dict[str, PendingRequest]] = {}
        for request in batch.requests:
            if request.key in known:
                continue
            outcome = self.journal.find(request)
            if outcome is not None:
                known[request.key] = outcome
            else:
                requests = pending.setdefault(request.parameters.role, {})
                if request.key not in requests:
                    requests[request.key] = self._pending(request)
        counts = self.counts
        counts.name, counts.total, counts.done = batch.name, len(batch.requests), len(known)
        counts.cached = len(known)
        if not self.is_over:
            await asyncio.gather(*(self.clients[role].fetch(list(r.values())) for role, r in pending.items()))
        await self.journal.flush()
        if self.fatal is not None:
            raise self.fatal
        if self.should_stop():
            raise Interrupted("stopped; every answer is in the journal")
        return [known.get(r.key) or self.journal.find(r) or FailedRequest(r.key, NOT_SENT) for r in batch.requests]

    def _pending(self, request: Request) -> PendingRequest:
        parameters = request.parameters
        price = self.budget.price(parameters.model, batch=parameters.role in self.batch_roles)
        tokens_in, tokens_out = request.max_prompt_tokens, parameters.max_tokens
        return PendingRequest(request, tokens_in + tokens_out, price.cost(tokens_in, tokens_out))

    # Called by clients -------------------------------------------------------------------------------------

    def exceeded_limit(self, pending: PendingRequest) -> str | None:
        """The limit of the budget that a request could exceed."""
        return self.budget.exceeded_limit(pending.tokens, pending.cost)

    def sending(self, pending: PendingRequest, *, resumed: bool = False) -> None:
        """A call is about to be made, or (``resumed``) was made by a process that died and may still be answered."""
        if resumed:
            self.journal.resume_call(pending.request.key)
        else:
            self.calls += 1
            self.journal.begin_call(pending.request.key, pending.tokens, pending.cost)
        pending.attempts += 1
        self.budget.reserve(pending.tokens, pending.cost)
        self.counts.in_flight += 1

    def _bill(self, pending: PendingRequest, usage: tuple[int, int] | None, billed: bool) -> tuple[int, int]:
        """Release the reservation of a call; return its tokens and cost."""
        self.budget.reserve(-pending.tokens, -pending.cost)
        self.counts.in_flight -= 1
        if usage is None:
            return (pending.tokens, pending.cost) if billed else (0, 0)
        parameters = pending.request.parameters
        price = self.budget.price(parameters.model, batch=parameters.role in self.batch_roles)
        return sum(usage), price.cost(*usage)

    def answered(self, pending: PendingRequest, reply: ValidResponse) -> None:
        """A call gave an answer."""
        tokens, cost = self._bill(pending, reply.usage, True)
        self.journal.end_call(pending.request, tokens, cost, self._count_done, response=reply.raw)

    def failed(self, pending: PendingRequest, error: CallError, *, final: bool = False) -> None:
        """A call failed; unless this is ``final``, there will be another."""
        self.counts.failed += not error.refused
        tokens, cost = self._bill(pending, error.usage, error.billed)
        done = self._count_done if final else lambda: None
        retry = not (error.refused or error.server_works)
        self.journal.end_call(
            pending.request, tokens, cost, done, reason=error.reason, detail=error.detail, final=final, retry=retry
        )

    def give_up(self, pending: PendingRequest, error: CallError) -> None:
        """A request gets no answer. If its error may pass, the next run sends it again."""
        self.counts.given_up += 1
        self.failed(pending, error, final=True)

    def _count_done(self) -> None:
        self.counts.done += 1
