"""The journal: every answer on disk before it counts, so that none is paid for twice.

A file of JSON lines that only grows. The first says what it is of; each of the others is one of::

    {"ask": KEY, "tokens": N, "cost": N}              before a request is sent: the most that it can cost
    {"key": KEY, "tokens": N, "cost": N, "request": {...}, "response": {...}}      an answer
    {"fail": KEY, "tokens": N, "cost": N, "reason": R, "detail": D}                a call that failed
    {"aside": KEY, "tokens": N, "cost": N, "reason": R, "detail": D}               a request that is set aside
    {"batch": NAME, "state": S, ...}                  a batch, and where it stands

An answer can have a ``slot`` (see requests.py); what is set aside with ``again`` is asked for by the next run. Costs
are whole numbers of 10^-12 of the currency. An ``ask`` that nothing settles was in flight when the process died: it
may have been answered and billed, so it counts in full.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from tutelage.errors import JournalError
from tutelage.files import try_lock, wrap_write_errors
from tutelage.generation.requests import ChatAnswer, FailedRequest, Outcome, Request, canonical

FORMAT = 1
GATHER = 0.01
"""Seconds that lines gather before one sync, since a sync for each would be the limit of all."""


class Usage:
    """What was spent: calls, tokens, and 10^-12 of the currency."""

    def __init__(self, requests: int = 0, tokens: int = 0, cost: int = 0) -> None:
        self.requests, self.tokens, self.cost = requests, tokens, cost


class Journal:
    """A journal, open for one writer.

    Args:
        path: the file; made if absent.
        made_of: what it is of. Another journal's is an error.

    Raises:
        JournalError: another process writes to it, it is of something else, or damaged.
        RunDirectoryError: it cannot be written.
    """

    def __init__(self, path: Path, made_of: Mapping[str, Any]) -> None:
        self.path = path
        self.places: dict[str, tuple[int, int]] = {}
        self.slots: dict[str, str] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.spent = Usage()
        self.lost = 0
        self.unsettled: dict[str, tuple[int, int]] = {}
        self._end = 0
        self._waiting: list[Callable[[], None]] = []
        self._committing: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "journal")
        self.failure: OSError | None = None
        with wrap_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        try:
            if not try_lock(self._file):
                raise JournalError(
                    "another process is writing to it", where=str(path), remedy="wait for it, or choose another --out"
                )
            self._read(made_of)
        except BaseException:
            os.close(self._file)
            raise

    # Reading ---------------------------------------------------------------------------------------------

    def _read(self, made_of: Mapping[str, Any]) -> None:
        header = {"journal": FORMAT, **made_of}
        open_asks: dict[str, tuple[int, int]] = {}
        end = 0
        with wrap_write_errors(self.path), open(self.path, "rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = from_json(raw)  # json takes thrice as long
                except ValueError:
                    if raw.endswith(b"\n") or (number == 1 and not (canonical(header) + b"\n").startswith(raw)):
                        raise self._damaged(number) from None
                    break  # a killed writer's last line, cut short
                if not isinstance(line, dict):
                    raise self._damaged(number)
                if number == 1:
                    self._check(line, header)
                else:
                    try:
                        self._take(line, end, len(raw), open_asks)
                    except (KeyError, TypeError, AttributeError):
                        raise self._damaged(number) from None
                end += len(raw)
                if not raw.endswith(b"\n"):
                    with wrap_write_errors(self.path):
                        os.write(self._file, b"\n")
                    end += 1
        for tokens, cost in open_asks.values():
            self._lose(tokens, cost)
        self.unsettled = open_asks
        with wrap_write_errors(self.path):
            os.ftruncate(self._file, end)
            self._end = end
            if end == 0:
                self._write(canonical(header) + b"\n")
                os.fsync(self._file)
                folder = os.open(self.path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)

    def _take(self, line: dict[str, Any], start: int, size: int, open_asks: dict[str, tuple[int, int]]) -> None:
        if "batch" in line:
            self.batches.setdefault(line["batch"], {}).update(line)
            return
        if (key := line.get("ask")) is not None:
            if key in open_asks:
                self._lose(*open_asks.pop(key))
            open_asks[key] = (line["tokens"], line["cost"])
            self.spent.requests += 1
            return
        key = line.get("key") or line.get("aside") or line["fail"]
        open_asks.pop(key, None)
        self.spent.tokens += line["tokens"]
        self.spent.cost += line["cost"]
        slot = line.get("slot")
        if "fail" not in line and not (line.get("again") and slot is None):
            self.places[key] = (start, size)
            if slot is not None:
                self.slots[slot] = key

    def _lose(self, tokens: int, cost: int) -> None:
        self.lost += 1
        self.spent.tokens += tokens
        self.spent.cost += cost

    def _damaged(self, number: int) -> JournalError:
        return JournalError(
            f"line {number} is damaged", where=str(self.path),
            remedy="restore the file, or delete that line: its answer is then paid for again",
        )  # fmt: skip

    def _check(self, line: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        if "journal" not in line:
            raise JournalError("is no journal of answers", where=str(self.path), remedy="choose another --out")
        differing = [k for k in header if line.get(k) != header[k]]
        if differing:
            shown = [f"{k} (then {line.get(k)}, now {header[k]})" for k in differing]
            raise JournalError(
                f"is of something else: {', '.join(shown)}", where=str(self.path),
                remedy="choose another --out, or the recipe that it is of",
            )  # fmt: skip

    def find(self, request: Request) -> Outcome | None:
        """What is known of a request."""
        key = request.key
        if key not in self.places and request.slot is not None:
            key = self.slots.get(request.slot, key)
        place = self.places.get(key)
        if place is None:
            return None
        line = json.loads(os.pread(self._file, place[1], place[0]))
        if "aside" in line:
            return FailedRequest(key, line["reason"], line.get("detail", ""))
        choice = line["response"]["choices"][0]
        return ChatAnswer(key, choice["message"]["content"], choice.get("finish_reason"))

    def request_of(self, key: str) -> dict[str, Any]:
        """The body of the request that was answered under ``key``."""
        start, size = self.places[key]
        found: dict[str, Any] = json.loads(os.pread(self._file, size, start)).get("request", {})
        return found

    # Writing ---------------------------------------------------------------------------------------------

    def _write(self, line: bytes) -> None:
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            os.ftruncate(self._file, self._end)  # half a line would damage what comes after it
            raise
        self._end += len(line)

    def ask(self, key: str, tokens: int, cost: int) -> None:
        """Write down that a request is about to be sent."""
        self.spent.requests += 1
        self.append(b'{"ask":"%b","tokens":%d,"cost":%d}\n' % (key.encode(), tokens, cost))

    def settle(
        self, kind: str, request: Request, tokens: int, cost: int, rest: bytes, done: Callable[[], None]
    ) -> None:
        """Write down what came of a request: ``done`` is called once it is on disk.

        Args:
            kind: ``key``, ``aside`` or ``fail``.
            request: what was asked.
            tokens: what it took.
            cost: what it cost.
            rest: further fields, as the end of a JSON object.
            done: called in the event loop.
        """
        self.spent.tokens += tokens
        self.spent.cost += cost
        slot = b"" if request.slot is None else b'"slot":%b,' % canonical(request.slot)
        fields = (kind.encode(), request.key.encode(), tokens, cost, slot, rest)
        start = self._end
        size = self.append(b'{"%b":"%b","tokens":%d,"cost":%d,%b%b\n' % fields, done)
        if kind != "fail":
            self.places[request.key] = (start, size)
            if request.slot is not None:
                self.slots[request.slot] = request.key

    def reopen(self, key: str) -> None:
        """A request that was in flight when a process died still is: it counts once it is settled."""
        tokens, cost = self.unsettled.pop(key)
        self.spent.tokens -= tokens
        self.spent.cost -= cost

    def note_batch(self, name: str, fields: Mapping[str, Any]) -> None:
        """Write down where a batch stands, and wait for the disk."""
        line = {"batch": name, **fields}
        self.batches.setdefault(name, {}).update(line)
        self.append(canonical(line) + b"\n")
        with wrap_write_errors(self.path):
            os.fsync(self._file)

    def append(self, line: bytes, done: Callable[[], None] | None = None) -> int:
        """Write a line now, sync it soon, then call ``done``; gives the line's size.

        Raises:
            RunDirectoryError: the disk refuses.
        """
        with wrap_write_errors(self.path):
            if self.failure is not None:
                raise self.failure
            try:
                self._write(line)
            except OSError as error:
                self.failure = error
                raise
        if done is not None:
            self._waiting.append(done)
            if self._committing is None:
                self._committing = asyncio.get_running_loop().create_task(self._commit())
        return len(line)

    async def _commit(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                await asyncio.sleep(GATHER)
                waiting, self._waiting = self._waiting, []
                await loop.run_in_executor(self._thread, os.fdatasync, self._file)
                for done in waiting:
                    done()
        except OSError as error:
            self.failure = error
        finally:
            self._committing = None

    async def flushed(self) -> None:
        """Wait until all is on disk.

        Raises:
            RunDirectoryError: the disk refuses.
        """
        while self._committing is not None:
            await asyncio.wait([self._committing])
        if self.failure is not None:
            with wrap_write_errors(self.path):
                raise self.failure

    def close(self) -> None:
        """Sync, and let others write."""
        try:
            with wrap_write_errors(self.path):
                os.fsync(self._file)
        finally:
            self._thread.shutdown()
            os.close(self._file)
