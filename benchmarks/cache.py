"""What a cache of the teacher's word costs and saves.

    python benchmarks/cache.py epoch      # an epoch alone, taught live, taught from cache; steps of 20 and 400 ms
    python benchmarks/cache.py write      # the bare teacher, and the teacher with a cache behind it; a million rows
    python benchmarks/cache.py read       # random rows a second
    python benchmarks/cache.py cold       # reading a cache that is not in memory, told what comes next or not
    python benchmarks/cache.py fidelity   # bytes a row, and the angle of the gradient to that of full KD

Each prints its figures and puts them into ``results/cache.json``. Times are ratios within one run, in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.config import OptimizerConfig
from tutelage.data import Batch, PlannedBatches, RankSlice, load_images
from tutelage.engine.optim import build_optimizer
from tutelage.evaluation.statistics import paired_difference
from tutelage.methods import DistillationModule, LogitMethod, Method, SupervisedMethod
from tutelage.models.small import ConvNet
from tutelage.taps import Needs
from tutelage.teachers import CachedTeacher, Layout, LiveTeacher, Signal, Teacher
from tutelage.teachers.cache import CacheReader, CacheWriter, inspect_cache
from tutelage.teachers.cache import reader as reader_module
from tutelage.teachers.cache.files import write_manifest

RESULTS = Path("results/cache.json")
FROM: dict[str, Any] = {"benchmark": True}


# An epoch --------------------------------------------------------------------------------------------------


def epoch(pairs: int) -> dict[str, Any]:
    """Seconds of an epoch alone, live and cached, in turn."""
    found = {}
    sizes = {"20 ms": (1_600, (16, 32, 48), (48, 96, 192)), "400 ms": (384, (64, 128, 256), (96, 192, 384))}
    for name, (images, mine, theirs) in sizes.items():
        data = load_images("fashion-mnist", limit=images, augment=["flip"])
        torch.manual_seed(0)
        teacher = LiveTeacher(ConvNet(classes=10, channels=1, widths=theirs))
        with tempfile.TemporaryDirectory() as folder:
            layout = Layout("dense", 10, "fp16")
            batches = PlannedBatches(data.train, 64, seed=0, views=1)
            with CachedTeacher(folder, layout, FROM, teacher) as cache:
                for (batch,) in batches.epoch(0, RankSlice()):
                    cache.fill(batch)
            cached = CachedTeacher(folder, layout, FROM)
            arms: dict[str, tuple[Method, Teacher | None]] = {
                "alone": (SupervisedMethod(), None),
                "live": (LogitMethod(), teacher),
                "cached": (LogitMethod(), cached),
            }
            runs = {arm: _trainer(mine, method, asked, batches) for arm, (method, asked) in arms.items()}
            for run in runs.values():
                run()
            # The teacher's share is its forward pass alone: drawing the images is paid by every arm.
            runs["forward"] = partial(_forward, teacher, list(batches.epoch(0, RankSlice())))
            rounds = [{arm: _timed(run) for arm, run in runs.items()} for _ in range(pairs)]
        saved = [(r["live"] - r["cached"]) / r["forward"] for r in rounds]
        interval = paired_difference(saved, [0.0] * len(saved))
        found[name] = {
            "step_ms_alone": 1000 * statistics.median(r["alone"] for r in rounds) / batches.steps_per_epoch,
            "cached_over_alone": statistics.median(r["cached"] / r["alone"] for r in rounds),
            "live_over_alone": statistics.median(r["live"] / r["alone"] for r in rounds),
            "saved_seconds": statistics.median(r["live"] - r["cached"] for r in rounds),
            "teacher_forward_seconds": statistics.median(r["forward"] for r in rounds),
            "saved_over_forward": statistics.median(saved),
            "saved_over_forward_low": interval["low"],
            "saved_over_forward_high": interval["high"],
            "rounds": rounds,
        }
        print(name, {k: round(v, 4) for k, v in found[name].items() if k != "rounds"}, flush=True)
    return found


def _trainer(
    widths: tuple[int, ...], method: Method, asked: Teacher | None, batches: PlannedBatches
) -> Callable[[], None]:
    torch.manual_seed(1)
    module = DistillationModule(ConvNet(classes=10, channels=1, widths=widths), method).train()
    optimizer = build_optimizer(module, OptimizerConfig(kind="sgd", lr=0.01))

    def run() -> None:
        for (batch,) in batches.epoch(0, RankSlice()):
            signal = None if asked is None or method.needs is None else asked.signal(batch, method.needs)
            terms = module(batch, signal)
            torch.stack([method.weights[k] * t.sum / t.count for k, t in terms.items()]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def _forward(teacher: LiveTeacher, batches: list[list[Batch]]) -> None:
    for (batch,) in batches:
        teacher.signal(batch, Needs())


def _timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# Writing and reading ---------------------------------------------------------------------------------------


def write(rounds: int) -> dict[str, Any]:
    """Throughput of the teacher with a cache behind it, and memory over a million rows."""
    data = load_images("fashion-mnist", limit=4_000)
    torch.manual_seed(0)
    teacher = LiveTeacher(ConvNet(classes=1000, channels=1, widths=(32, 64, 128)))
    batches = list(PlannedBatches(data.train, 128, seed=0).epoch(0, RankSlice()))

    def bare() -> None:
        for (batch,) in batches:
            teacher.signal(batch, Needs())

    def kept() -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            CachedTeacher(folder, Layout("dense", 1000, "fp16"), FROM, teacher) as cache,
        ):
            for (batch,) in batches:
                cache.fill(batch)

    bare()
    kept()
    ratios = [_timed(bare) / _timed(kept) for _ in range(rounds)]
    rows, width, size = 1_000_000, 1_000, 4_000
    numbers = np.random.default_rng(0).standard_normal((size, width)).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout("dense", width, "fp16")
        write_manifest(Path(folder), layout, FROM)
        writer = CacheWriter(Path(folder), layout)
        peaks, start = [], time.perf_counter()
        for at in range(0, rows, size):
            ids = np.arange(at, at + size)
            writer.put({"id": ids, "view": np.zeros_like(ids), "digest": ids.astype(np.uint64)}, {"logits": numbers})
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        writer.close()
        seconds = time.perf_counter() - start
        known = inspect_cache(Path(folder))
    found = {
        "of_bare_throughput": statistics.median(ratios),
        "ratios": ratios,
        "rows": known["rows"],
        "bytes_per_row": known["bytes_per_row"],
        "seconds": seconds,
        "megabytes_after_a_tenth": peaks[len(peaks) // 10],
        "megabytes_at_the_end": peaks[-1],
    }
    print({k: v for k, v in found.items() if k != "ratios"}, flush=True)
    return found


def read(batches: int) -> dict[str, Any]:
    """Random rows a second, found, read and decoded to float32."""
    found = {}
    for width, rows in ((10, 1_000_000), (1_000, 200_000)):
        layout = Layout("dense", width, "fp16")
        with tempfile.TemporaryDirectory() as folder:
            write_manifest(Path(folder), layout, FROM)
            writer = CacheWriter(Path(folder), layout)
            for at in range(0, rows, 10_000):
                ids = np.arange(at, at + 10_000)
                numbers = np.random.default_rng(at).standard_normal((10_000, width)).astype(np.float16)
                writer.put({"id": ids, "view": ids, "digest": ids.astype(np.uint64)}, {"logits": numbers})
            writer.close()
            reader = CacheReader(Path(folder))
            chance = np.random.default_rng(1)
            for size in (64, 256):
                wanted = [chance.integers(0, rows, size) for _ in range(batches)]
                start = time.perf_counter()
                for ids in wanted:
                    position = reader.find(ids, ids)
                    layout.decode(reader.rows(position)[1], Needs(hidden=tuple(layout.hidden)), "cpu")
                rate = size * batches / (time.perf_counter() - start)
                found[f"{width} classes, batches of {size}"] = {"rows_per_second": rate, "shards": len(reader.shards)}
                print(width, size, f"{rate:,.0f} rows a second", flush=True)
    return found


def cold(rounds: int) -> dict[str, Any]:
    """Milliseconds that a step waits for its rows where the disk holds them and memory does not.

    What memory keeps of the files is dropped before each pass. A step of 20 ms is a loop that waits. ``told`` is how
    a cache is read that does not fit into memory; ``untold`` is the same without the word on what comes next, and
    ``plain`` leaves it all to the system, which reads whatever lies around a row too, as if memory had no end.
    """
    width, rows, size, steps = 1_000, 300_000, 64, 100
    layout = Layout("dense", width, "fp16")
    waits: dict[str, list[float]] = {"told": [], "untold": [], "plain": []}
    hints: list[float] = []
    read_bytes = dict.fromkeys(waits, 0)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        write_manifest(Path(folder), layout, FROM)
        writer = CacheWriter(Path(folder), layout)
        for at in range(0, rows, 10_000):
            ids = np.arange(at, at + 10_000)
            numbers = np.random.default_rng(at).standard_normal((10_000, width)).astype(np.float16)
            writer.put({"id": ids, "view": ids, "digest": ids.astype(np.uint64)}, {"logits": numbers})
        writer.close()
        for number in range(rounds):
            for way, waited in waits.items():
                _drop(Path(folder))
                with patch.object(reader_module, "memory_for_cache", lambda: 0):
                    reader = CacheReader(Path(folder), verify=False)
                for shard in reader.shards if way == "plain" else ():
                    shard.mapped.madvise(mmap.MADV_NORMAL)
                chance = np.random.default_rng(number)
                wanted = [chance.integers(0, rows, size) for _ in range(steps + 1)]
                before = psutil.Process().io_counters().read_bytes
                for now, following in pairwise(wanted):
                    start = time.perf_counter()
                    if way == "told":
                        reader.prefetch(reader.find(following, following))
                        hints.append(1000 * (time.perf_counter() - start))
                    start = time.perf_counter()
                    while time.perf_counter() - start < 0.02:
                        pass
                    start = time.perf_counter()
                    layout.decode(reader.rows(reader.find(now, now))[1], Needs(hidden=tuple(layout.hidden)), "cpu")
                    waited.append(1000 * (time.perf_counter() - start))
                read_bytes[way] += psutil.Process().io_counters().read_bytes - before
                del reader
    found: dict[str, Any] = {
        way: {
            "wait_ms_median": statistics.median(waited),
            "wait_ms_mean": statistics.fmean(waited),
            "wait_ms_p95": sorted(waited)[int(0.95 * len(waited))],
            "kilobytes_read_per_row": read_bytes[way] / 1024 / (size * steps * rounds),
        }
        for way, waited in waits.items()
    }
    found["told"]["telling_ms_mean"] = statistics.fmean(hints)
    for way, figures in found.items():
        print(way, {k: round(v, 2) for k, v in figures.items()}, flush=True)
    return found


def _drop(folder: Path) -> None:
    for path in folder.glob("*.arrow"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# Fidelity --------------------------------------------------------------------------------------------------


def rows_of(
    classes: int, width: int, size: int, teacher: nn.Linear, student: nn.Linear
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Hidden states of a student, its logits and its teacher's: alike but for noise; classes of Zipf's frequency."""
    generator = torch.Generator().manual_seed(2)
    prior = -1.1 * torch.arange(1, classes + 1).float().log()
    while True:
        hidden = torch.randn(size, width, generator=generator)
        noisy = hidden + 0.5 * torch.randn(size, width, generator=generator)
        yield hidden, student(hidden) + prior, teacher(noisy) + prior


def fidelity(most: int) -> dict[str, Any]:
    """Bytes a row, and the angle to full KD of the gradient of the student's last linear layer over many rows."""
    found: dict[str, Any] = {}
    for classes, temperature, width in ((10, 4.0, 32), (1_000, 1.0, 64), (49_152, 1.0, 64)):
        torch.manual_seed(0)
        teacher, student = nn.Linear(width, classes, bias=False), nn.Linear(width, classes, bias=False)
        with torch.no_grad():
            teacher.weight.normal_(0, 3 / math.sqrt(width))
            student.weight.copy_(teacher.weight + torch.randn_like(teacher.weight) * 1.5 / math.sqrt(width))
        at = (temperature,)
        layouts = {"dense fp16": Layout("dense", classes, "fp16")}
        for k in (8, 64):
            if k < classes:
                layouts[f"top-{k}"] = Layout("topk", classes, "fp16", k=k, temperatures=at)
        for draws in (12, 64):
            layouts[f"sampled, {draws} draws"] = Layout("sampled", classes, "fp16", draws=draws, temperatures=at)
        if classes > 64:
            layouts["12 exactly, 12 draws"] = Layout("sampled", classes, "fp16", draws=12, head=12, temperatures=at)
        sums = {name: torch.zeros_like(student.weight, dtype=torch.float64) for name in ("full", *layouts)}
        size = 500 if classes < 10_000 else 250
        bytes_of = dict.fromkeys(layouts, 0.0)
        unique = dict.fromkeys(layouts, 0.0)
        done, table = 0, {}
        with torch.no_grad():
            source = rows_of(classes, width, size, teacher, student)
            while done < most:
                hidden, s, t = next(source)
                seeds = torch.arange(done, done + size)
                sums["full"] += (_gradient(s, Signal(t), temperature).T @ hidden).double()
                for name, layout in layouts.items():
                    columns = layout.encode(Signal(t), seeds)
                    signal = layout.decode(columns, Needs(temperature=temperature), "cpu")
                    sums[name] += (_gradient(s, signal, temperature).T @ hidden).double()
                    bytes_of[name] += _bytes(columns)
                    if signal.sparse is not None:
                        unique[name] += float((signal.sparse.values != 0).sum())
                done += size
                if done in (1_000, 10_000, 100_000):
                    table[done] = {name: _angle(sums[name], sums["full"]) for name in layouts}
                    print(classes, done, {k: round(v, 2) for k, v in table[done].items()}, flush=True)
        found[str(classes)] = {
            "temperature": temperature,
            "bytes_per_row": {name: total / done for name, total in bytes_of.items()},
            "classes_per_row": {name: total / done for name, total in unique.items() if total},
            "angle_degrees": table,
        }
    return found


def _bytes(columns: Any) -> int:
    from tutelage.teachers.cache.columns import nbytes

    return nbytes(columns)


def _gradient(s: Tensor, signal: Signal, temperature: float) -> Tensor:
    """Of the summed loss by the student's logits."""
    with torch.enable_grad():
        x = s.detach().requires_grad_()
        if signal.sparse is None:
            loss = losses.kd(x, signal.dense(), temperature=temperature, reduction="sum")
        else:
            function = losses.topk_kd if signal.sparse.kind == "topk" else losses.sampled_kd
            loss = function(x, signal.sparse.index, signal.sparse.values, temperature=temperature, reduction="sum")
        return torch.autograd.grad(loss, x)[0]


def _angle(a: Tensor, b: Tensor) -> float:
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    return math.degrees(math.acos(min(max(cosine, -1.0), 1.0)))


def main() -> None:
    """Run what is asked for and keep its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("epoch", "write", "read", "cold", "fidelity"), nargs="+")
    parser.add_argument("--rows", type=int, default=100_000, help="of fidelity")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for what in args.what:
        found = {
            "epoch": lambda: epoch(args.rounds), "write": lambda: write(args.rounds),
            "read": lambda: read(1_000), "cold": lambda: cold(args.rounds), "fidelity": lambda: fidelity(args.rows),
        }[what]()  # fmt: skip
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**known, what: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
