"""A teacher, batches and a process for tests of the teacher cache."""

from __future__ import annotations

import time
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from tutelage.data import Batch
from tutelage.models.small import ConvNet
from tutelage.teachers import CachedTeacher, Layout, LiveTeacher
from tutelage.teachers.cache import CacheWriter, teacher

FROM = {"teacher": {"weights": "abc"}, "preprocessing": {"mean": [0.5]}, "augment": [], "views": None}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ConvNet(classes=10, channels=1, widths=(4, 8), depth=1).eval()


def some(n: int = 40, start: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200, 1, 8, 8, generator=generator)[start : start + n]
    return Batch(x, torch.zeros(n, dtype=torch.long), ids=torch.arange(start, start + n) * 7)


def fill_slowly(folder: Path, ready: Event) -> None:
    """Fill a cache of many small shards, in a process that a test kills."""
    writer = partial(CacheWriter, shard_bytes=3000)
    with (
        patch.object(teacher, "CacheWriter", writer),
        CachedTeacher(folder, Layout("dense", 10, "fp32"), FROM, LiveTeacher(network())) as cache,
    ):
        ready.set()
        for start in range(0, 200, 5):
            cache.fill(some(5, start))
            time.sleep(0.004)
