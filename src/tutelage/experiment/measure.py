"""Size and speed of models."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tutelage.data.batch import Batch
from tutelage.taps import Needs, observe


def parameters(model: nn.Module) -> int:
    """Number of parameters; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def reached_parameters(model: nn.Module, example: Batch) -> int:
    """Parameters that the logits depend on or that are frozen; for an early exit, none of a later layer."""
    free = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    with torch.enable_grad():
        logits = observe(model, example.inputs, Needs()).logits
        assert logits is not None
        gradients = torch.autograd.grad(logits.sum(), free, allow_unused=True)
    unused = sum(p.numel() for p, gradient in zip(free, gradients, strict=True) if gradient is None)
    return parameters(model) - unused


def class_name(cls: type) -> str:
    """Module and name of a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def short_hash(content: str | bytes) -> str:
    """The first 16 hex digits of a SHA-256."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """A model's class, size and digest of its weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {"class": class_name(type(model)), "parameters": parameters(model), "weights": digest.hexdigest()[:16]}


def latencies(
    models: Mapping[str, tuple[nn.Module, Batch]], device: torch.device, rounds: int = 30
) -> dict[str, dict[str, Any]]:
    """Milliseconds of a forward pass for one sample, the models taking turns.

    Taking turns, because a machine's speed drifts: compare the figures with each other only.
    """
    one = {}
    for name, (model, example) in models.items():
        first = next(model.parameters(), None)
        one[name] = example.rows(0, 1).to(device if first is None else first.device)
    times: dict[str, list[float]] = {name: [] for name in models}
    for model, _ in models.values():
        model.eval()
    with torch.no_grad():
        for i in range(rounds + max(1, rounds // 10)):
            for name, (model, _) in models.items():
                start = time.perf_counter()
                observe(model, one[name].inputs, Needs())
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if i >= max(1, rounds // 10):
                    times[name].append(1000 * (time.perf_counter() - start))
    return {
        name: {"p50_ms": statistics.median(t), "p95_ms": sorted(t)[int(0.95 * (len(t) - 1))], "batch": 1}
        for name, t in times.items()
    }
