"""Print the seconds of a step; run by ``compare_commits.py`` with the package of either commit on the path.

    python benchmarks/step_probe.py engine|cached|language|token-loss losses|objectives

The second argument is the name of the package's room of losses. Steps are timed from outside, by the moments at which
the engine fetches its batches, so that the same code measures both commits.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import tutelage
from tutelage.data import causal_batch
from tutelage.methods import LogitMethod, TokenMethod


class Timed:
    """A loader that notes when each batch is fetched."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.at = batches, list[float]()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.at.append(time.perf_counter())
            yield batch

    def step(self, skip: int) -> float:
        """Median seconds between two batches, the first ``skip`` left out."""
        return statistics.median(b - a for a, b in zip(self.at[skip:], self.at[skip + 1 :], strict=False))


def network(width: int) -> nn.Module:
    """A small convolutional classifier."""
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip


def images(count: int, ids: bool) -> list[Any]:
    """Batches of 128 images with labels, and sample ids where ``ids``."""
    labels = torch.arange(count) % 10
    x = torch.randn(count, 1, 16, 16) + torch.eye(16)[labels].view(count, 1, 1, 16)
    rows = [slice(i, i + 128) for i in range(0, count, 128)]
    return [(x[r], labels[r], torch.arange(r.start, r.stop)) if ids else (x[r], labels[r]) for r in rows]


def trained_teacher() -> nn.Module:
    """A teacher that is better than chance."""
    model = network(32)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(6):
        for x, labels in images(1280, ids=False):
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def engine(cached: bool) -> float:
    """A step of logit distillation, from a live teacher or from a cache."""
    loader, test = Timed(images(1280, cached)), images(256, cached)
    with tempfile.TemporaryDirectory() as folder:
        more: dict[str, Any] = {"cache": f"{folder}/cache"} if cached else {}
        tutelage.distill(
            trained_teacher(), network(16), loader, eval_data=test, method=LogitMethod(), epochs=16, baseline=False,
            out=f"{folder}/run", verbose=False, **more,
        )  # fmt: skip
    return loader.step(60)


def language() -> float:
    """A step of token distillation with a live teacher."""
    import transformers

    def causal(layers: int) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=4096, hidden_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=256, max_position_embeddings=256,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    generator = torch.Generator().manual_seed(0)
    teacher = causal(4)
    rows = []
    for _ in range(12):
        # texts that the teacher finds likelier than chance: each token repeats the one before
        ids = torch.randint(4, 4000, (4, 1), generator=generator).expand(4, 128).clone()
        rows.append({"input_ids": ids})
    optimizer = torch.optim.Adam(teacher.parameters(), 1e-3)
    for row in rows * 2:
        teacher(**row, labels=row["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loader = Timed(rows)
    with tempfile.TemporaryDirectory() as folder:
        tutelage.distill(
            teacher, causal(2), loader, eval_data=rows[:1], method=TokenMethod(), epochs=3, baseline=False,
            to_batch=causal_batch, out=f"{folder}/run", verbose=False,
        )  # fmt: skip
    return loader.step(12)


def token_loss(losses: Any) -> float:
    """Forward and backward pass of the chunked KL of 512 tokens over 16,384 entries."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 128, generator=generator, requires_grad=True)
    head = torch.randn(16384, 128, generator=generator, requires_grad=True)
    teacher = (torch.randn(512, 192, generator=generator), torch.randn(16384, 192, generator=generator))
    times = []
    for _ in range(12):
        start = time.perf_counter()
        losses.linear_divergence(hidden, head, teacher).backward()
        times.append(time.perf_counter() - start)
        hidden.grad = head.grad = None
    return statistics.median(times[3:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    what, room = sys.argv[1:]
    seconds = {
        "engine": lambda: engine(False),
        "cached": lambda: engine(True),
        "language": language,
        "token-loss": lambda: token_loss(getattr(tutelage, room)),
    }[what]()
    print("RESULT", seconds)
