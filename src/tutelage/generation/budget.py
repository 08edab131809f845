"""The budget: a request is sent only if the most that it can cost still fits."""

from __future__ import annotations

from typing import NamedTuple

from tutelage.config import BudgetConfig
from tutelage.generation.journal import Usage

UNIT = 10**12
"""Costs are integers in units of 10^-12 of the currency, so that sums are exact."""

BATCH_DISCOUNT = 2
"""A request in a batch costs one half of a live one."""


class Price(NamedTuple):
    """Cost of a token of the prompt and of the answer, in 10^-12 of the currency."""

    input: int
    output: int

    def cost(self, tokens_in: int, tokens_out: int) -> int:
        """The cost of a request."""
        return tokens_in * self.input + tokens_out * self.output


class Budget:
    """The limits of a recipe, the usage so far, and what requests in flight may still take."""

    def __init__(self, limits: BudgetConfig, usage: Usage) -> None:
        self.limits, self.usage = limits, usage
        self.reserved_tokens = self.reserved_cost = 0
        self.max_cost = None if limits.max_cost is None else int(limits.max_cost * UNIT)

    def price(self, model: str, *, batch: bool = False) -> Price:
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
        """Reserve what a request in flight may take; negative values release it."""
        self.reserved_tokens += tokens
        self.reserved_cost += cost
