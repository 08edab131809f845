"""Reads a cache, memory-mapped, by (sample id, view seed) in any order."""

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from tutelage.errors import CacheError
from tutelage.teachers.cache.columns import Array, Columns, Ragged, concat_columns, hash_keys, take_ragged, take_rows
from tutelage.teachers.cache.files import ShardData, check_shard, complete_shards, open_shard, read_manifest


class CacheReader:
    """The complete shards of a cache.

    A cache that fits into memory stays in the page cache after it is verified. From a larger one only the rows that
    are needed are read, and :meth:`prefetch` starts to read rows early. ``verify`` compares every shard with its
    SHA-256 first, which reads it once. Raises :class:`CacheError` if there is no cache, or it is damaged.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder, self.verify = folder, verify
        self.layout, self.made_from = read_manifest(folder)
        self.by_path: dict[Path, ShardData] = {}
        self.shards: list[ShardData] = []
        self.duplicates = 0
        self.scattered = False
        self._hashes, self._which, self._rows = (np.empty(0, kind) for kind in (np.uint64, np.int32, np.int64))
        self.refresh()

    def __len__(self) -> int:
        return len(self._hashes)

    def refresh(self) -> bool:
        """Open shards that were completed since the last call; returns whether there are any."""
        shards = complete_shards(self.folder)
        new = [shard for shard in shards if shard.path not in self.by_path]
        self.scattered = self.scattered or sum(shard.size for shard in shards) > memory_for_cache()
        for shard in new:
            if self.verify:
                check_shard(shard)
            data = self.by_path[shard.path] = open_shard(shard, self.layout)
            if self.scattered:
                data.mapped.madvise(mmap.MADV_RANDOM)  # otherwise the system reads 128 KiB around every row
            elif not self.verify:
                data.mapped.madvise(mmap.MADV_WILLNEED)
        if new:
            self._build()
        return bool(new)

    def _build(self) -> None:
        self.shards = list(self.by_path.values())
        ids, views = (np.concatenate([s.keys[key] for s in self.shards]) for key in ("id", "view"))
        sizes = [len(s.keys["id"]) for s in self.shards]
        which = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        rows, hashes = np.concatenate(list(map(np.arange, sizes))), hash_keys(ids, views)
        order = np.argsort(hashes, kind="stable")
        ids, views, hashes, which, rows = (x[order] for x in (ids, views, hashes, which, rows))
        again = hashes[1:] == hashes[:-1]
        collisions = np.flatnonzero(again & ((ids[1:] != ids[:-1]) | (views[1:] != views[:-1])))
        if len(collisions):
            i = collisions[0]
            raise CacheError(
                f"sample {ids[i]}, view seed {views[i]}, and sample {ids[i + 1]}, view seed {views[i + 1]}, have the "
                "same hash",
                where=str(self.folder),
                remedy="give one of the samples another id",
            )
        self.duplicates = int(again.sum())
        first = np.append(True, ~again)
        self._hashes, self._which, self._rows = hashes[first], which[first], rows[first]

    def find(self, ids: Array, views: Array) -> Array:
        """Positions ``[B]`` for :meth:`rows`; -1 for rows that the cache does not have."""
        hashes, keys = self._hashes, hash_keys(ids, views)
        if not len(hashes):
            return np.full(len(ids), -1)
        at = np.minimum(np.searchsorted(hashes, keys), len(hashes) - 1)
        out: Array = np.where(hashes[at] == keys, at, -1)
        return out

    def prefetch(self, positions: Array) -> None:
        """Let the system start to read rows that are needed next; returns at once."""
        if not self.scattered:
            return
        which, rows = self._which[positions], self._rows[positions]
        for number in np.unique(which).tolist():
            shard = self.shards[number]
            for start, length in _spans(shard, np.sort(rows[which == number])):
                shard.mapped.madvise(mmap.MADV_WILLNEED, start, length)

    def rows(self, positions: Array) -> tuple[dict[str, Array], Columns]:
        """Keys and columns of rows, in the order of ``positions``."""
        which, rows = self._which[positions], self._rows[positions]
        order = np.argsort(which, kind="stable")
        parts, keys = [], []
        for group in np.split(order, np.flatnonzero(np.diff(which[order])) + 1):
            shard, some = self.shards[which[group[0]]], rows[group]
            keys.append({key: values[some] for key, values in shard.keys.items()})
            parts.append({
                name: take_ragged(c.values, shard.starts[name], c.lengths, some) if isinstance(c, Ragged) else c[some]
                for name, c in shard.columns.items()
            })  # fmt: skip
        if len(parts) == 1:
            return keys[0], parts[0]
        back = np.argsort(order)
        joined = {key: np.concatenate([k[key] for k in keys])[back] for key in keys[0]}
        return joined, take_rows(concat_columns(parts), back)

    def all_rows(self, batch: int = 4096) -> Iterator[tuple[dict[str, Array], Columns]]:
        """Every row once, in the order of shards."""
        order = np.lexsort((self._rows, self._which))
        for start in range(0, len(order), batch):
            yield self.rows(order[start : start + batch])


def memory_for_cache() -> int:
    """Bytes of a cache that the page cache can hold: half of the free memory."""
    return int(psutil.virtual_memory().available) // 2


def _spans(shard: ShardData, rows: Array) -> Iterator[tuple[int, int]]:
    """Where the columns of ``rows`` are in the file: page-aligned first byte, and number of bytes."""
    for name, column in shard.columns.items():
        if isinstance(column, Ragged):
            size = column.values.itemsize
            first = column.values.ctypes.data - shard.address + shard.starts[name][rows].astype(np.int64) * size
            last = first + column.lengths[rows].astype(np.int64) * size
        else:
            first = column.ctypes.data - shard.address + rows.astype(np.int64) * column.strides[0]
            last = first + column.strides[0]
        pages = first // mmap.PAGESIZE * mmap.PAGESIZE
        yield from zip(pages.tolist(), (last - pages).tolist(), strict=True)
