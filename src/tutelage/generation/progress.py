"""What a person sees while text is generated: a live line in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rich.live import Live
from rich.text import Text

from tutelage.generation.budget import UNIT
from tutelage.generation.scheduler import Scheduler
from tutelage.progress import Terminal

EVERY = 0.25
"""Seconds between two looks in a terminal."""

SELDOM = 10.0
"""Seconds between two lines elsewhere."""


class ProgressLine:
    """Counts of the desk, in words.

    Args:
        desk: what is watched.
        priced: whether prices are known.
    """

    def __init__(self, desk: Scheduler, priced: bool) -> None:
        self.desk, self.priced = desk, priced
        self.name, self.began, self.at_first = "", time.monotonic(), 0

    def line(self) -> str:
        """One line: what is asked, done, in flight, failed, tokens, money, time left."""
        meter, spent, now = self.desk.meter, self.desk.journal.spent, time.monotonic()
        if meter.name != self.name:
            self.name, self.began, self.at_first = meter.name, now, meter.done
        parts = [f"{meter.name}: {meter.done:,}/{meter.total:,}", f"{meter.flying} in flight"]
        parts += [f"{meter.failed:,} calls failed"] if meter.failed else []
        parts += [f"{meter.aside:,} set aside"] if meter.aside else []
        parts.append(f"{spent.tokens:,} tokens")
        parts += [f"{spent.cost / UNIT:.4f} spent"] if self.priced else []
        done, seconds = meter.done - self.at_first, now - self.began
        if done > 0 and seconds > 1 and meter.done < meter.total:
            parts.append(f"{_clock((meter.total - meter.done) * seconds / done)} left")
        return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@asynccontextmanager
async def shown(terminal: Terminal, sight: ProgressLine) -> AsyncIterator[None]:
    """Show the desk's counts as long as the block lasts."""
    task = asyncio.create_task(_follow(terminal, sight))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _follow(terminal: Terminal, sight: ProgressLine) -> None:
    if not terminal.live:
        while True:
            await asyncio.sleep(SELDOM)
            terminal.say(sight.line())
    with Live(console=terminal.console, transient=True, auto_refresh=False) as live:
        while True:
            live.update(Text(sight.line(), no_wrap=True, overflow="ellipsis"), refresh=True)
            await asyncio.sleep(EVERY)
