"""Runs a plan of request batches through the scheduler, with a journal in a folder of its own."""

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
from tutelage.generation.client import ChatClient
from tutelage.generation.journal import FILE, Journal
from tutelage.generation.scheduler import UNIT, Budget, RequestBatch, RequestClient, Scheduler
from tutelage.interrupts import catch_interrupts
from tutelage.progress import Terminal

CLIENTS: dict[str, Callable[..., RequestClient]] = {"batch": BatchClient, "live": ChatClient}
"""Clients by ``endpoint.api``."""

LIVE_INTERVAL = 0.25
"""Seconds between two updates of the progress in a terminal."""

LINE_INTERVAL = 10.0
"""Seconds between two lines of progress in a log."""

T = TypeVar("T")


def open_journal(folder: Path, made_of: Mapping[str, Any]) -> Journal:
    """The journal of a folder, new or existing; raises :class:`JournalError` for a folder of other files."""
    with wrap_write_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise RunDirectoryError("is a file, not a folder", where=str(folder), remedy="choose another --out")
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    if names and FILE not in names:
        raise JournalError(
            f"the folder has other files and no {FILE}", where=str(folder),
            remedy="choose an empty or new folder as --out",
        )  # fmt: skip
    return Journal(folder / FILE, made_of)


def run_plan(
    plan: RequestPlan[T], first: RequestBatch, journal: Journal, endpoints: Mapping[str, EndpointConfig],
    limits: BudgetConfig, terminal: Terminal,
) -> tuple[T, Scheduler]:  # fmt: skip
    """Send the batches of a plan until it returns its result, beginning with the ``first``, which it already yielded.

    ``endpoints`` are by role. The scheduler's ``exceeded`` is set if the budget ended the run.
    """
    scheduler = Scheduler(journal, Budget(limits, journal.usage), lambda: False)
    scheduler.batch_roles = {role for role, endpoint in endpoints.items() if endpoint.api == "batch"}

    async def send_batches() -> T:
        scheduler.clients = {role: CLIENTS[endpoint.api](endpoint, scheduler) for role, endpoint in endpoints.items()}
        progress = asyncio.create_task(_show_progress(terminal, scheduler, bool(limits.prices)))
        batch = first
        try:
            while True:
                batch = plan.send(await scheduler.outcomes(batch))
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            progress.cancel()
            await asyncio.wait([progress])
            for client in scheduler.clients.values():
                await client.connections.close()

    what = "sending no more requests, and waiting for the answers to those in flight"
    with catch_interrupts(terminal.say, what) as should_stop:
        scheduler.should_stop = should_stop
        try:
            result = asyncio.run(send_batches())
        except KeyboardInterrupt:
            raise Interrupted(
                "stopped at once; answers in flight are lost, every other answer is in the journal"
            ) from None
    return result, scheduler


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
