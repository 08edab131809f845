"""How many requests may be in flight, and when the next may go."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiolimiter import AsyncLimiter

    from tutelage.config import EndpointConfig

IN_A_ROW = 10
"""Failed calls in a row after which a server is taken to be down: then one call at a time asks whether it is back."""

LONGEST_PAUSE = 60.0
"""Seconds between calls to a server that is down, at most."""


class ConcurrencyLimit:
    """Fewer requests in flight where the server is overloaded, more where it answers (AIMD).

    Args:
        most: requests in flight, at most.
        max_retry_time: seconds without an answer after which a server that fails is given up.
    """

    def __init__(self, most: int, max_retry_time: float) -> None:
        self.most, self.max_retry_time = most, max_retry_time
        self.limit = 1.0  # a wrong key or model costs one call
        self.paused = 0.0
        self.failures = 0
        self.answers = 0
        self.cut = 0.0
        self.last = time.monotonic()

    @property
    def down(self) -> bool:
        """Whether the server only fails."""
        return self.failures >= IN_A_ROW

    @property
    def given_up(self) -> bool:
        """Whether it has been down for too long."""
        max_retry_time = self.max_retry_time if self.answers else self.max_retry_time / 10
        return self.down and time.monotonic() - self.last > max_retry_time

    def began(self) -> None:
        """Requests are sent, after a time in which none were."""
        self.last = time.monotonic()

    def allows(self, flying: int, now: float) -> bool:
        """Whether one more request may go."""
        return now >= self.paused and flying < (1 if self.down else int(self.limit))

    def answered(self) -> None:
        """The server answered, if only to refuse one request."""
        self.failures = 0
        self.last = time.monotonic()
        if not self.answers:
            self.limit = float(self.most)
        self.answers += 1
        self.limit = min(float(self.most), self.limit + 0.25)

    def failed(self, sent: float, *, overloaded: bool, after: float | None) -> None:
        """A call that was sent then failed."""
        now = time.monotonic()
        if not self.down or sent >= self.paused:  # of many that were in flight together, the pause is not for each
            self.failures += 1
            if self.down:
                self.paused = max(self.paused, now + min(LONGEST_PAUSE, 0.5 * 2.0 ** (self.failures - IN_A_ROW)))
        if overloaded and sent >= self.cut:  # those sent before the last cut tell nothing new
            self.limit = max(1.0, self.limit * 0.75)
            self.cut = now
        if after is not None:
            self.paused = max(self.paused, now + after)


class RateLimit:
    """The provider's limits on requests and tokens a minute.

    Args:
        endpoint: names them.
    """

    def __init__(self, endpoint: EndpointConfig) -> None:
        self.requests = _limiter(endpoint.requests_per_minute, 1.0)
        self.most = float(endpoint.tokens_per_minute or 0)
        self.tokens = _limiter(endpoint.tokens_per_minute, self.most / 4)

    def has_room(self, tokens: int) -> bool:
        """Whether a request of so many tokens may go now."""
        return (self.requests is None or self.requests.has_capacity()) and (
            self.tokens is None or self.tokens.has_capacity(self._share(tokens))
        )

    async def take(self, tokens: int) -> None:
        """It goes."""
        if self.requests is not None:
            await self.requests.acquire()
        if self.tokens is not None:
            await self.tokens.acquire(self._share(tokens))

    def _share(self, tokens: int) -> float:
        assert self.tokens is not None
        return min(float(tokens), self.tokens.max_rate)


def _limiter(a_minute: int | None, room: float) -> AsyncLimiter | None:
    """At most so many in any minute: what may go at once (``room``, at least a second's) is taken off the rate."""
    if a_minute is None:
        return None
    from aiolimiter import AsyncLimiter

    at_once = min(max(1.0, room, a_minute / 60), float(a_minute))
    rate = max(a_minute - at_once, a_minute / 2) / 60
    return AsyncLimiter(at_once, at_once / rate)
