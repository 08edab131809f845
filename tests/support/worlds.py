"""Three small worlds: images, padded texts, and token sequences with masked prompts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutelage.data import Batch, as_batch, causal_batch
from tutelage.engine.checkpoint import load_checkpoint, newest
from tutelage.models.small import ConvNet

VOCABULARY, PAD = 24, 3


@dataclass
class World:
    name: str
    make: Callable[[int], nn.Module]
    train: list[Any]
    held: list[Any]
    to_batch: Callable[[Any], Batch]
    accumulate: int = 1


def unsettled() -> nn.Module:
    """A network that differs between training and evaluation, by dropout and by its running statistics."""
    model = ConvNet(classes=10, channels=1, widths=(4, 8), depth=1)
    model.stages.append(nn.Dropout(0.5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
    return model


def images() -> World:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 1, 8, 8, generator=generator)

    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(4, (n,), generator=generator)
        return means[labels] + 0.5 * torch.randn(n, 1, 8, 8, generator=generator), labels

    return World(
        "cnn",
        lambda width: ConvNet(classes=4, channels=1, widths=(width, 2 * width), depth=1),
        [batch(n) for n in (16, 16, 16, 7)],
        [batch(32), batch(9)],
        as_batch,
    )


def texts() -> World:
    from transformers import BertConfig, BertForSequenceClassification

    generator = torch.Generator().manual_seed(1)

    def make(width: int) -> nn.Module:
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=2 * width, max_position_embeddings=16, num_labels=3, pad_token_id=PAD,
            )
        )  # fmt: skip

    def batch(n: int) -> dict[str, torch.Tensor]:
        labels = torch.randint(3, (n,), generator=generator)
        ids = torch.randint(8, VOCABULARY, (n, 10), generator=generator)
        ids[:, 1] = 4 + labels  # the class is readable
        lengths = torch.randint(3, 11, (n, 1), generator=generator)
        attention = (torch.arange(10) < lengths).long()
        return {"input_ids": ids.masked_fill(attention == 0, PAD), "attention_mask": attention, "labels": labels}

    return World("bert", make, [batch(n) for n in (16, 16, 5)], [batch(24), batch(7)], as_batch)


def tokens() -> World:
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(2)

    def make(width: int) -> nn.Module:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1, intermediate_size=2 * width, max_position_embeddings=32,
                pad_token_id=PAD, eos_token_id=PAD, bos_token_id=None, tie_word_embeddings=True,
            )
        )  # fmt: skip

    def batch(n: int) -> dict[str, torch.Tensor]:
        start = torch.randint(8, VOCABULARY, (n, 1), generator=generator)
        ids = 8 + (start - 8 + torch.arange(12)) % (VOCABULARY - 8)  # each token follows from the one before
        lengths = torch.randint(6, 13, (n, 1), generator=generator)
        prompts = torch.randint(1, 5, (n, 1), generator=generator)
        attention = (torch.arange(12) < lengths).long()
        ids = ids.masked_fill(attention == 0, PAD)
        ids.scatter_(1, lengths - 1, PAD)  # ends with eos, which is the padding token too
        labels = ids.masked_fill(torch.arange(12) < prompts, -100)
        return {"input_ids": ids, "attention_mask": attention, "labels": labels}

    return World("llama", make, [batch(n) for n in (16, 16, 6)], [batch(16), batch(5)], causal_batch, accumulate=4)


WORLDS = {"cnn": images, "bert": texts, "llama": tokens}


def teacher_for(world: World, steps: int = 60) -> nn.Module:
    """A wider model of the same family that has learned the world a little."""
    torch.manual_seed(3)
    model = world.make(32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        batch = world.to_batch(world.train[step % len(world.train)])
        output = model(**batch.inputs) if isinstance(batch.inputs, dict) else model(batch.inputs)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), batch.labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


class Shuffled:
    """A loader in random order; ``die_at`` sends this process SIGTERM with that batch, counted over all passes."""

    def __init__(self, batches: list[Any], die_at: int | None = None) -> None:
        self.batches, self.die_at, self.given = batches, die_at, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for i in torch.randperm(len(self.batches)).tolist():
            if self.given == self.die_at:
                os.kill(os.getpid(), signal.SIGTERM)
            self.given += 1
            yield self.batches[i]


def state(run: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint of a run's distilled student holds: its weights, and the method's."""
    found = newest(run / "checkpoints" / "distilled-seed0")
    assert found is not None
    weights: dict[str, torch.Tensor] = load_checkpoint(found)["model"]
    return weights
