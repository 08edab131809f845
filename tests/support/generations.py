"""Recipes that ask the server of closed_teacher.py, and what they left."""

from __future__ import annotations

import json
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from rich.console import Console

from support import python
from support.closed_teacher import Closed
from tutelage.generation import GenerationResult, generate
from tutelage.progress import Terminal

TOPICS = ["bread", "rivers", "chess", "moss", "thunder", "glass", "bees", "tides", "copper", "maps"]


def prompts(folder: Path, count: int, first: int = 0) -> Path:
    """A file of prompts, no two of them near each other."""
    path = folder / f"prompts-{first}-{count}.jsonl"
    lines = (
        {"prompt": f"Tell me about {TOPICS[i % 10]} in the year {i}, as seen by {i * 7} people"}
        for i in range(first, first + count)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe(folder: Path, server: Closed, **more: Any) -> Path:
    """A recipe of ``generate``; ``endpoint`` and ``quality`` are added to, all else is taken as it is."""
    endpoint = {"url": server.url, "model": server.model, "timeout": 0.3, "max_retry_time": 2.0}
    section = {
        "kind": "answer",
        **more,
        "endpoint": {**endpoint, **more.get("endpoint", {})},
        "quality": {"dedup_threshold": None, **more.get("quality", {})},
    }
    path = folder / "closed.yaml"
    path.write_text(yaml.safe_dump({"generate": section}))
    return path


def made(path: Path, out: Path, *overrides: str) -> GenerationResult:
    """Carry a recipe out, in silence."""
    return generate(path, overrides, out=out, terminal=Terminal(Console(quiet=True), speaks=False))


def kept(out: Path) -> list[dict[str, Any]]:
    """The conversations."""
    if (out / "data" / "train.jsonl").exists():
        return [json.loads(line) for line in (out / "data" / "train.jsonl").read_text().splitlines()]
    return pq.read_table(out / "data" / "train.parquet").to_pylist()


def rejected(out: Path) -> list[dict[str, Any]]:
    """What was not kept."""
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def journal(out: Path) -> list[dict[str, Any]]:
    """The journal's calls in order, and its results: each answer with ``request`` and ``response``."""
    with closing(sqlite3.connect(out / "journal.sqlite")) as db:
        db.row_factory = sqlite3.Row
        calls = [dict(row) for row in db.execute("SELECT * FROM calls ORDER BY id")]
        results = {row["key"]: dict(row) for row in db.execute("SELECT * FROM results")}
    for call in calls:
        if call["outcome"] == "answer":
            result = results[call["key"]]
            call["request"], call["response"] = json.loads(result["request"]), json.loads(result["response"])
    return calls


def answered(out: Path) -> list[dict[str, Any]]:
    """The journal's calls that gave an answer."""
    return [call for call in journal(out) if call["outcome"] == "answer"]


def in_flight(calls: list[dict[str, Any]]) -> Iterator[str]:
    """Keys of requests whose last call has no outcome."""
    last = {call["key"]: call["outcome"] for call in calls}
    yield from (key for key, outcome in last.items() if outcome is None)


def command(path: Path, out: Path) -> list[str]:
    """The command line for :mod:`support.python`."""
    return ["-m", "tutelage", "generate", str(path), "--out", str(out)]


def calls_made(server: Closed, more_than: int, process: python.Popen) -> None:
    """Wait until the server was asked again."""
    until = time.monotonic() + 60
    while len(server.calls) <= more_than and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)


def killed(path: Path, out: Path, server: Closed, kills: int) -> tuple[Counter[str], int]:
    """Begin a generation so many times, and kill each at a random moment of its work.

    Returns:
        Prompts that were in flight at a kill and not answered in the journal, with how often; and how many processes
        had come to their end.

    Raises:
        AssertionError: an answer that was paid for is neither in the journal nor was it in flight.
    """
    dice, done = random.Random(1), 0
    lost: Counter[str] = Counter()
    for _ in range(kills):
        before = len(server.calls)
        process = python.Popen(command(path, out), stdout=python.DEVNULL, stderr=python.DEVNULL)
        calls_made(server, before, process)
        time.sleep(dice.uniform(0.0, 0.5))
        done += process.poll() is not None
        process.kill()
        process.wait()
        time.sleep(0.1)  # what was in flight arrives at the server, and nobody waits for it
        calls = journal(out)
        open_asks = set(in_flight(calls))
        asked = {c["key"]: c["request"]["messages"][-1]["content"] for c in calls if c["outcome"] == "answer"}
        flying = {call.prompt for call in server.calls} - set(asked.values())
        assert len(flying) <= len(open_asks) <= 8, "an answer that was paid for is nowhere"
        assert not asked.keys() & open_asks
        lost.update(flying)
    return lost, done
