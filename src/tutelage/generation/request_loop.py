"""Waves of requests carried through the desk, over a journal in a folder of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tutelage.config import BudgetConfig, EndpointConfig
from tutelage.errors import Interrupted, JournalError, RunDirectoryError
from tutelage.files import wrap_write_errors
from tutelage.generation.answers import RequestPlan
from tutelage.generation.batch_api import BatchClient
from tutelage.generation.budget import UNIT, Budget
from tutelage.generation.client import ChatClient
from tutelage.generation.journal import Journal
from tutelage.generation.progress import ProgressLine, shown
from tutelage.generation.scheduler import RequestBatch, RequestClient, Scheduler
from tutelage.progress import Terminal
from tutelage.signals import stopping

APIS: dict[str, Callable[..., RequestClient]] = {"batch": BatchClient, "live": ChatClient}
"""How an endpoint is asked."""

T = TypeVar("T")


def opened(path: Path, made_of: Mapping[str, Any]) -> Journal:
    """The journal of a folder, which is made if it is not there.

    Raises:
        RunDirectoryError: the folder is a file, or cannot be written.
        JournalError: it holds something else, another journal, or one that another process writes to.
    """
    with wrap_write_errors(path):
        if path.exists() and not path.is_dir():
            raise RunDirectoryError("is a file", where=str(path), remedy="choose another --out")
        others = [p.name for p in path.iterdir()] if path.is_dir() else []
    if others and "journal.jsonl" not in others:
        raise JournalError(
            "is not empty, and holds no journal of answers", where=str(path),
            remedy="choose an empty or new folder as --out",
        )  # fmt: skip
    return Journal(path / "journal.jsonl", made_of)


def carry_out(
    steps: RequestPlan[T],
    first: RequestBatch | None,
    journal: Journal,
    asked: Mapping[str, EndpointConfig],
    limits: BudgetConfig,
    terminal: Terminal,
) -> tuple[T, Scheduler]:
    """Ask wave after wave until there is a result.

    Args:
        steps: give waves, are sent their outcomes, and end with the result.
        first: the wave that they gave already.
        journal: what was answered.
        asked: endpoints by the names that requests have for them.
        limits: what may be spent.
        terminal: where progress is shown.

    Returns:
        The result, and the desk, which knows whether the budget was the end.

    Raises:
        Interrupted: a person asked to stop.
        TutelageError: as :meth:`Scheduler.ask`.
    """
    desk = Scheduler(journal, Budget(limits, journal.spent), lambda: False)
    with stopping(terminal.say, "asking no more, and waiting for what is in flight") as stop:
        desk.stop = stop
        try:
            return asyncio.run(_all_waves(steps, first, desk, asked, bool(limits.prices), terminal)), desk
        except KeyboardInterrupt:
            raise Interrupted(
                "stopped at once; what was in flight is lost, every other answer is in the journal"
            ) from None


async def _all_waves(
    steps: RequestPlan[T], wave: RequestBatch | None, desk: Scheduler, asked: Mapping[str, EndpointConfig],
    priced: bool,
    terminal: Terminal,
) -> T:  # fmt: skip
    desk.batch = {to for to, endpoint in asked.items() if endpoint.api == "batch"}
    desk.endpoints = {to: APIS[endpoint.api](endpoint, desk) for to, endpoint in asked.items()}
    try:
        async with shown(terminal, ProgressLine(desk, priced)):
            while True:
                outcomes = [] if wave is None else await desk.ask(wave)
                try:
                    wave = steps.send(outcomes)
                except StopIteration as end:
                    result: T = end.value
                    return result
    finally:
        for endpoint in desk.endpoints.values():
            await endpoint.close()


def spent_of(journal: Journal, limits: BudgetConfig) -> dict[str, Any]:
    """What was spent, over all runs with a journal, as ``summary.json`` has it."""
    spent = journal.spent
    priced = {"cost": spent.cost / UNIT} if limits.prices else {}
    return {"requests": spent.requests, "tokens": spent.tokens, **priced, "in_flight_when_killed": journal.lost}
