"""A teacher, batches and a process for tests of the teacher cache."""

from __future__ import annotations

import torch
from torch import nn

from tutelage.data import Batch
from tutelage.models.small import ConvNet

FROM = {"teacher": {"weights": "abc"}, "preprocessing": {"mean": [0.5]}, "augment": [], "views": None}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ConvNet(classes=10, channels=1, widths=(4, 8), depth=1).eval()


def some(n: int = 40, start: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200, 1, 8, 8, generator=generator)[start : start + n]
    return Batch(x, torch.zeros(n, dtype=torch.long), ids=torch.arange(start, start + n) * 7)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.cache_cases import FROM, network, some
from tutelage.teachers import CachedTeacher, Layout, LiveTeacher
import tutelage.teachers.cache.teacher as t
t.Writer.__init__.__kwdefaults__["shard_bytes"] = 3000
with CachedTeacher(Path({folder!r}), Layout("dense", 10, "fp32"), FROM, LiveTeacher(network())) as cache:
    print("ready", flush=True)
    for start in range(0, 200, 5):
        cache.fill(some(5, start))
        time.sleep(0.004)
print("done", flush=True)
"""
