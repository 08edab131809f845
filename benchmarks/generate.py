"""How fast a closed teacher is asked, and what comes through faults and kills.

    python benchmarks/generate.py throughput  # a server that answers in 50 ms, 64 in flight: ours, bare loops, openai
    python benchmarks/generate.py journal     # opening one of 100,000 rows
    python benchmarks/generate.py duplicates  # 50,000 instructions, each against all kept before
    python benchmarks/generate.py faults      # 2,000 requests, 30 % of calls go wrong in ten ways
    python benchmarks/generate.py kills       # 2,000 requests, SIGKILL at 50 random moments
    python benchmarks/generate.py money       # max_cost with 64 in flight, against the server's books

Each prints its figures and puts them into ``results/generate.json``. The last three ask the tests' server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from rich.console import Console

from tutelage.config import EndpointConfig, SamplingConfig
from tutelage.errors import BudgetSpent
from tutelage.generation import client, generate
from tutelage.generation.duplicates import NearDuplicateIndex
from tutelage.generation.journal import FILE, Journal
from tutelage.generation.prompts import read_tasks
from tutelage.generation.requests import Request, RequestParameters
from tutelage.progress import Terminal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
RESULTS = Path("results/generate.json")

# Throughput ----------------------------------------------------------------------------------------------------

FLYING = 64
DELAY = 0.05
ANSWER = "Its lamp turns behind a lens, and the beam is seen for miles, so that ships know where the rocks are. " * 3
REPLY = json.dumps({
    "id": "x", "object": "chat.completion", "created": 0, "model": "stub",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 40, "completion_tokens": 66, "total_tokens": 106},
}).encode()  # fmt: skip
FULL = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(REPLY), REPLY)


class Stub(asyncio.Protocol):
    """Answers every call in 50 ms, and can say when the first came and the last was answered."""

    first: float | None = None
    last = 0.0
    count = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.rest = transport, b""

    def data_received(self, data: bytes) -> None:
        """Answer the request once it is whole."""
        self.rest += data
        head, mark, body = self.rest.partition(b"\r\n\r\n")
        if not mark:
            return
        size = next((int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), 0)
        if len(body) < size:
            return
        self.rest = body[size:]
        loop = asyncio.get_running_loop()
        if head.startswith(b"GET /times"):
            found = json.dumps([Stub.first, Stub.last, Stub.count]).encode()
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(found), found))
            Stub.first, Stub.count = None, 0
            return
        if Stub.first is None:
            Stub.first = time.monotonic()
        loop.call_later(DELAY, self.answer)

    def answer(self) -> None:
        """Send it."""
        Stub.last = time.monotonic()
        Stub.count += 1
        self.transport.write(FULL)


async def serve() -> None:
    """The stub as a process of its own, which prints its port."""
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def bodies(count: int, turn: str) -> list[str]:
    """Prompts, of about 30 words."""
    return [f"Tell me about number {i} of {turn}, " + "and what it means to those who live by the sea " * 2
            for i in range(count)]  # fmt: skip


async def flights(count: int, send: Callable[[int], Awaitable[object]]) -> None:
    """All of them, 64 at a time."""
    left = iter(range(count))

    async def worker() -> None:
        for i in left:
            await send(i)

    await asyncio.gather(*(worker() for _ in range(FLYING)))


def body_of(prompt: str) -> dict[str, Any]:
    """What all of them send."""
    messages = [{"role": "user", "content": prompt}]
    return {"model": "stub", "temperature": 0.7, "max_tokens": 512, "messages": messages}


def bare(url: str, turn: str, count: int) -> None:
    """A loop over httpx2's client, which reads each answer's text and keeps it in a list."""
    import httpx2

    asked, kept = bodies(count, turn), []

    async def run() -> None:
        limits = httpx2.Limits(max_connections=FLYING, max_keepalive_connections=FLYING)
        async with httpx2.AsyncClient(limits=limits, timeout=60) as client:

            async def send(i: int) -> None:
                reply = await client.post(f"{url}/chat/completions", json=body_of(asked[i]))
                kept.append(reply.json()["choices"][0]["message"]["content"])

            await flights(count, send)

    asyncio.run(run())
    assert len(kept) == count


def openai(url: str, turn: str, count: int) -> None:
    """The same with the openai package."""
    from openai import AsyncOpenAI

    asked, kept = bodies(count, turn), []

    async def run() -> None:
        async with AsyncOpenAI(base_url=url, api_key="none") as client:

            async def send(i: int) -> None:
                reply = await client.chat.completions.create(**body_of(asked[i]))
                kept.append(reply.choices[0].message.content)

            await flights(count, send)

    asyncio.run(run())
    assert len(kept) == count


def ours(url: str, turn: str, count: int) -> None:
    """`tutelage generate`, with its journal, its budget and its sync of every answer."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder, "prompts.jsonl")
        given.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in bodies(count, turn)))
        recipe = Path(folder, "stub.yaml")
        section = {
            "kind": "answer", "prompts": str(given), "format": "jsonl",
            "endpoint": {"url": url, "model": "stub", "concurrency": FLYING},
            "budget": {"max_cost": 100.0, "prices": {"stub": {"input": 1.0, "output": 2.0}}},
            "quality": {"dedup_threshold": None},
        }  # fmt: skip
        recipe.write_text(yaml.safe_dump({"generate": section}))
        made = generate(recipe, out=Path(folder, "out"), terminal=_silent())
        assert made.summary["kept"] == count


def _silent() -> Terminal:
    return Terminal(Console(quiet=True), speaks=False)


def throughput(rounds: int) -> dict[str, Any]:
    """Calls a second by the server's own clock, from the first call to the last answer, in turn."""
    import httpx2

    count = 4_000
    process = subprocess.Popen([sys.executable, __file__, "serve"], stdout=subprocess.PIPE, text=True)
    rates: dict[str, list[float]] = {"ours": [], "bare httpx2": [], "openai": []}
    core: dict[str, list[float]] = {name: [] for name in rates}
    loops = {"ours": ours, "bare httpx2": bare, "openai": openai}
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        for i in range(rounds):
            for name, run in loops.items():
                busy = time.process_time()
                run(f"{url}/v1", f"{name} {i}", count)
                core[name].append((time.process_time() - busy) / count * 1e3)
                first, last, answered = httpx2.get(f"{url}/times").json()
                assert answered == count
                rates[name].append(count / (last - first))
                print(i, name, round(rates[name][-1]), round(core[name][-1], 3), flush=True)
    finally:
        process.kill()
        process.wait()
    middle = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    ratios = sorted(a / b for a, b in zip(rates["ours"], rates["bare httpx2"], strict=True))
    return {
        "requests": count, "in_flight": FLYING, "seconds_of_an_answer": DELAY, "most_possible": FLYING / DELAY,
        "core_milliseconds_of_a_request": {n: round(statistics.median(values), 3) for n, values in core.items()},
        "requests_per_second": middle, "all": {n: [round(v, 1) for v in values] for n, values in rates.items()},
        "ours_of_bare": round(statistics.median(ratios), 3), "ours_of_bare_all": [round(r, 3) for r in ratios],
    }  # fmt: skip


class Clock:
    """Seconds by the clock on the wall, and of this process on a core, which others on the machine do not change."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.core: list[float] = []

    def __enter__(self) -> None:
        self._start = (time.perf_counter(), time.process_time())

    def __exit__(self, *_: object) -> None:
        self.wall.append(time.perf_counter() - self._start[0])
        self.core.append(time.process_time() - self._start[1])

    def figures(self) -> dict[str, Any]:
        """Medians, and all."""
        return {
            "seconds": round(statistics.median(self.wall), 3), "core_seconds": round(statistics.median(self.core), 3),
            "all_seconds": [round(s, 3) for s in self.wall],
        }  # fmt: skip


# Journal -------------------------------------------------------------------------------------------------------


def journal(rounds: int) -> dict[str, Any]:
    """Seconds to open a journal of 100,000 rows, calls and their answers, and to find every answer in it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, FILE)
        parameters = RequestParameters(EndpointConfig(url="http://x/v1", model="stub"), SamplingConfig())
        asked = [Request(parameters, [{"role": "user", "content": text}]) for text in bodies(50_000, "the journal")]
        Journal(path, {"recipe": "r"}).close()
        with closing(sqlite3.connect(path)) as db, db:
            for request in asked:
                db.execute("INSERT INTO calls VALUES (NULL, ?, 106, 0, 'answer', '', '')", (request.key,))
                row = (request.key, request.body.decode(), REPLY.decode())
                db.execute("INSERT INTO results VALUES (?, NULL, ?, ?, '', '', 0)", row)
        opened, found = Clock(), Clock()
        for _ in range(rounds):
            with opened:
                book = Journal(path, {"recipe": "r"})
            assert book.usage.requests == 50_000
            with found:
                assert all(book.find(request) for request in asked)
            book.close()
        return {
            "rows": 100_000, "bytes": path.stat().st_size,
            "to_open": opened.figures(), "to_find_all": found.figures(),
        }  # fmt: skip


# Duplicates ----------------------------------------------------------------------------------------------------


def instructions(count: int) -> list[str]:
    """Instructions that share verbs and frames as real ones do, a fifth of them near to one before.

    Frames are our seeds'; a third of the words are others, drawn by Zipf's law from 30,000.
    """
    dice = random.Random(0)
    seeds = [task.split() for task in read_tasks(None)]
    pool = [f"w{i}" for i in range(30_000)]
    weights = [1 / (i + 10) for i in range(len(pool))]
    drawn = iter(dice.choices(pool, weights, k=60 * count))
    made: list[list[str]] = []
    for i in range(count):
        if i and dice.random() < 0.2:
            text = list(dice.choice(made[-2_000:]))
            text[dice.randrange(len(text))] = next(drawn)
        else:
            frame = dice.choice(seeds)
            text = [next(drawn) if dice.random() < 0.33 else word for word in frame[: dice.randint(6, 40)]]
        made.append(text)
    return [" ".join(text) for text in made]


def duplicates() -> dict[str, Any]:
    """Seconds to judge 50,000 instructions one after the other at ROUGE-L 0.7, and at 1."""
    texts = instructions(50_000)
    found: dict[str, Any] = {"instructions": len(texts), "words": sum(len(t.split()) for t in texts) / len(texts)}
    for threshold in (0.7, 1.0):
        near, clock = NearDuplicateIndex(threshold), Clock()
        with clock:
            rejected = sum(near.add_if_new(text) is not None for text in texts)
        found[f"rouge_l {threshold:g}"] = {**clock.figures(), "rejected": rejected}
        print(threshold, found[f"rouge_l {threshold:g}"], flush=True)
    return found


# Faults and kills ------------------------------------------------------------------------------------------------


def faults() -> dict[str, Any]:
    """2,000 requests, of whose calls 30 % go wrong."""
    from support.closed_teacher import FAULTS, Closed
    from support.generations import kept, made, prompts, recipe, rejected

    with (
        tempfile.TemporaryDirectory() as name,
        Closed(rate=0.3, slow=1.0) as server,
        patch.object(client, "FIRST_WAIT", 0.05),
    ):
        folder = Path(name)
        path = recipe(
            folder, server, prompts=str(prompts(folder, 2_000)), endpoint={"concurrency": 64, "timeout": 0.5},
            budget={"max_requests": 3_200},
        )  # fmt: skip
        start = time.perf_counter()
        found = made(path, folder / "out")
        seconds = time.perf_counter() - start
        names = [row["messages"][0]["content"] for row in [*kept(folder / "out"), *rejected(folder / "out")]]
        kinds = Counter(call.kind for call in server.calls)
    calls = sum(kinds.values())
    return {
        "prompts": 2_000, "calls": calls, "kept": found.summary["kept"], "set_aside": found.summary["rejected"],
        "each_once": len(names) == len(set(names)) == 2_000,
        "calls_per_kept": round(calls / found.summary["kept"], 3),
        "budget": 3_200, "faults": {kind: kinds[kind] for kind in FAULTS}, "seconds": round(seconds, 1),
    }  # fmt: skip


def kills() -> dict[str, Any]:
    """2,000 requests, and 50 processes that ask them, each killed."""
    from support import python
    from support.closed_teacher import Closed
    from support.generations import command, killed, made, prompts, recipe

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = str(prompts(folder, 2_000))
        with Closed(delay=0.05) as server:
            path = recipe(folder, server, prompts=given, endpoint={"concurrency": 8, "timeout": 5})
            lost, done = killed(path, folder / "out", server, 50)
            before = len(server.calls)
            assert python.run(command(path, folder / "out")).returncode == 0
            times = Counter(call.prompt for call in server.calls)
        with Closed() as other:
            made(recipe(folder, other, prompts=given), folder / "whole")
        same = all(
            (folder / "out" / file).read_bytes() == (folder / "whole" / file).read_bytes()
            for file in ("data/train.parquet", "rejected.jsonl", "README.md")
        )
    return {
        "prompts": len(times), "kills": 50, "ended_before_the_kill": done, "calls_before_the_last_run": before,
        "calls": sum(times.values()), "asked_twice": sum(n > 1 for n in times.values()),
        "asked_twice_without_having_been_in_flight": sum(n > 1 + lost[p] for p, n in times.items()),
        "same_output_as_without_kills": same,
    }  # fmt: skip


def money() -> dict[str, Any]:
    """What was spent of max_cost, by the server's books, with 64 in flight and with faults."""
    from support.closed_teacher import Closed
    from support.generations import made, prompts, recipe

    found: dict[str, Any] = {"max_cost": 0.2}
    for rate in (0.0, 0.3):
        with tempfile.TemporaryDirectory() as name, Closed(rate=rate, slow=1.0, delay=0.02) as server:
            folder = Path(name)
            path = recipe(
                folder, server, prompts=str(prompts(folder, 2_000)), sampling={"max_tokens": 40},
                endpoint={"concurrency": 64, "timeout": 0.5},
                budget={"max_cost": 0.2, "prices": {"closed": {"input": 3.0, "output": 15.0}}},
            )  # fmt: skip
            try:
                made(path, folder / "out")
            except BudgetSpent as end:
                print(end)
            tokens_in, tokens_out = server.billed
            found[f"faults {rate:g}"] = {
                "spent_by_the_server's_books": round((3 * tokens_in + 15 * tokens_out) / 1e6, 6),
                "spent_by_ours": json.loads((folder / "out/summary.json").read_text())["spent"]["cost"],
                "calls": len(server.calls), "most_in_flight": max(call.flying for call in server.calls),
            }  # fmt: skip
    return found


def main() -> None:
    """Run what is asked for and keep its figures."""
    runs: dict[str, Callable[[int], dict[str, Any]]] = {
        "throughput": throughput, "journal": journal, "duplicates": lambda _: duplicates(),
        "faults": lambda _: faults(), "kills": lambda _: kills(), "money": lambda _: money(),
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*runs, "serve"), nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.what == ["serve"]:
        asyncio.run(serve())
        return
    for what in args.what:
        found = runs[what](args.rounds)
        print(json.dumps(found, indent=1), flush=True)
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**known, what: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
