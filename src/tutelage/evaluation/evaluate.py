"""Evaluates a model, and compares it with its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.data.batch import IGNORE, Batch, even_spans
from tutelage.data.loader import RankSlice
from tutelage.errors import CapabilityError, DataError
from tutelage.evaluation.metrics import METRICS, Metrics, Scores
from tutelage.evaluation.spans import SpanScores, are_span_tags
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
    """Metrics of ``model`` over ``batches``; the model keeps its mode.

    Args:
        teacher: the teacher output for each batch, from :func:`get_teacher_output`, in the same order.
        share: which rows of every batch this process evaluates.
        watch: called with the logits of the counted positions of each batch, ``[N, C]``.
    """

    of_head = vocabulary_head(model) is not None

    def run(batch: Batch) -> TeacherOutput:
        where = predicted_positions(batch) if of_head else None
        with torch.no_grad():
            seen = observe(model, batch.inputs, Needs() if where is None else OF_HEAD)
            return _to_output(seen.logits, seen.head, where)

    with evaluating(model):
        return _result(_accumulate(run, type(model).__name__, batches, device, teacher, share, watch).reduce(reduce))


def evaluate_teacher(
    teacher: Teacher,
    batches: Iterable[Batch],
    device: torch.device,
    outputs: Iterable[TeacherOutput] | None = None,
    watch: Callable[[Tensor], object] | None = None,
) -> dict[str, Any]:
    """Metrics of a teacher, in its own precision and with its own routes.

    Args:
        outputs: its output for each batch, from :func:`get_teacher_output`, if they are computed already.
    """
    stored = None if outputs is None else iter(outputs)

    def run(batch: Batch) -> TeacherOutput:
        return get_teacher_output(teacher, batch) if stored is None else _to_device(next(stored), device)

    return _result(_accumulate(run, "teacher", batches, device, watch=watch))


def _result(scores: Metrics) -> dict[str, Any]:
    result = scores.result()
    if not result["n"]:
        raise DataError(
            "no sample of the evaluation data has a label, so nothing can be measured",
            remedy=f"give evaluation data with labels; {IGNORE} is no label",
        )
    return result


OF_HEAD = Needs(logits=False, head=True)

TeacherOutput = Tensor | Head
"""Logits ``[B, ..., C]``; or, for a vocabulary, the output head with its inputs at the N predicted tokens. Their
logits ``[N, V]`` are computed in chunks."""


CHUNK = 1 << 24
"""The maximum number of vocabulary logits in memory at a time, for student and teacher each."""


def predicted_positions(batch: Batch) -> Tensor | None:
    """``[B, L]``, true for the tokens to predict in language modelling; ``None`` if each row has one label."""
    return batch.labelled() if batch.labels.ndim == 2 and isinstance(batch.inputs, dict) else None


def get_teacher_output(teacher: Teacher, batch: Batch) -> TeacherOutput:
    """The logits of a teacher for a batch, or its output head's inputs."""
    model = getattr(teacher, "model", None)
    of_head = "head" in teacher.provides and model is not None and vocabulary_head(model) is not None
    where = predicted_positions(batch) if of_head else None
    signal = teacher.signal(batch, Needs() if where is None else OF_HEAD)
    return _to_output(signal.logits, signal.head, where)


def _to_output(logits: Tensor | None, head: Head | None, where: Tensor | None) -> TeacherOutput:
    if where is None:
        assert logits is not None
        return logits
    assert head is not None
    return head._replace(inputs=head.inputs[where])


def _to_device(output: TeacherOutput, device: torch.device | str) -> TeacherOutput:
    if isinstance(output, Tensor):
        return output.to(device)
    return output.map(lambda x: x.to(device))


def count_classes(output: TeacherOutput) -> int:
    """The number of classes that an output scores."""
    return output.shape[-1] if isinstance(output, Tensor) else output.size


def _accumulate(
    run: Callable[[Batch], TeacherOutput],
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
        labels = batch.labels[batch.labels != IGNORE]
        lowest, highest = (int(v) for v in labels.aminmax()) if labels.numel() else (0, 0)
        if lowest < 0:
            raise DataError(
                f"the evaluation data has a label {lowest}",
                remedy=f"use class indices as labels, and {IGNORE} for a sample without a label",
            )
        mine = batch.rows(start, stop).to(device)
        output = run(mine)
        if batch.task == "classes" and highest >= count_classes(output):
            raise CapabilityError(
                f"the data has a label {highest}, the {who} scores classes 0 to {count_classes(output) - 1}",
                remedy="set its number of classes",
            )
        reference = None if theirs is None else next(theirs)
        scores = _new_scores(batch, batches, device) if scores is None else scores
        if isinstance(output, Head):
            where = batch.labelled()
            begin, end = int(where[:start].sum()), int(where[:stop].sum())
            if reference is not None:
                reference = _to_device(_select_positions(reference, where, begin, end), device)
            _add_tokens(scores, output, mine.labels[mine.labelled()], reference)
            continue
        if reference is not None:
            assert isinstance(reference, Tensor)
            reference = (reference[start:stop] if start < stop else reference[: len(output)]).to(device)
        scores.add(output, mine, reference, (start, stop, len(batch)))
        if watch is not None and batch.task == "classes":
            watch(output.flatten(0, -2).float()[mine.counted().flatten()])
    if scores is None:
        raise DataError("the evaluation data yields no batches", remedy="check its data set and drop_last")
    return scores


def _new_scores(batch: Batch, batches: Iterable[Batch], device: torch.device) -> Metrics:
    names = getattr(batches, "tag_names", ())
    return SpanScores(device, names) if are_span_tags(names) else METRICS[batch.task](device)


def _select_positions(output: TeacherOutput, where: Tensor, begin: int, end: int) -> TeacherOutput:
    """The part of a full batch's output for the predicted tokens ``begin`` to ``end``."""
    if isinstance(output, Tensor):
        return output[where.to(output.device)][begin:end]
    return output._replace(inputs=output.inputs[begin:end])


@torch.no_grad()
def _add_tokens(scores: Metrics, head: Head, labels: Tensor, reference: TeacherOutput | None) -> None:
    """Add predicted tokens in chunks whose logits fit in memory."""
    size = max(CHUNK // head.size, 1)
    assert isinstance(scores, Scores)
    scores.has_tokens = True
    for at in range(0, len(labels), size):
        some = slice(at, at + size)
        part = Batch(labels[some], labels[some])
        theirs = None
        if reference is not None:
            theirs = reference[some] if isinstance(reference, Tensor) else reference.scores(some)
        scores.add(head.scores(some), part, theirs, (0, len(part), len(part)))
