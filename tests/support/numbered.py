"""A network with every difficulty for taps at once, batches that carry their number, and meters of memory."""

from __future__ import annotations

import ctypes
import gc
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 128
TAPS = ("one", "shared@0", "shared@-1:input", "pair[1]", "pair:input")


class Pair(NamedTuple):
    half: Tensor
    double: Tensor


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Pair:
        return Pair(x / 2, x * 2)


class Numbered(nn.Module):
    """Has every difficulty at once: in-place activations, a module that runs twice, batch norm, a tuple."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.one, self.relu, self.norm = nn.Linear(8, WIDTH), nn.ReLU(inplace=True), nn.BatchNorm1d(WIDTH)
        self.shared, self.pair, self.head = nn.Linear(WIDTH, WIDTH), Halves(), nn.Linear(WIDTH, 3)
        self.checkpointed = checkpointed

    def middle(self, x: Tensor) -> Tensor:
        x = self.relu(self.one(x))
        for _ in range(2):
            x = self.relu(self.shared(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.middle, x, use_reentrant=False) if self.checkpointed else self.middle(x)
        return self.head(self.norm(self.pair(x)[1]))

    def expected(self, x: Tensor) -> dict[str, Tensor]:
        one = self.one(x)
        first = self.shared(one.relu())
        last = self.shared(first.relu()).relu()
        return dict(zip(TAPS, (one, first, first.relu(), 2 * last, last), strict=True))


def numbered(i: int) -> Tensor:
    """A batch that carries its number."""
    return torch.linspace(-1, 1, 64 * 8).reshape(64, 8) + 0.01 * i


class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def allocated() -> int:
    """Bytes that malloc has given out, those of tensors among them; not what the process has got from the system."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = MallInfo
    found = ask()
    return int(found.uordblks + found.hblkhd)


def tensors(most: int = 0) -> int:
    """Tensors that are alive; waits for at most five seconds until they are no more than ``most``.

    A thread of gloo lets go of an operation's tensors a moment after it has said that it is done.
    """
    until = time.monotonic() + 5
    while True:
        gc.collect()
        found = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
        if found <= most or not most or time.monotonic() > until:
            return found
        time.sleep(0.02)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
