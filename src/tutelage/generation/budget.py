"""What may be spent, reckoned before each request with the most that it can cost."""

from __future__ import annotations

from typing import NamedTuple

from tutelage.config import BudgetConfig
from tutelage.generation.journal import Usage

UNIT = 10**12
"""Costs are whole numbers of a millionth of a millionth, so that sums are exact."""

BATCH_SHARE = (1, 2)
"""What a request in a batch costs of a live one."""


class Price(NamedTuple):
    """What a token costs, in 10^-12 of the currency."""

    input: int
    output: int

    def of(self, tokens_in: int, tokens_out: int) -> int:
        """The cost of a request."""
        return tokens_in * self.input + tokens_out * self.output


class Budget:
    """Lets a request pass, or says what forbids it.

    Args:
        limits: of the recipe.
        spent: so far, over all runs; the journal moves it.
    """

    def __init__(self, limits: BudgetConfig, spent: Usage) -> None:
        self.limits, self.spent = limits, spent
        self.held_tokens = self.held_cost = 0
        self.most_cost = None if limits.max_cost is None else int(limits.max_cost * UNIT)

    def price(self, model: str, *, batch: bool = False) -> Price:
        """What a model's tokens cost; nothing where no price is known."""
        known = self.limits.prices.get(model)
        if known is None:
            return Price(0, 0)
        part, whole = BATCH_SHARE if batch else (1, 1)
        return Price(*(-(-round(p * 10**6) * part // whole) for p in (known.input, known.output)))

    def forbids(self, tokens: int, cost: int, requests: int = 1) -> str | None:
        """The limit that requests of at most so many tokens and such cost could exceed."""
        spent, limits = self.spent, self.limits
        if limits.max_requests is not None and spent.requests + requests > limits.max_requests:
            return f"budget.max_requests is {limits.max_requests:,}, and {spent.requests:,} were sent"
        if limits.max_tokens is not None and spent.tokens + self.held_tokens + tokens > limits.max_tokens:
            return (
                f"budget.max_tokens is {limits.max_tokens:,}, {spent.tokens:,} were used, and the next request may "
                f"take {tokens:,}"
            )
        if self.most_cost is not None and spent.cost + self.held_cost + cost > self.most_cost:
            return (
                f"budget.max_cost is {limits.max_cost:g}, {spent.cost / UNIT:.6g} were spent, and the next request "
                f"may cost {cost / UNIT:.3g}"
            )
        return None

    def hold(self, tokens: int, cost: int) -> None:
        """Set aside what a request in flight may cost."""
        self.held_tokens += tokens
        self.held_cost += cost

    def free(self, tokens: int, cost: int) -> None:
        """Its cost is known."""
        self.held_tokens -= tokens
        self.held_cost -= cost
