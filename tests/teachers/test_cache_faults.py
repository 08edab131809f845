"""The teacher cache under damage, other settings, several writers and SIGKILL."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.cache_cases import FROM, fill_slowly, network, some
from tutelage.errors import CacheError, CapabilityError, NumericsError
from tutelage.taps import Needs
from tutelage.teachers import CachedTeacher, Layout, LiveTeacher
from tutelage.teachers.cache import CacheReader, CacheWriter, compact_cache, inspect_cache, verify_cache
from tutelage.teachers.cache.files import write_manifest


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"teacher": {"weights": "abd"}}, r"teacher\.weights"),
        ({"preprocessing": {"mean": [0.4]}}, r"preprocessing\.mean"),
        ({"augment": ["flip"]}, "augment"),
        ({"views": 4}, "views"),
        ({"tokenizer": "bert"}, "tokenizer"),
    ],
)
def test_a_cache_of_something_else_is_refused(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    layout = Layout("topk", 10, "fp16", k=3, temperatures=(4.0,))
    with CachedTeacher(tmp_path / "c", layout, FROM, LiveTeacher(network())) as cache:
        cache.fill(some())
    with pytest.raises(CacheError, match=field):
        CachedTeacher(tmp_path / "c", layout, {**FROM, **change})
    for other in (
        Layout("topk", 10, "fp16", k=3, temperatures=(2.0,)),
        Layout("topk", 10, "fp16", k=4, temperatures=(4.0,)),
        Layout("dense", 10, "fp16"),
    ):
        with pytest.raises(CacheError, match=r"stored\."):
            CachedTeacher(tmp_path / "c", other, FROM)
    same = CachedTeacher(tmp_path / "c", layout, FROM)
    with pytest.raises(CapabilityError, match="T = 4, and the method needs T = 2"):
        same.signal(some(), Needs(temperature=2.0))
    with pytest.raises(CapabilityError, match=r"does not keep head:input"):
        same.signal(some(), Needs(hidden=("head:input",), temperature=4.0))
    with pytest.raises(CacheError, match="has no row for sample ids"):
        same.signal(some(3, 60), Needs(temperature=4.0))


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    layout = Layout("sampled", 10, "fp16", draws=5, temperatures=(4.0,))
    with CachedTeacher(folder, layout, FROM, LiveTeacher(network())) as cache:
        for start in (0, 40, 80):
            cache.fill(some(40, start))
            assert cache.writer is not None
            cache.writer.flush()
    assert verify_cache(folder) == []
    files = sorted(p for p in folder.iterdir())
    assert len(files) == 7
    chance = random.Random(0)
    for _ in range(200):
        path = chance.choice(files)
        raw = bytearray(path.read_bytes())
        at = chance.randrange(len(raw) * 8)
        raw[at // 8] ^= 1 << at % 8
        whole = path.read_bytes()
        path.write_bytes(raw)
        assert verify_cache(folder), f"bit {at} of {path.name}"
        path.write_bytes(whole)
    assert verify_cache(folder) == []


def test_a_half_written_shard_is_no_shard(tmp_path: Path) -> None:
    folder, layout = tmp_path / "c", Layout("dense", 10, "fp32")
    with CachedTeacher(folder, layout, FROM, LiveTeacher(network())) as cache:
        cache.fill(some(40))
    (folder / ".tutelage-tmp.shard-000-1-00000.arrow.x").write_bytes(b"half")
    (folder / "shard-000-1-00000.arrow").write_bytes(b"renamed, and then the power went")
    assert verify_cache(folder) == []
    assert len(inspect_cache(folder)["leftovers"]) == 2
    found = compact_cache(folder)
    assert found["rows"] == 40
    assert inspect_cache(folder)["leftovers"] == []
    shard = next(folder.glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CacheError, match="bytes where"):
        CacheReader(folder)


def test_shards_are_joined_and_rows_that_came_twice_go(tmp_path: Path) -> None:
    folder, layout = tmp_path / "c", Layout("sampled", 10, "fp32", draws=6, head=2, temperatures=(4.0,))
    for _ in range(2):
        writer_only = CachedTeacher(folder, layout, FROM, LiveTeacher(network()))
        writer_only.reader.refresh = lambda: False  # type: ignore[method-assign]
        writer_only.reader.find = lambda ids, views: np.full(len(ids), -1)  # type: ignore[method-assign]
        for start in (0, 20):
            writer_only.fill(some(20, start))
            assert writer_only.writer is not None
            writer_only.writer.flush()
            writer_only._pending.clear()
        writer_only.close()
    assert "twice" in verify_cache(folder)[0]
    before = CachedTeacher(folder, layout, FROM).signal(some(), Needs(temperature=4.0)).sparse
    assert compact_cache(folder)["shards"] == 1
    after = CachedTeacher(folder, layout, FROM).signal(some(), Needs(temperature=4.0)).sparse
    assert before is not None
    assert after is not None
    assert torch.equal(before.values, after.values)
    assert verify_cache(folder) == []
    assert inspect_cache(folder)["rows"] == 40


def test_what_the_writer_cannot_write_is_raised_and_the_rest_stays(tmp_path: Path) -> None:
    folder, layout = tmp_path / "c", Layout("dense", 10, "fp32")
    with CachedTeacher(folder, layout, FROM, LiveTeacher(network())) as cache:
        cache.fill(some(40))
    full = CachedTeacher(folder, layout, FROM, LiveTeacher(network()))
    full.fill(some(40, 40))
    assert full.writer is not None
    full.writer.folder = Path("/dev/full")  # every write there fails
    with pytest.raises(CacheError, match=r"cannot be written"):
        full.writer.flush()
    with pytest.raises(CacheError, match=r"cannot be written"):
        full.fill(some(40, 80))
    with pytest.raises(CacheError, match=r"cannot be written"):
        full.close()
    assert verify_cache(folder) == []
    assert len(CacheReader(folder)) == 40


def test_a_number_too_large_for_the_type_is_no_infinity(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model.head.weight.mul_(1e7)
    cache = CachedTeacher(tmp_path / "c", Layout("dense", 10, "fp16"), FROM, LiveTeacher(model))
    with pytest.raises(NumericsError, match="bf16 or fp32"):
        cache.fill(some())


def test_several_write_and_read_one_cache(tmp_path: Path) -> None:
    folder, layout, live = tmp_path / "c", Layout("dense", 10, "fp32"), LiveTeacher(network())
    both = [CachedTeacher(folder, layout, FROM, live, rank=rank) for rank in (0, 1)]
    for i, start in enumerate(range(0, 80, 10)):
        both[i % 2].fill(some(10, start))
    for cache in both:
        assert cache.writer is not None
        cache.writer.flush()
        cache._refresh_time = -100.0
    asked = both[0].computed_rows
    for start in range(0, 80, 10):
        both[0].signal(some(10, start), Needs())
    assert both[0].computed_rows == asked
    for cache in both:
        cache.close()
    assert inspect_cache(folder)["duplicates"] == 0


def wide_rows(i: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys and columns of 64 rows of 1000 logits."""
    ids = np.arange(i * 64, (i + 1) * 64)
    keys = {"id": ids, "view": np.zeros_like(ids), "digest": ids.astype(np.uint64)}
    return keys, {"logits": np.full((64, 1000), i, dtype=np.float32)}


def test_an_idle_writer_writes_its_last_rows_and_leaves_no_thread(tmp_path: Path) -> None:
    layout = Layout("dense", 1000, "fp32")
    write_manifest(tmp_path, layout, FROM)
    threads = set(threading.enumerate())
    writer = CacheWriter(tmp_path, layout, shard_seconds=0.05)
    for i in range(2):  # also the rows after a pause
        writer.put(*wide_rows(i))
        until = time.monotonic() + 30
        while len(CacheReader(tmp_path)) < 64 * (i + 1) and time.monotonic() < until:
            time.sleep(0.01)
        assert len(CacheReader(tmp_path)) == 64 * (i + 1)
        assert writer.bytes == 0
    writer.folder = Path("/dev/full")
    writer.put(*wide_rows(2))
    while writer.bytes and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(CacheError, match="cannot be written"):
        writer.close()
    assert set(threading.enumerate()) <= threads
    assert verify_cache(tmp_path) == []


def test_the_writers_memory_is_bounded(tmp_path: Path) -> None:
    layout = Layout("dense", 1000, "fp32")
    write_manifest(tmp_path, layout, FROM)
    writer = CacheWriter(tmp_path, layout, shard_bytes=2**20)
    most = 0
    for i in range(60):
        writer.put(*wide_rows(i))
        most = max(most, writer.bytes)  # and as much again while the thread writes a shard
    writer.close()
    assert most <= 2**20 + 64 * 4024
    assert len(CacheReader(tmp_path)) == 60 * 64


def test_killed_at_random_and_started_again_it_is_complete_and_has_no_row_twice(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    context = multiprocessing.get_context("forkserver")  # which imports torch once
    context.set_forkserver_preload(["tutelage.teachers", "tutelage.models.small"])
    chance = random.Random(1)
    kills = 0
    for _ in range(60):
        ready = context.Event()
        child = context.Process(target=fill_slowly, args=(folder, ready))
        child.start()
        assert ready.wait(60)
        time.sleep(chance.random() * 0.3)
        if kills < 20 and child.is_alive():
            child.kill()
            kills += 1
        child.join()
        if kills < 20 or child.exitcode != 0:
            assert verify_cache(folder) == []
        if child.exitcode == 0 and kills == 20:
            break
        if child.exitcode != 0:
            continue
        for side in sorted(folder.glob("shard-*.json"))[:3]:  # finished too soon to be killed: some work again
            side.unlink()
            side.with_suffix(".arrow").unlink()
    assert kills == 20
    assert verify_cache(folder) == []
    found = inspect_cache(folder)
    assert found["rows"] == 200
    assert found["duplicates"] == 0
