"""Progress of a generation: a live line in a terminal, a plain line from time to time elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

from rich.live import Live
from rich.text import Text

from tutelage.generation.budget import UNIT
from tutelage.generation.scheduler import Scheduler
from tutelage.progress import Terminal

LIVE_INTERVAL = 0.25
"""Seconds between two updates in a terminal."""

LINE_INTERVAL = 10.0
"""Seconds between two lines elsewhere."""


class ProgressLine:
    """The counts of a scheduler as text.

    Args:
        scheduler: has the counts.
        has_prices: whether the cost is shown.
    """

    def __init__(self, scheduler: Scheduler, has_prices: bool) -> None:
        self.scheduler, self.has_prices = scheduler, has_prices
        self.name, self.start, self.first = "", time.monotonic(), 0

    def text(self) -> str:
        """One line: requests done, in flight and failed, tokens, cost, time left."""
        counts, usage, now = self.scheduler.counts, self.scheduler.journal.usage, time.monotonic()
        if counts.name != self.name:
            self.name, self.start, self.first = counts.name, now, counts.done
        parts = [f"{counts.name}: {counts.done:,}/{counts.total:,}", f"{counts.in_flight} in flight"]
        parts += [f"{counts.failed:,} calls failed"] if counts.failed else []
        parts += [f"{counts.given_up:,} given up"] if counts.given_up else []
        parts.append(f"{usage.tokens:,} tokens")
        parts += [f"{usage.cost / UNIT:.4f} spent"] if self.has_prices else []
        done, seconds = counts.done - self.first, now - self.start
        if done > 0 and seconds > 1 and counts.done < counts.total:
            parts.append(f"{timedelta(seconds=round((counts.total - counts.done) * seconds / done))} left")
        return ", ".join(parts)


@asynccontextmanager
async def show_progress(terminal: Terminal, line: ProgressLine) -> AsyncIterator[None]:
    """Show the line while the block runs."""
    task = asyncio.create_task(_update(terminal, line))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _update(terminal: Terminal, line: ProgressLine) -> None:
    if not terminal.live:
        while True:
            await asyncio.sleep(LINE_INTERVAL)
            terminal.say(line.text())
    with Live(console=terminal.console, transient=True, auto_refresh=False) as live:
        while True:
            live.update(Text(line.text(), no_wrap=True, overflow="ellipsis"), refresh=True)
            await asyncio.sleep(LIVE_INTERVAL)
