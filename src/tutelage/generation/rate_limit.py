"""Limits on requests in flight and on requests per minute."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiolimiter import AsyncLimiter

    from tutelage.config import EndpointConfig

DOWN_AFTER = 10
"""Failed calls in a row after which a server counts as down. Then one call at a time tests whether it is back."""

LONGEST_PAUSE = 60.0
"""Most seconds between calls to a server that is down."""


class ConcurrencyLimit:
    """The number of requests in flight: fewer when the server is overloaded, more while it answers (AIMD).

    After ``max_retry_time`` seconds without an answer a server that fails is given up.
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
        """Whether it has been down for too long."""
        max_retry_time = self.max_retry_time if self.answers else self.max_retry_time / 10
        return self.is_down and time.monotonic() - self.last_answer > max_retry_time

    def restart(self) -> None:
        """Requests are sent after a time without any."""
        self.last_answer = time.monotonic()

    def has_room(self, in_flight: int, now: float) -> bool:
        """Whether one more request may be sent."""
        return now >= self.paused_until and in_flight < (1 if self.is_down else int(self.limit))

    def succeeded(self) -> None:
        """The server answered, if only to refuse one request."""
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
        """Count a request that is sent."""
        if self.requests is not None:
            await self.requests.acquire()
        if self.tokens is not None:
            await self.tokens.acquire(min(float(tokens), self.tokens.max_rate))


def _limiter(per_minute: int | None, burst: float) -> AsyncLimiter | None:
    """A limiter that no minute exceeds: the burst, of at least a second's share, is subtracted from the rate."""
    if per_minute is None:
        return None
    from aiolimiter import AsyncLimiter

    burst = min(max(1.0, burst, per_minute / 60), float(per_minute))
    rate = max(per_minute - burst, per_minute / 2) / 60
    return AsyncLimiter(burst, burst / rate)
