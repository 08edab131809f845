"""Writes a cache in a background thread, with bounded memory."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock, Timer

import numpy as np

from tutelage.teachers.cache.columns import Array, Columns, concat_columns, nbytes
from tutelage.teachers.cache.files import write_shard
from tutelage.teachers.cache.layout import Layout

SHARD_BYTES = 2**25
"""A shard is written when it has this many bytes ..."""

SHARD_SECONDS = 20.0
"""... or this many seconds after its first row, so that a crash loses little."""


class CacheWriter:
    """Takes columns batch by batch and writes shards in a background thread.

    Every later call raises an error of the thread, so no row is lost silently. At most two shards are in
    memory: one is written while the next one is filled. The folder has a manifest. The rank of this process makes
    shard names of several processes different.
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
        self.parts: list[tuple[dict[str, Array], Columns]] = []
        self.bytes, self.started, self.count = 0, time.time_ns(), 0
        self._lock = Lock()  # the timer's thread writes shards too
        self._timer: Timer | None = None
        self._thread = ThreadPoolExecutor(1, "cache-writer")
        self._write: Future[None] | None = None

    def put(self, keys: dict[str, Array], columns: Columns) -> None:
        """Add rows; blocks while the previous shard is not written; raises :class:`CacheError` of the thread."""
        with self._lock:
            if self._write is not None and self._write.done():
                self._write.result()
            if not self.parts:
                self._timer = Timer(self.shard_seconds, self._write_when_due)
                self._timer.daemon = True
                self._timer.start()
            self.parts.append((keys, columns))
            self.bytes += nbytes(columns) + 24 * len(keys["id"])
            if self.bytes >= self.shard_bytes:
                self._start_write()

    def flush(self) -> None:
        """Wait until all rows are on disk, in complete shards."""
        with self._lock:
            if self.parts:
                self._start_write()
            if self._write is not None:
                self._write.result()

    def close(self) -> None:
        """Flush and end the threads; they end also on errors."""
        try:
            self.flush()
        finally:
            if self._timer is not None:
                self._timer.cancel()
                self._timer.join()
            self._thread.shutdown()

    def _write_when_due(self) -> None:
        with self._lock, suppress(Exception):  # an error of the previous shard, which the next call raises
            if self.parts:
                self._start_write()

    def _start_write(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._write is not None:
            self._write.result()
        parts, self.parts, self.bytes = self.parts, [], 0
        self._write = self._thread.submit(self._write_shard, parts)

    def _write_shard(self, parts: list[tuple[dict[str, Array], Columns]]) -> None:
        keys = {key: np.concatenate([k[key] for k, _ in parts]) for key in parts[0][0]}
        name = f"shard-{self.rank:03d}-{self.started:x}-{self.count:05d}"
        self.count += 1
        write_shard(self.folder, name, self.layout, keys, concat_columns([c for _, c in parts]))
