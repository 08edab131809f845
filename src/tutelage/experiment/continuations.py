"""Sample generations: teacher and students continue the same texts of the test split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tutelage.data.batch import IGNORE, Batch
from tutelage.methods.sampling import sample_completions

OPENING = 0.25
"""The share of a text without a prompt that models continue."""
LONGEST = 32
"""The maximum number of tokens of that share."""
READ = 512
"""Only the last tokens of a longer prompt are read."""


class Opening(NamedTuple):
    """A text of the test split to continue."""

    prompt: Tensor
    rest: Tensor


def opening(batch: Batch) -> Opening | None:
    """Of a batch of one row; of packed texts the first is taken.

    The prompt of a conversation is all before its last answer; that of a text which is learned whole is its first
    quarter, at most :data:`LONGEST` tokens.
    """
    assert isinstance(batch.inputs, dict)
    ids, labels = batch.inputs["input_ids"][0], batch.labels[0]
    if "attention_mask" in batch.inputs:
        there = batch.inputs["attention_mask"][0].bool()
        ids, labels = ids[there], labels[there]
    elif "position_ids" in batch.inputs:
        begins = (batch.inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        stop = begins[1] if len(begins) > 1 else len(ids)
        ids, labels = ids[:stop], labels[:stop]
    learned = labels != IGNORE
    starts = (learned & ~torch.cat([learned.new_zeros(1), learned[:-1]])).nonzero().flatten()
    if not len(starts):
        return None
    begin = int(starts[-1]) + 1
    end = int(learned.nonzero().max()) + 2
    if begin <= 1:
        begin = max(min(int(len(ids) * OPENING), LONGEST), 1)
    return Opening(ids[:begin][-READ:], ids[begin:end])


def select_rows(test: Iterable[Batch], count: int) -> list[Batch]:
    """``count`` rows from the full split, each as a batch; they do not depend on the batch size."""
    selected: list[tuple[str, Batch]] = []
    number = 0
    for batch in test:
        for at in range(len(batch)):
            key, number = hashlib.sha256(str(number).encode()).hexdigest(), number + 1
            if len(selected) >= count and key > selected[-1][0]:
                continue
            row = batch.rows(at, at + 1)
            if opening(row) is not None and opening(row.for_teacher()) is not None:
                selected = sorted([*selected, (key, row)], key=lambda one: one[0])[:count]
    return [row for _, row in selected]


def generate_continuations(
    models: Mapping[str, tuple[nn.Module, Any]], rows: Sequence[Batch], most: int, device: torch.device
) -> list[dict[str, str]]:
    """The rows as texts: ``prompt``, ``data`` (how it goes on in the data), and each model's continuation by name."""
    texts: list[dict[str, str]] = [{} for _ in rows]
    for name, (model, tokenizer) in models.items():
        openings = [one for row in rows if (one := opening(row.for_teacher() if name == "teacher" else row))]
        first = next(model.parameters(), None)
        prompts = [one.prompt.to(device if first is None else first.device) for one in openings]
        outputs = sample_completions(model, prompts, max_new_tokens=most, temperature=0)
        for text, one, (ids, begin) in zip(texts, openings, outputs, strict=True):

            def decode(tokens: Tensor, tokenizer: Any = tokenizer) -> str:
                return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

            text[name] = decode(ids[begin:])
            text.setdefault("prompt", decode(one.prompt))
            text.setdefault("data", decode(one.rest[:most]))
    return texts
