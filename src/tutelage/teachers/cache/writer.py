"""Writes a cache in a background thread, with bounded memory."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.teachers.cache.columns import Array, Columns, concat_columns, nbytes
from tutelage.teachers.cache.files import write_shard
from tutelage.teachers.cache.layout import Layout

SHARD_BYTES = 2**25
"""A shard is written when it has this many bytes ..."""

SHARD_SECONDS = 20.0
"""... or this many seconds after its first row, so that a crash loses little."""

QUEUE_SIZE = 16
"""Batches that can wait for the writer; then :meth:`CacheWriter.put` blocks."""


class CacheWriter:
    """Takes columns batch by batch and writes shards in a background thread.

    An error in the thread is raised at the next call, so no row is lost silently.

    Args:
        folder: of the cache; its manifest exists.
        layout: of the cache.
        rank: of this process; it makes shard names of several processes different.
        shard_bytes: see :data:`SHARD_BYTES`.
        shard_seconds: see :data:`SHARD_SECONDS`.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        *,
        rank: int = 0,
        shard_bytes: int = SHARD_BYTES,
        shard_seconds: float = SHARD_SECONDS,
    ) -> None:
        self.folder, self.layout, self.rank = folder, layout, rank
        self.shard_bytes, self.shard_seconds = shard_bytes, shard_seconds
        self.queue: queue.Queue[Any] = queue.Queue(QUEUE_SIZE)
        self.error: BaseException | None = None
        self.started = time.time_ns()
        self.count = 0
        self.parts: list[tuple[dict[str, Array], Columns]] = []
        self.bytes, self.first = 0, 0.0
        self.thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)
        self.thread.start()

    def put(self, keys: dict[str, Array], columns: Columns) -> None:
        """Add rows; blocks while :data:`QUEUE_SIZE` batches wait.

        Raises:
            CacheError: the thread could not write, now or earlier.
        """
        self._send((keys, columns))

    def flush(self) -> None:
        """Wait until all rows are on disk, in complete shards."""
        done = threading.Event()
        self._send(done)
        while not done.wait(0.1):
            self._raise()
        self._raise()

    def close(self) -> None:
        """Flush and end the thread; the thread ends also on errors."""
        try:
            if self.error is None:
                self.flush()
        finally:
            if self.thread.is_alive():
                self.queue.put(None)
                self.thread.join()
        self._raise()

    def _send(self, item: Any) -> None:
        while True:
            self._raise()
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    # In the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            late = self.parts and time.monotonic() - self.first > self.shard_seconds
            try:
                item = self.queue.get(timeout=None if not self.parts else max(self.shard_seconds / 10, 0.01))
            except queue.Empty:
                item = threading.Event() if late else ()
            if item is None:
                return
            try:
                self._take(item)
            except BaseException as error:  # noqa: BLE001  # raised at the next call
                self.error = error
            if isinstance(item, threading.Event):
                item.set()

    def _take(self, item: Any) -> None:
        if self.error is not None or item == ():
            return
        if isinstance(item, threading.Event):
            self._write()
            return
        keys, columns = item
        if not self.parts:
            self.first = time.monotonic()
        self.parts.append((keys, columns))
        self.bytes += nbytes(columns) + 24 * len(keys["id"])
        if self.bytes >= self.shard_bytes or time.monotonic() - self.first > self.shard_seconds:
            self._write()

    def _write(self) -> None:
        if not self.parts:
            return
        parts, self.parts, self.bytes = self.parts, [], 0
        keys = {key: np.concatenate([k[key] for k, _ in parts]) for key in parts[0][0]}
        columns = concat_columns([c for _, c in parts])
        name = f"shard-{self.rank:03d}-{self.started:x}-{self.count:05d}"
        self.count += 1
        write_shard(self.folder, name, self.layout, keys, columns)
