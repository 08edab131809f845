"""Small teachers, a batch and a recipe for tests of ensembles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tutelage.data import Batch
from tutelage.models.small import ConvNet
from tutelage.progress import Terminal
from tutelage.taps import Needs
from tutelage.teachers import (
    LiveTeacher,
)

QUIET = Terminal(speaks=False)


def network(seed: int = 0, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    model = ConvNet(classes=classes, channels=1, widths=(4, 8), depth=1)
    for parameter in model.parameters():
        parameter.data.mul_(2)  # opinions that differ
    return model


def batch(n: int = 6, route: list[int] | None = None) -> Batch:
    x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))
    return Batch(x, torch.arange(n) % 10, ids=torch.arange(n), route=None if route is None else torch.tensor(route))


def logits(members: list[LiveTeacher], given: Batch) -> Tensor:
    return torch.stack([m.signal(given, Needs()).dense() for m in members])


def recipe(**change: Any) -> dict[str, Any]:
    member = {"model": "mlp", "options": {"hidden": [24]}}
    return {
        "name": "many",
        "data": {"source": "digits", "limit": 500},
        "teacher": {"members": [dict(member), dict(member), {"model": "convnet", "options": {"widths": [8, 16]}}],
                    "train": {"steps": 40, "optimizer": {"kind": "adam", "lr": 0.01}}},
        "student": {"model": "mlp", "options": {"hidden": [4]}},
        "method": {"kind": "logit"},
        "train": {"steps": 6, "batch_size": 50},
        **change,
    }  # fmt: skip
