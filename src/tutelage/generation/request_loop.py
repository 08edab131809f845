"""Runs a plan of request batches through the scheduler, with a journal in a folder of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from rich.live import Live
from rich.text import Text

from tutelage.config import BudgetConfig, EndpointConfig
from tutelage.errors import Interrupted, JournalError, RunDirectoryError
from tutelage.files import wrap_write_errors
from tutelage.generation.answers import RequestPlan
from tutelage.generation.batch_api import BatchClient
from tutelage.generation.budget import UNIT, Budget
from tutelage.generation.client import ChatClient
from tutelage.generation.journal import FILE, Journal
from tutelage.generation.scheduler import RequestBatch, RequestClient, Scheduler
from tutelage.interrupts import catch_interrupts
from tutelage.progress import Terminal

CLIENTS: dict[str, Callable[..., RequestClient]] = {"batch": BatchClient, "live": ChatClient}
"""Clients by ``endpoint.api``."""

LIVE_INTERVAL = 0.25
"""Seconds between two updates of the progress in a terminal."""

LINE_INTERVAL = 10.0
"""Seconds between two lines elsewhere."""

T = TypeVar("T")


def open_journal(folder: Path, made_of: Mapping[str, Any]) -> Journal:
    """The journal of a folder; both are created if absent. A folder of other files is a :class:`JournalError`."""
    with wrap_write_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise RunDirectoryError("is a file", where=str(folder), remedy="choose another --out")
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    if names and FILE not in names:
        raise JournalError(
            f"is not empty, and holds no {FILE}", where=str(folder), remedy="choose an empty or new folder as --out"
        )
    return Journal(folder / FILE, made_of)


def run_plan(
    plan: RequestPlan[T], first: RequestBatch | None, journal: Journal, endpoints: Mapping[str, EndpointConfig],
    limits: BudgetConfig, terminal: Terminal,
) -> tuple[T, Scheduler]:  # fmt: skip
    """Send batch after batch of a plan, after the ``first`` that it yielded already, until it returns its result.

    ``endpoints`` are by role. The scheduler's ``exceeded`` tells whether the budget ended the run.
    """
    scheduler = Scheduler(journal, Budget(limits, journal.usage), lambda: False)
    with catch_interrupts(terminal.say, "sending no more requests, and waiting for those in flight") as should_stop:
        scheduler.should_stop = should_stop
        try:
            result = asyncio.run(_send_batches(plan, first, scheduler, endpoints, bool(limits.prices), terminal))
        except KeyboardInterrupt:
            raise Interrupted(
                "stopped at once; answers in flight are lost, every other answer is in the journal"
            ) from None
    return result, scheduler


async def _send_batches(
    plan: RequestPlan[T], batch: RequestBatch | None, scheduler: Scheduler, endpoints: Mapping[str, EndpointConfig],
    has_prices: bool, terminal: Terminal,
) -> T:  # fmt: skip
    scheduler.batch_roles = {role for role, endpoint in endpoints.items() if endpoint.api == "batch"}
    scheduler.clients = {role: CLIENTS[endpoint.api](endpoint, scheduler) for role, endpoint in endpoints.items()}
    progress = asyncio.create_task(_show_progress(terminal, scheduler, has_prices))
    try:
        while True:
            outcomes = [] if batch is None else await scheduler.outcomes(batch)
            try:
                batch = plan.send(outcomes)
            except StopIteration as end:
                result: T = end.value
                return result
    finally:
        progress.cancel()
        await asyncio.wait([progress])
        for client in scheduler.clients.values():
            await client.close()


async def _show_progress(terminal: Terminal, scheduler: Scheduler, has_prices: bool) -> None:
    """Update a live line in a terminal, or print a line from time to time elsewhere."""
    counts, usage = scheduler.counts, scheduler.journal.usage
    name, start, first = "", 0.0, 0

    def text() -> str:
        nonlocal name, start, first
        if counts.name != name:
            name, start, first = counts.name, time.monotonic(), counts.done
        parts = [f"{counts.name}: {counts.done:,}/{counts.total:,}", f"{counts.in_flight} in flight"]
        parts += [f"{counts.failed:,} calls failed"] if counts.failed else []
        parts += [f"{counts.given_up:,} given up"] if counts.given_up else []
        parts += [f"{usage.tokens:,} tokens"] + ([f"{usage.cost / UNIT:.4f} spent"] if has_prices else [])
        done, seconds, left = counts.done - first, time.monotonic() - start, counts.total - counts.done
        if done > 0 and seconds > 1 and left > 0:
            parts.append(f"{timedelta(seconds=round(left * seconds / done))} left")
        return ", ".join(parts)

    if not terminal.live:
        while True:
            await asyncio.sleep(LINE_INTERVAL)
            terminal.say(text())
    with Live(console=terminal.console, transient=True, auto_refresh=False) as live:
        while True:
            live.update(Text(text(), no_wrap=True, overflow="ellipsis"), refresh=True)
            await asyncio.sleep(LIVE_INTERVAL)


def usage_summary(journal: Journal, limits: BudgetConfig) -> dict[str, Any]:
    """What all runs of a journal used, for ``summary.json``."""
    usage = journal.usage
    cost = {"cost": usage.cost / UNIT} if limits.prices else {}
    return {"requests": usage.requests, "tokens": usage.tokens, **cost, "in_flight_when_killed": journal.lost}
