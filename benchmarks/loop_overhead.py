"""What the engine costs over a hand-written loop, step by step in one process.

Each engine step is followed by one step of the hand-written loop on a copy of the same models, same data and
same batch size, so both meet the same state of the machine; the ratio is taken pair by pair::

    python benchmarks/loop_overhead.py
    python benchmarks/loop_overhead.py --profile    # where the engine's own time goes

The C library returns large blocks to the system and faults them in again, thousands of pages a step, more or fewer by
the order in which two loops in one process allocate. That is switched off for both (the process starts itself anew
with a larger threshold): without it, the ratio of two identical loops strays by 3 %.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import json
import os
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.config import OptimizerConfig, ScheduleConfig, TrainConfig
from tutelage.data import Batch, PlannedBatches
from tutelage.engine import RunDirectory, Training, build_accelerator, fit
from tutelage.methods import LogitMethod
from tutelage.models.small import ConvNet
from tutelage.teachers import LiveTeacher

SETTINGS = {"20 ms": ((10, 20), (20, 40), 136, 16, 500), "400 ms": ((24, 48, 96), (32, 64, 128), 320, 28, 120)}
"""Widths of student and teacher, batch size, image size, pairs of steps."""


class Images:
    """Random images in memory."""

    def __init__(self, rows: int, size: int) -> None:
        self.x, self.labels = torch.randn(rows, 1, size, size), torch.randint(10, (rows,))
        self.ids = torch.arange(rows)

    is_augmented = False

    def __len__(self) -> int:
        return len(self.x)

    def fetch(self, rows: Tensor, views: Tensor | None = None) -> Batch:
        """The given rows."""
        return Batch(self.x[rows], self.labels[rows], ids=self.ids[rows])


def by_hand(student: nn.Module, teacher: nn.Module, data: Images, batch_size: int, steps: int) -> Iterator[None]:
    """The loop that anybody would write; yields after each step."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    student.train()
    teacher.eval()
    while True:
        for rows in torch.randperm(len(data)).split(batch_size):
            x, y = data.x[rows], data.labels[rows]
            with torch.no_grad():
                target = F.log_softmax(teacher(x) / 4, dim=-1)
            logits = student(x)
            soft = F.kl_div(F.log_softmax(logits / 4, dim=-1), target, reduction="batchmean", log_target=True) * 16
            loss = 0.9 * soft + 0.1 * F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            yield


class Interleaved:
    """A watcher that runs one step by hand after each of the engine's, and times both."""

    def __init__(self, hand: Iterator[None]) -> None:
        self.hand = hand
        self.engine_seconds: list[float] = []
        self.hand_seconds: list[float] = []

    def on_start(self, name: str, step: int, total: int) -> None:
        """The engine's first step begins."""
        self.mark = time.perf_counter()

    def on_log(self, line: dict[str, Any]) -> None:
        """Part of the engine's step."""

    def on_step(self, step: int) -> None:
        """The engine's step ends; now one by hand."""
        now = time.perf_counter()
        next(self.hand)
        end = time.perf_counter()
        self.engine_seconds.append(now - self.mark)
        self.hand_seconds.append(end - now)
        self.mark = time.perf_counter()


def measure(name: str, folder: Path, profile: cProfile.Profile | None) -> dict[str, Any]:
    """Ratios of one setting."""
    student_widths, teacher_widths, batch_size, size, steps = SETTINGS[name]
    torch.manual_seed(0)
    student = ConvNet(classes=10, channels=1, widths=student_widths)
    teacher = ConvNet(classes=10, channels=1, widths=teacher_widths)
    data = Images(batch_size * 40, size)
    watcher = Interleaved(by_hand(copy.deepcopy(student), copy.deepcopy(teacher), data, batch_size, steps))
    config = TrainConfig(
        steps=steps + 2, batch_size=batch_size, optimizer=OptimizerConfig(kind="sgd", lr=0.01, momentum=0.9),
        schedule=ScheduleConfig(kind="cosine"),
    )  # fmt: skip
    training = Training(
        name, student, LogitMethod(), PlannedBatches(data, batch_size, seed=0), config, RunDirectory(folder),
        teacher=LiveTeacher(teacher), callback=watcher,
    )  # fmt: skip
    if profile is not None:
        profile.enable()
    fit(training, build_accelerator())
    if profile is not None:
        profile.disable()
    warm, end = 5, -1  # the last step writes a checkpoint
    pairs = list(zip(watcher.engine_seconds[warm:end], watcher.hand_seconds[warm:end], strict=True))
    ratios = sorted(a / b for a, b in pairs)
    return {
        "step_ms_by_hand": round(1000 * statistics.median(b for _, b in pairs), 2),
        "step_ms_engine": round(1000 * statistics.median(a for a, _ in pairs), 2),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(ratios[len(ratios) // 4], 4), round(ratios[3 * len(ratios) // 4], 4)],
        "pairs": len(pairs),
    }


KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""What tells the GNU C library to keep what it has."""


def main() -> None:
    """Measure and print; ``--out`` keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if KEEP.keys() - os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(1)
    results = {}
    for name in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            profile = cProfile.Profile() if args.profile else None
            results[name] = measure(name, Path(folder), profile)
            print(name, results[name], flush=True)
            if profile is not None:
                pstats.Stats(profile).sort_stats("tottime").print_stats("tutelage|accelerate", 15)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
