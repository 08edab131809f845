"""How good a model is, and how like its teacher: sums over positions, never means of means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.data.batch import Batch, even_spans
from tutelage.data.loader import RankSlice
from tutelage.errors import CapabilityError, DataError
from tutelage.evaluation.metrics import METRICS, Metrics
from tutelage.taps import Head, Needs, evaluating, observe, vocabulary_head
from tutelage.teachers.signal import Teacher


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    teacher: Iterable[TeacherOutput] | None = None,
    share: RankSlice = RankSlice(),  # noqa: B008 - frozen
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
    watch: Callable[[Tensor], object] | None = None,
) -> dict[str, Any]:
    """Metrics of ``model`` over ``batches``; the model's mode is left as it was.

    Args:
        model: any module that gives logits.
        batches: unaugmented.
        device: where the model is.
        teacher: the teacher's word on each batch, of :func:`get_teacher_output`, in the same order.
        share: which rows of every batch this process evaluates.
        reduce: sums a tensor over processes.
        watch: is shown the logits of the positions that count, ``[N, C]``, batch after batch.
    """

    of_head = vocabulary_head(model) is not None

    def ask(batch: Batch) -> TeacherOutput:
        where = guessed(batch) if of_head else None
        with torch.no_grad():
            seen = observe(model, batch.inputs, Needs() if where is None else OF_HEAD)
            return _said(seen.logits, seen.head, where)

    with evaluating(model):
        return _scored(ask, type(model).__name__, batches, device, teacher, share, watch).reduce(reduce).result()


def evaluate_teacher(
    teacher: Teacher,
    batches: Iterable[Batch],
    device: torch.device,
    said: Iterable[TeacherOutput] | None = None,
    watch: Callable[[Tensor], object] | None = None,
) -> dict[str, Any]:
    """Metrics of a teacher by what it says, in its own numbers and by its own routes.

    Args:
        teacher: is asked for its logits.
        batches: unaugmented.
        device: where it is asked.
        said: its word on each batch, of :func:`get_teacher_output`, where it was asked already.
        watch: as in :func:`evaluate`.
    """
    known = None if said is None else iter(said)

    def ask(batch: Batch) -> TeacherOutput:
        return get_teacher_output(teacher, batch) if known is None else placed(next(known), device)

    return _scored(ask, "teacher", batches, device, watch=watch).result()


OF_HEAD = Needs(logits=False, head=True)

TeacherOutput = Tensor | Head
"""Logits ``[B, ..., C]``; or of a vocabulary the head, with what goes into it at the N tokens that are guessed:
their scores ``[N, V]`` are made some at a time."""


CHUNK = 1 << 24
"""Most scores of a vocabulary that exist at a time, for each of student and teacher."""


def guessed(batch: Batch) -> Tensor | None:
    """``[B, L]`` where tokens are to be guessed, of language modelling; ``None`` where labels are of whole rows."""
    return batch.labelled() if batch.labels.ndim == 2 and isinstance(batch.inputs, dict) else None


def get_teacher_output(teacher: Teacher, batch: Batch) -> TeacherOutput:
    """A teacher's word on a batch."""
    model = getattr(teacher, "model", None)
    of_head = "head" in teacher.provides and model is not None and vocabulary_head(model) is not None
    where = guessed(batch) if of_head else None
    signal = teacher.signal(batch, Needs() if where is None else OF_HEAD)
    return _said(signal.logits, signal.head, where)


def _said(logits: Tensor | None, head: Head | None, where: Tensor | None) -> TeacherOutput:
    if where is None:
        assert logits is not None
        return logits
    assert head is not None
    return head._replace(inputs=head.inputs[where])


def placed(said: TeacherOutput, device: torch.device | str) -> TeacherOutput:
    """The same on another device."""
    if isinstance(said, Tensor):
        return said.to(device)
    return said.map(lambda x: x.to(device))


def count_classes(said: TeacherOutput) -> int:
    """How many classes are scored."""
    return said.shape[-1] if isinstance(said, Tensor) else len(said.weight)


def _scored(
    ask: Callable[[Batch], TeacherOutput],
    who: str,
    batches: Iterable[Batch],
    device: torch.device,
    teacher: Iterable[TeacherOutput] | None = None,
    share: RankSlice = RankSlice(),  # noqa: B008 - frozen
    watch: Callable[[Tensor], object] | None = None,
) -> Metrics:
    scores: Metrics | None = None
    theirs = iter(teacher) if teacher is not None else None
    for batch in batches:
        start, stop = even_spans(len(batch), share.world)[share.rank]
        highest = int(batch.labels.max()) if batch.labels.numel() else 0
        mine = batch.rows(start, stop).to(device)
        said = ask(mine)
        if batch.task == "classes" and highest >= count_classes(said):
            raise CapabilityError(
                f"the data has a label {highest}, the {who} scores classes 0 to {count_classes(said) - 1}",
                remedy="set its number of classes",
            )
        reference = None if theirs is None else next(theirs)
        scores = METRICS[batch.task](device) if scores is None else scores
        if isinstance(said, Head):
            where = batch.labelled()
            begin, end = int(where[:start].sum()), int(where[:stop].sum())
            if reference is not None:
                reference = placed(_positions(reference, where, begin, end), device)
            _add_tokens(scores, said, mine.labels[mine.labelled()], reference)
            continue
        if reference is not None:
            assert isinstance(reference, Tensor)
            reference = (reference[start:stop] if start < stop else reference[: len(said)]).to(device)
        scores.add(said, mine, reference, (start, stop, len(batch)))
        if watch is not None and batch.task == "classes":
            watch(said.flatten(0, -2).float()[mine.counted().flatten()])
    if scores is None:
        raise DataError("the evaluation data yields no batches", remedy="check its data set and drop_last")
    return scores


def _positions(said: TeacherOutput, where: Tensor, begin: int, end: int) -> TeacherOutput:
    """Of a whole batch's word the part on guessed tokens ``begin`` to ``end``."""
    if isinstance(said, Tensor):
        return said[where.to(said.device)][begin:end]
    return said._replace(inputs=said.inputs[begin:end])


@torch.no_grad()
def _add_tokens(scores: Metrics, said: Head, labels: Tensor, reference: TeacherOutput | None) -> None:
    """Add guessed tokens, so many at a time that their scores fit."""
    size = max(CHUNK // len(said.weight), 1)
    for at in range(0, len(labels), size):
        some = slice(at, at + size)
        part = Batch(labels[some], labels[some])
        theirs = None
        if reference is not None:
            theirs = reference[some] if isinstance(reference, Tensor) else reference.scores(some)
        scores.add(said.scores(some), part, theirs, (0, len(part), len(part)))
