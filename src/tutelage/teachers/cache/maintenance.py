"""Inspects, verifies and compacts a cache."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import Any

import numpy as np

from tutelage.errors import CacheError, TutelageError
from tutelage.files import TEMPORARY_PREFIX
from tutelage.teachers.cache import files
from tutelage.teachers.cache.columns import nbytes
from tutelage.teachers.cache.layout import tokens_per_sample
from tutelage.teachers.cache.reader import CacheReader
from tutelage.teachers.cache.writer import CacheWriter

COMPACT_BYTES = 2**28
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def inspect_cache(folder: Path) -> dict[str, Any]:
    """Layout, provenance, and the number of rows, samples, views and bytes; raises as :class:`CacheReader`."""
    reader = CacheReader(folder, verify=False)
    shards, layout, made_from = files.complete_shards(folder), reader.layout, reader.made_from
    ids = np.concatenate([s.keys["id"] for s in reader.shards]) if reader.shards else np.empty(0, np.int64)
    rows, samples = len(reader), len(np.unique(ids))
    size = sum(shard.size for shard in shards)
    tokens = sum(int(tokens_per_sample(s.columns).sum()) for s in reader.shards) if layout.tokens else None
    return {
        "layout": layout.to_dict(),
        "made_from": made_from,
        "rows": rows,
        "samples": samples,
        "views_per_sample": rows / samples if samples else 0.0,
        "expected_rows": made_from.get("rows"),
        "duplicates": reader.duplicates,
        "shards": len(shards),
        "bytes": size,
        "bytes_per_row": size / rows if rows else 0.0,
        **({} if tokens is None else {"tokens": tokens, "bytes_per_token": size / max(tokens, 1)}),
        "leftovers": [path.name for path in _leftovers(folder, shards)],
    }


def _leftovers(folder: Path, shards: Iterable[files.Shard]) -> list[Path]:
    """Files of interrupted writes: temporary ones, shards and output heads without a side file."""
    complete = {shard.path.name for shard in shards}
    return [
        path
        for path in sorted(folder.glob("*"))
        if path.name.startswith(TEMPORARY_PREFIX)
        or (path.suffix == ".arrow" and path.name not in complete)
        or (path.name == f"{files.HEAD}.safetensors" and not files.has_output(folder))
    ]


def verify_cache(folder: Path, progress: Progress = lambda items, _: items) -> list[str]:
    """Every defect of a cache, as messages; empty for an intact cache.

    Checks the manifest, every side file and every byte of every shard, and that keys and lengths fit.
    """
    try:
        layout, _ = files.read_manifest(folder)
    except TutelageError as error:
        return [str(error)]
    faults: list[str] = []

    @contextmanager
    def collect() -> Iterator[None]:
        try:
            yield
        except (TutelageError, OSError, ValueError, KeyError) as error:
            faults.append(str(error))

    sides = files.side_files(folder)
    if "head" in layout.provides and (sides or files.has_output(folder)):
        with collect():
            files.read_output(folder)
    for side in progress(sides, "checking shards"):
        with collect():
            shard = files.read_side_file(side)
            files.check_shard(shard)
            data = files.open_shard(shard, layout)
            if any(len(k) != shard.rows for k in data.keys.values()) or nbytes(data.columns) == 0:
                raise CacheError("the shard does not have the rows that its side file states", where=str(shard.path))
    if not faults:
        with collect():
            if duplicates := CacheReader(folder, verify=False).duplicates:
                faults.append(f"{folder}: {duplicates} rows are stored twice\n  -> tutelage cache compact {folder}")
    return faults


def compact_cache(folder: Path, progress: Progress = lambda items, _: items) -> dict[str, int]:
    """Merge the shards of a cache into few, each row once, and delete the old shards and leftover files.

    New shards are complete before an old one is deleted, so an interruption loses no row. Raises :class:`CacheError`
    if the cache is damaged, or cannot be written.
    """
    reader = CacheReader(folder)
    old, rows = files.complete_shards(folder), len(reader)
    writer = CacheWriter(folder, reader.layout, shard_bytes=COMPACT_BYTES, shard_seconds=TIMEOUT_MAX)
    try:
        for keys, columns in progress(reader.all_rows(), "merging shards"):
            writer.put(keys, columns)
    finally:
        writer.close()
    for shard in old:
        shard.path.with_suffix(".json").unlink()
        shard.path.unlink()
    complete = files.complete_shards(folder)
    for path in _leftovers(folder, complete):
        path.unlink()
    return {
        "shards_before": len(old), "bytes_before": sum(s.size for s in old), "rows": rows,
        "shards": len(complete), "bytes": sum(s.size for s in complete),
    }  # fmt: skip
