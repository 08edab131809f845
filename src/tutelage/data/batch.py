"""A batch: the same type for images, texts and token sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from tutelage.errors import DataError

IGNORE = -100
"""Label of a position that has none; the value that torch and transformers use."""

Inputs = Tensor | dict[str, Tensor]

Task = Literal["classes", "multi-label", "regression", "embedding", "ranking"]
"""What labels are: one class of several, any number of them, numbers, or none: the teacher says an embedding, or
scores of two answers."""

TextTask = Literal["classes", "multi-label", "regression", "tokens", "mlm", "causal", "embedding", "ranking"]
"""What is done with texts: one class, any number of classes, numbers, a class for each word, words that are masked,
the next token, an embedding, scores of a query's answers."""

LABELS: dict[TextTask, Task] = {
    "classes": "classes", "multi-label": "multi-label", "regression": "regression", "tokens": "classes",
    "mlm": "classes", "causal": "classes", "embedding": "embedding", "ranking": "ranking",
}  # fmt: skip
"""What the labels of a batch are."""


@dataclass(frozen=True)
class Batch:
    """What teacher and student see, and which positions count.

    ``labels[i]`` is the target of ``logits[i]``, position by position: for a causal language
    model they are already shifted by one (:func:`causal_batch`), and nothing later shifts again.

    Attributes:
        inputs: a tensor for the model's first argument, or a mapping of keyword arguments; rows first.
        labels: ``[B]`` or ``[B, L]`` class indices, -100 where there is none.
        mask: same shape, true where a position counts for the teacher's terms; ``None``: all do.
        ids: ``[B]`` int64, one stable number for each sample; ``None`` where the source has none.
        views: ``[B]`` int64, the seed of the augmentation of each row; ``None``: not augmented.
        route: ``[B]`` int64, the number of each row's value in the column by which teachers are chosen;
            ``None`` where there is no such column.
        task: what the labels are. Where they are not one class of several, ``targets`` has them, and ``labels`` only
            says which positions have any: 0, or -100.
        targets: ``[B, C]`` float, 0 or 1 for each class of ``multi-label``, or the numbers of ``regression``.
        teacher_inputs: what the teacher sees where that is not what the student sees: another tokenizer's ids, a
            text in another language.
        teacher_labels: ``[B, L']``, what of its own tokens the teacher is to predict, already shifted, where they
            are another tokenizer's.
        spans: of such tokens, which of the teacher's stand for the same stretch of text as which of the student's:
            ``student`` ``[B, L]`` and ``teacher`` ``[B, L']``, at the positions that predict them, numbers that are
            the same on both sides, or -1.
    """

    inputs: Inputs
    labels: Tensor
    mask: Tensor | None = None
    ids: Tensor | None = None
    views: Tensor | None = None
    route: Tensor | None = None
    task: Task = "classes"
    targets: Tensor | None = None
    teacher_inputs: Inputs | None = None
    teacher_labels: Tensor | None = None
    spans: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def _map(self, f: Any) -> Batch:
        def apply(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: f(v) for k, v in value.items()}
            return f(value) if isinstance(value, Tensor) else value

        return replace(self, **{field.name: apply(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device``, copied asynchronously from pinned memory."""
        return self._map(lambda x: x if x.device == torch.device(device) else x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; called by torch's ``DataLoader``."""
        return self._map(lambda x: x.pin_memory())

    def for_teacher(self) -> Batch:
        """The batch with what the teacher sees as its inputs, and the labels of its tokens where they are others."""
        if self.teacher_inputs is None:
            return self
        shown = replace(self, inputs=self.teacher_inputs, teacher_inputs=None, teacher_labels=None, spans=None)
        theirs = self.teacher_labels
        return shown if theirs is None else replace(shown, labels=theirs, mask=theirs != IGNORE)

    def rows(self, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop``. An empty slice is the first row with nothing that counts.

        A process that has no row of an uneven batch must still run forward and backward, or the
        others would wait for it; its stand-in row carries no label and a false mask.
        """
        if start == 0 and stop >= len(self):
            return self
        if start < stop:
            return self._map(lambda x: x[start:stop])
        one = self._map(lambda x: x[:1])
        return replace(
            one, labels=torch.full_like(one.labels, IGNORE), mask=torch.zeros_like(one.labels, dtype=torch.bool)
        )

    def take(self, rows: Tensor) -> Batch:
        """The given rows, in that order."""
        return self._map(lambda x: x[rows.to(x.device)])

    def split(self, parts: int) -> list[Batch]:
        """``parts`` batches of consecutive rows whose sizes differ by at most one."""
        return [self.rows(start, stop) for start, stop in even_spans(len(self), parts)]

    def labelled(self) -> Tensor:
        """Positions that have a label and count, as booleans in the shape of ``labels``."""
        has = self.labels != IGNORE
        return has if self.mask is None else has & self.mask

    def counted(self) -> Tensor:
        """Positions that count for the teacher's terms, as booleans in the shape of ``labels``."""
        return torch.ones_like(self.labels, dtype=torch.bool) if self.mask is None else self.mask

    def check_finite(self) -> Batch:
        """This batch; raises :class:`DataError` when an input is NaN or infinite."""
        tensors = self.inputs if isinstance(self.inputs, dict) else {"inputs": self.inputs}
        for name, x in tensors.items():
            # A sum is one fast pass that NaN and infinity cannot leave finite; only then look closer.
            if x.is_floating_point() and not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
                bad = (~torch.isfinite(x)).view(len(x), -1).any(1).nonzero().flatten()
                which = bad if self.ids is None else self.ids[bad.to(self.ids.device)]
                kind = "ids" if self.ids is not None else "rows of the batch"
                raise DataError(
                    f"{name} hold NaN or infinity in {len(bad)} of {len(x)} samples, {kind} {which[:5].tolist()}",
                    remedy="remove or repair these samples; one of them makes every weight NaN",
                )
        return self


def even_spans(length: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``range(length)`` into ``parts`` consecutive spans whose sizes differ by at most one."""
    bounds = [length * i // parts for i in range(parts + 1)]
    return list(pairwise(bounds))


def as_batch(raw: Any) -> Batch:
    """A :class:`Batch` from what common loaders yield.

    Accepts a :class:`Batch`, a pair ``(inputs, labels)``, a triple ``(inputs, labels, sample ids)``
    (:class:`IndexedDataset`), or a mapping of keyword arguments with a key ``labels`` (Hugging Face). Labels must
    stand at the positions of the logits they belong to. Hugging Face models shift the labels of a causal language
    model themselves; use :func:`causal_batch` for these.

    Raises:
        DataError: another structure, or token labels that are the inputs themselves (not yet shifted).
    """
    if isinstance(raw, Batch):
        return raw
    if isinstance(raw, Mapping):
        inputs: Inputs = {k: v for k, v in raw.items() if isinstance(v, Tensor) and k not in ("labels", "label")}
        labels = raw.get("labels", raw.get("label"))
        if labels is None:
            raise DataError(
                f"the batch has no key 'labels', only {', '.join(map(str, raw))}",
                remedy="yield labels (-100 where there is none), or pass to_batch=, a function that makes a Batch",
            )
        labels = _indices(labels)
        ids = inputs.get("input_ids") if isinstance(inputs, dict) else None
        if ids is not None and labels.shape == ids.shape:
            counted = labels != IGNORE
            if bool(counted.any()) and bool((labels == ids)[counted].all()):
                raise DataError(
                    "labels equal input_ids: each position would be asked for its own token",
                    remedy="a causal language model needs to_batch=tutelage.data.causal_batch, which shifts by one",
                )
        attention = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        padded = attention is not None and attention.shape == labels.shape
        return Batch(inputs, labels, mask=attention.bool() if padded and attention is not None else None)
    if isinstance(raw, (tuple, list)) and len(raw) in (2, 3) and all(isinstance(x, Tensor) for x in raw):
        inputs, labels, *third = raw
        if len(inputs) != len(labels):
            raise DataError(
                f"{len(inputs)} inputs but {len(labels)} labels in one batch", remedy="yield one for each"
            )
        if not third:
            return Batch(inputs, _indices(labels))
        if third[0].dtype == torch.int64 and third[0].shape == (len(inputs),):
            return Batch(inputs, _indices(labels), ids=third[0])
    shown = type(raw).__name__ + (f" of {len(raw)}" if isinstance(raw, (tuple, list)) else "")
    raise DataError(
        f"a batch is {shown}, not a pair of tensors (inputs, labels), with int64 ids or not, or a mapping with "
        "'labels'",
        remedy="pass to_batch=, a function that makes a tutelage.data.Batch of it",
    )


class IndexedDataset(torch.utils.data.Dataset[tuple[Any, ...]]):
    """The pairs of another data set, each with its place as a third: a sample id, which a cache and CRD need.

    Args:
        data: gives ``(input, label)`` for a place, always the same.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: int) -> tuple[Any, ...]:
        return (*self.data[place], place)


def _indices(labels: Any) -> Tensor:
    """Labels as int64."""
    if not isinstance(labels, Tensor):
        raise DataError(f"labels are a {type(labels).__name__}, not a tensor", remedy="yield torch.tensor(labels)")
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"labels are {labels.dtype}, not class indices",
            remedy="yield integers, one for each sample; of one-hot rows: labels.argmax(-1)",
        )
    return labels.long()


def causal_batch(raw: Mapping[str, Tensor]) -> Batch:
    """A :class:`Batch` for a causal language model: position t is asked for token t + 1.

    Args:
        raw: ``input_ids`` ``[B, L]``; ``attention_mask`` (default: all ones), by which padding is
            recognised, and never by the value of a token, since the padding token may be the
            end-of-sequence token too; ``labels``, unshifted as for Hugging Face, -100 where a
            token is not to be learned, such as a prompt (default: ``input_ids``).

    Returns:
        labels and mask ``[B, L]``, whose last position never counts.
    """
    ids = raw["input_ids"]
    attention = raw.get("attention_mask", torch.ones_like(ids))
    targets = raw.get("labels", ids).masked_fill(attention == 0, IGNORE)
    labels = torch.full_like(targets, IGNORE)
    labels[:, :-1] = targets[:, 1:]
    # A position that is itself padding has nothing to predict from, whatever follows it (left padding).
    labels = labels.masked_fill(attention == 0, IGNORE)
    inputs = {k: v for k, v in raw.items() if k != "labels"}
    return Batch({**inputs, "attention_mask": attention}, labels, mask=labels != IGNORE)
