"""The scheduler: answers requests from the journal, and sends the rest to endpoints within the budget."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tutelage.config import BudgetConfig, EndpointConfig
from tutelage.errors import Interrupted
from tutelage.generation.connections import ConnectionPool
from tutelage.generation.journal import Journal, Usage
from tutelage.generation.requests import (
    NOT_SENT,
    CallError,
    FailedRequest,
    Outcome,
    Request,
    TokenUsage,
    ValidResponse,
)

UNIT = 10**12
"""Costs are integers in units of 10^-12 of the currency, so that sums are exact."""

BATCH_DISCOUNT = 2
"""A request in a batch costs half as much as a live one."""


class Price(NamedTuple):
    """Cost of a token of the prompt and of the answer, in 10^-12 of the currency."""

    input: int
    output: int

    def cost(self, usage: TokenUsage) -> int:
        """The cost of a request."""
        return usage[0] * self.input + usage[1] * self.output


class Budget:
    """The limits of a recipe, the usage so far, and the maximum usage of the requests in flight."""

    def __init__(self, limits: BudgetConfig, usage: Usage) -> None:
        self.limits, self.usage = limits, usage
        self.reserved_tokens = self.reserved_cost = 0
        self.max_cost = None if limits.max_cost is None else int(limits.max_cost * UNIT)

    def price(self, model: str, *, batch: bool) -> Price:
        """The price of a model's tokens; 0 for a model without a price."""
        known = self.limits.prices.get(model)
        if known is None:
            return Price(0, 0)
        divisor = BATCH_DISCOUNT if batch else 1
        return Price(*(-(-round(p * 10**6) // divisor) for p in (known.input, known.output)))

    def exceeded_limit(self, tokens: int, cost: int, requests: int = 1) -> str | None:
        """The limit that further requests of at most so many tokens and this cost could exceed; ``None`` if none."""
        usage, limits = self.usage, self.limits
        if limits.max_requests is not None and usage.requests + requests > limits.max_requests:
            return f"budget.max_requests is {limits.max_requests:,}, and {usage.requests:,} were sent"
        if limits.max_tokens is not None and usage.tokens + self.reserved_tokens + tokens > limits.max_tokens:
            return (
                f"budget.max_tokens is {limits.max_tokens:,}, {usage.tokens:,} were used, and the next request may "
                f"take {tokens:,}"
            )
        if self.max_cost is not None and usage.cost + self.reserved_cost + cost > self.max_cost:
            return (
                f"budget.max_cost is {limits.max_cost:g}, {usage.cost / UNIT:.6g} were spent, and the next request "
                f"may cost {cost / UNIT:.3g}"
            )
        return None

    def reserve(self, tokens: int, cost: int) -> None:
        """Reserve the maximum usage of a request in flight; negative values release it."""
        self.reserved_tokens += tokens
        self.reserved_cost += cost


class RequestBatch(NamedTuple):
    """Requests that do not depend on each other, and a name that the user sees."""

    name: str
    requests: Sequence[Request]


@dataclass
class ProgressCounts:
    """Progress of a request batch.

    Attributes:
        total: requests of the batch.
        cached: requests whose outcome was in the journal before.
        done: requests that have an outcome.
        in_flight: calls without a reply so far.
        given_up: requests that get no answer.
        failed: calls that failed.
    """

    name: str = ""
    total: int = 0
    cached: int = 0
    done: int = 0
    in_flight: int = 0
    given_up: int = 0
    failed: int = 0


@dataclass(slots=True, eq=False)
class PendingRequest:
    """A request without an outcome, its maximum of tokens and cost, and the number of its calls so far."""

    request: Request
    price: Price
    tokens: int
    cost: int
    attempts: int = 0


class RequestClient:
    """Sends requests to one server."""

    def __init__(self, endpoint: EndpointConfig, scheduler: Scheduler) -> None:
        self.endpoint, self.scheduler = endpoint, scheduler
        self.connections = ConnectionPool(endpoint)

    async def fetch(self, pending: Sequence[PendingRequest]) -> None:
        """Send all requests and report their outcomes to the scheduler; return early once it is over."""
        raise NotImplementedError


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
        most = request.max_prompt_tokens, parameters.max_tokens
        return PendingRequest(request, price, sum(most), price.cost(most))

    # Called by clients -------------------------------------------------------------------------------------

    def sending(self, pending: PendingRequest, *, resumed: bool = False) -> None:
        """A call is about to be made. ``resumed``: a process that died made it, and its answer may still come."""
        if resumed:
            self.journal.resume_call(pending.request.key)
        else:
            self.calls += 1
            self.journal.begin_call(pending.request.key, pending.tokens, pending.cost)
        pending.attempts += 1
        self.budget.reserve(pending.tokens, pending.cost)
        self.counts.in_flight += 1

    def _bill(self, pending: PendingRequest, usage: TokenUsage | None, billed: bool) -> tuple[int, int]:
        """Release the reservation of a call; return its tokens and cost."""
        self.budget.reserve(-pending.tokens, -pending.cost)
        self.counts.in_flight -= 1
        if usage is None:
            return (pending.tokens, pending.cost) if billed else (0, 0)
        return sum(usage), pending.price.cost(usage)

    def answered(self, pending: PendingRequest, reply: ValidResponse) -> None:
        """A call gave an answer."""
        tokens, cost = self._bill(pending, reply.usage, True)
        self.journal.end_call(pending.request, tokens, cost, self._count_done, response=reply.raw)

    def failed(self, pending: PendingRequest, error: CallError, *, final: bool = False) -> None:
        """A call failed. Unless it is the ``final`` one of its request, another call follows."""
        self.counts.failed += not error.refused
        tokens, cost = self._bill(pending, error.usage, error.billed)
        done = self._count_done if final else lambda: None
        retry = not (error.refused or error.server_works)
        self.journal.end_call(
            pending.request, tokens, cost, done, reason=error.reason, detail=error.detail, final=final, retry=retry
        )

    def give_up(self, pending: PendingRequest, error: CallError) -> None:
        """A request gets no answer. If the error may be temporary, the next run sends the request again."""
        self.counts.given_up += 1
        self.failed(pending, error, final=True)

    def _count_done(self) -> None:
        self.counts.done += 1
