"""How good a model is, and how like its teacher: sums over positions, never means of means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.data.batch import Batch, spans
from tutelage.data.loader import Share
from tutelage.engine.scores import METRICS, Metrics
from tutelage.errors import CapabilityError, DataError
from tutelage.taps import Head, Needs, observe
from tutelage.teachers.signal import Teacher


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    teacher: Iterable[Tensor] | None = None,
    share: Share = Share(),  # noqa: B008 - frozen
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
    watch: Callable[[Tensor], object] | None = None,
) -> dict[str, Any]:
    """Metrics of ``model`` over ``batches``; the model's mode is left as it was.

    Args:
        model: any module that gives logits.
        batches: unaugmented.
        device: where the model is.
        teacher: the teacher's logits for each batch, ``[B, ..., C]``, in the same order.
        share: which rows of every batch this process evaluates.
        reduce: sums a tensor over processes.
        watch: is shown the logits of the positions that count, ``[N, C]``, batch after batch.
    """

    def ask(batch: Batch) -> Tensor:
        where = guessed(batch)
        with torch.no_grad():
            seen = observe(model, batch.inputs, Needs() if where is None else OF_HEAD)
            return _logits(seen.logits, seen.head, where)

    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        return _scored(ask, type(model).__name__, batches, device, teacher, share, watch).reduce(reduce).result()
    finally:
        for module in training:
            module.training = True


def evaluate_teacher(
    teacher: Teacher,
    batches: Iterable[Batch],
    device: torch.device,
    said: Iterable[Tensor] | None = None,
    watch: Callable[[Tensor], object] | None = None,
) -> dict[str, Any]:
    """Metrics of a teacher by what it says, in its own numbers and by its own routes.

    Args:
        teacher: is asked for its logits.
        batches: unaugmented.
        device: where it is asked.
        said: its logits for each batch, where it was asked already.
        watch: as in :func:`evaluate`.
    """
    known = None if said is None else iter(said)

    def ask(batch: Batch) -> Tensor:
        return said_at(teacher, batch) if known is None else next(known).to(device)

    return _scored(ask, "teacher", batches, device, watch=watch).result()


OF_HEAD = Needs(logits=False, head=True)


def guessed(batch: Batch) -> Tensor | None:
    """``[B, L]`` where tokens are to be guessed, of masked language modelling; ``None`` where all positions count.

    A model is evaluated on those alone: scores of a whole vocabulary for all others would be seven times the work.
    """
    if batch.labels.ndim != 2 or not isinstance(batch.inputs, dict) or batch.mask is None:
        return None
    where = batch.labelled()
    return where if 2 * int(where.sum()) < int(batch.mask.sum()) else None


def said_at(teacher: Teacher, batch: Batch) -> Tensor:
    """A teacher's logits of a batch: ``[B, ..., C]``, or ``[N, C]`` of the tokens that are guessed."""
    where = guessed(batch) if "head" in teacher.provides else None
    signal = teacher.signal(batch, Needs() if where is None else OF_HEAD)
    return _logits(signal.logits, signal.head, where)


@torch.no_grad()
def _logits(logits: Tensor | None, head: Head | None, where: Tensor | None) -> Tensor:
    if where is None:
        assert logits is not None
        return logits
    assert head is not None
    return F.linear(head.inputs[where], head.weight, head.bias)


def _at(batch: Batch, where: Tensor) -> Batch:
    """The positions that are guessed as a batch of their own."""
    return Batch(batch.labels[where], batch.labels[where], task=batch.task)


def _scored(
    ask: Callable[[Batch], Tensor],
    who: str,
    batches: Iterable[Batch],
    device: torch.device,
    teacher: Iterable[Tensor] | None = None,
    share: Share = Share(),  # noqa: B008 - frozen
    watch: Callable[[Tensor], object] | None = None,
) -> Metrics:
    scores: Metrics | None = None
    theirs = iter(teacher) if teacher is not None else None
    for batch in batches:
        start, stop = spans(len(batch), share.world)[share.rank]
        highest = int(batch.labels.max()) if batch.labels.numel() else 0
        mine = batch.rows(start, stop).to(device)
        logits = ask(mine)
        if batch.task == "classes" and highest >= logits.shape[-1]:
            raise CapabilityError(
                f"the data has a label {highest}, the {who} scores classes 0 to {logits.shape[-1] - 1}",
                remedy="set its number of classes",
            )
        reference = None
        if theirs is not None:
            rows = next(theirs)
            where = guessed(batch)
            if where is not None:  # rows are positions
                start, stop = int(where[:start].sum()), int(where[:stop].sum())
            reference = (rows[start:stop] if start < stop else rows[: len(logits)]).to(device)
        if logits.ndim == 2 and mine.labels.ndim == 2:
            mine = _at(mine, mine.labelled())
        scores = METRICS[batch.task](device) if scores is None else scores
        scores.add(logits, mine, reference, (start, stop, len(batch)))
        if watch is not None and batch.task == "classes":
            watch(logits.flatten(0, -2).float()[mine.counted().flatten()])
    if scores is None:
        raise DataError("the evaluation data yields no batches", remedy="check its data set and drop_last")
    return scores
