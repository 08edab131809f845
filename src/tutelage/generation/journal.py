"""The journal: an SQLite database of every call and answer, so that no answer is paid for twice.

``calls`` has a row for each call: first with its maximum cost, later with its outcome and real cost. A call without
outcome was in flight when a process died. The server may have answered and billed it, so its maximum cost counts.
``results`` has the final result of each request, and ``batches`` the state of each batch. Costs are integers in units
of 10^-12 of the currency.
"""

import asyncio
import errno
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.errors import JournalError
from tutelage.files import wrap_write_errors
from tutelage.generation.requests import ChatAnswer, FailedRequest, Outcome, Request, canonical_json

FILE = "journal.sqlite"
FORMAT = 2
SYNC_INTERVAL = 0.01
"""Seconds between two syncs to disk: one sync covers all rows that were written since the last one."""

SCHEMA = f"""
BEGIN;
CREATE TABLE header (made_of TEXT NOT NULL);
CREATE TABLE calls (id INTEGER PRIMARY KEY, key TEXT NOT NULL, tokens INTEGER NOT NULL, cost INTEGER NOT NULL,
                    outcome TEXT, reason TEXT, detail TEXT);
CREATE TABLE results (key TEXT PRIMARY KEY, slot TEXT, request TEXT, response TEXT, reason TEXT, detail TEXT,
                      retry INTEGER NOT NULL);
CREATE INDEX results_by_slot ON results (slot) WHERE slot IS NOT NULL;
CREATE TABLE batches (name TEXT PRIMARY KEY, state TEXT NOT NULL);
PRAGMA user_version = {FORMAT};
"""
"""``outcome`` is ``answer``, ``failed`` (another call follows) or ``given up``."""

_ERRNO = {
    sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES, sqlite3.SQLITE_IOERR: errno.EIO,
}  # fmt: skip


@contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    """Convert errors of SQLite to :class:`JournalError` or :class:`RunDirectoryError`."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _ERRNO:
            with wrap_write_errors(path):
                raise OSError(_ERRNO[code], os.strerror(_ERRNO[code])) from error
        what, remedy = f"the journal is damaged: {error}", "restore the file, or choose another --out"
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            what, remedy = "another process is writing to it", "wait for it, or choose another --out"
        raise JournalError(what, where=str(path), remedy=remedy) from None


@dataclass
class Usage:
    """Calls, tokens, and cost in 10^-12 of the currency, over all runs of a journal."""

    requests: int
    tokens: int
    cost: int


class Journal:
    """A journal, open for one process.

    Attributes:
        unsettled: calls without outcome: for each key the row, and the maximum of tokens and cost.
        lost: number of calls that were in flight when a process died.
        failure: the error that stopped the journal.

    Raises:
        JournalError: another process writes to it, ``made_of`` describes another generation, or it is damaged.
        RunDirectoryError: it cannot be written.
    """

    def __init__(self, path: Path, made_of: Mapping[str, Any]) -> None:
        self.path = path
        self.failure: Exception | None = None
        self._calls: dict[str, int] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._syncing: asyncio.Task[None] | None = None
        with wrap_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _sqlite_errors(path):
            self._db = sqlite3.connect(path, timeout=0)
            try:
                self._open({"journal": FORMAT, **made_of})
                with wrap_write_errors(path):
                    self._log = os.open(f"{path}-wal", os.O_RDONLY)
            except BaseException:
                self._db.close()
                raise

    def _open(self, header: Mapping[str, Any]) -> None:
        db = self._db
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA wal_autocheckpoint = 10000")
        if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("a page is malformed")
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            db.executescript(SCHEMA)
            db.execute("INSERT INTO header VALUES (?)", (json.dumps(header),))
        if db.execute("PRAGMA user_version").fetchone()[0] != FORMAT:
            raise JournalError(
                "the file is not a journal of answers", where=str(self.path), remedy="choose another --out"
            )
        before = json.loads(db.execute("SELECT made_of FROM header").fetchone()[0])
        different = [f"{k} (then {before.get(k)}, now {header[k]})" for k in header if before.get(k) != header[k]]
        if different:
            raise JournalError(
                f"the journal was written with other settings: {', '.join(different)}", where=str(self.path),
                remedy="choose another --out, or use the recipe that wrote the journal",
            )  # fmt: skip
        db.execute("DELETE FROM results WHERE retry AND slot IS NULL")
        db.execute("UPDATE header SET made_of = made_of")  # so that this commit syncs the new log and its folder
        db.commit()
        db.execute("PRAGMA synchronous = NORMAL")  # commits do not sync; _sync does, for many answers at once
        totals = db.execute("SELECT count(*), coalesce(sum(tokens), 0), coalesce(sum(cost), 0) FROM calls")
        self.usage = Usage(*totals.fetchone())
        rows = db.execute("SELECT key, id, tokens, cost FROM calls WHERE outcome IS NULL").fetchall()
        self.lost = len(rows)
        self.unsettled: dict[str, tuple[int, int, int]] = {key: tuple(rest) for key, *rest in rows}
        self.batches: dict[str, dict[str, Any]] = {
            name: json.loads(state) for name, state in db.execute("SELECT name, state FROM batches ORDER BY rowid")
        }

    def find(self, request: Request) -> Outcome | None:
        """The outcome of a request, by its key or else by its slot."""
        query = "SELECT key, response, reason, detail FROM results WHERE"
        with _sqlite_errors(self.path):
            row = self._db.execute(f"{query} key = ?", (request.key,)).fetchone()
            if row is None and request.slot is not None:
                row = self._db.execute(f"{query} slot = ? ORDER BY rowid DESC", (request.slot,)).fetchone()
        if row is None:
            return None
        key, response, reason, detail = row
        if response is None:
            return FailedRequest(key, reason, detail)
        choice = json.loads(response)["choices"][0]
        return ChatAnswer(key, choice["message"]["content"], choice.get("finish_reason"))

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """Write rows. After one error every further call raises it."""
        if self.failure is not None:
            raise self.failure
        try:
            with _sqlite_errors(self.path):
                yield self._db
        except Exception as error:
            self.failure = error
            raise

    def begin_call(self, key: str, tokens: int, cost: int) -> None:
        """Record a call before it is made, with its maximum of tokens and cost. Commits all rows written so far."""
        self.usage.requests += 1
        with self._write() as db:
            added = db.execute("INSERT INTO calls (key, tokens, cost) VALUES (?, ?, ?)", (key, tokens, cost))
            self._calls[key] = added.lastrowid or 0
            db.commit()

    def resume_call(self, key: str) -> None:
        """Continue a call that was in flight when a process died; its real cost will count, not the maximum."""
        self._calls[key], tokens, cost = self.unsettled.pop(key)
        self.usage.tokens -= tokens
        self.usage.cost -= cost

    def end_call(
        self, request: Request, tokens: int, cost: int, done: Callable[[], None], *, response: bytes | None = None,
        reason: str = "", detail: str = "", final: bool = True, retry: bool = False,
    ) -> None:  # fmt: skip
        """Record the outcome of a call: a ``response`` with an answer, or a ``reason`` and ``detail``.

        Args:
            done: called in the event loop once the outcome is on disk.
            final: whether this is the result of the request; otherwise another call follows.
            retry: whether the next run sends the request again.
        """
        self.usage.tokens += tokens
        self.usage.cost += cost
        outcome = "answer" if response is not None else "given up" if final else "failed"
        key = request.key
        with self._write() as db:
            if final:
                text = None if response is None else response.decode()
                row = (key, request.slot, request.body.decode(), text, reason, detail, retry)
                db.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            db.execute(
                "UPDATE calls SET tokens = ?, cost = ?, outcome = ?, reason = ?, detail = ? WHERE id = ?",
                (tokens, cost, outcome, reason, detail, self._calls.pop(key)),
            )
        self._callbacks.append(done)
        if self._syncing is None:
            self._syncing = asyncio.get_running_loop().create_task(self._sync())

    def note_batch(self, name: str, fields: Mapping[str, Any]) -> None:
        """Record the state of a batch, and wait until it is on disk."""
        state = self.batches.setdefault(name, {})
        state.update(fields)
        with self._write() as db:
            row = (name, canonical_json(state).decode())
            db.execute("INSERT INTO batches VALUES (?, ?) ON CONFLICT DO UPDATE SET state = excluded.state", row)
            db.commit()
            with wrap_write_errors(self.path):
                os.fdatasync(self._log)

    async def _sync(self) -> None:
        """Commit the rows written so far, sync the write-ahead log, then call the callbacks of these rows."""
        try:
            while self._callbacks:
                await asyncio.sleep(SYNC_INTERVAL)
                callbacks, self._callbacks = self._callbacks, []
                with self._write() as db:
                    db.commit()
                    with wrap_write_errors(self.path):
                        await asyncio.to_thread(os.fdatasync, self._log)
                for done in callbacks:
                    done()
        except Exception as error:  # noqa: BLE001  (``flush`` raises it)
            self.failure = self.failure or error
        finally:
            self._syncing = None

    async def flush(self) -> None:
        """Wait until all rows are on disk; raises :class:`RunDirectoryError` if they cannot be written."""
        while self._syncing is not None:
            await asyncio.wait([self._syncing])
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Write all rows to disk and release the lock."""
        os.close(self._log)
        try:
            with _sqlite_errors(self.path):
                self._db.commit()
        finally:
            self._db.close()
