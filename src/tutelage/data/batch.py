"""The batch type for images, texts and token sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from tutelage.data.raw_values import Arguments as Arguments
from tutelage.data.raw_values import Inputs as Inputs
from tutelage.data.raw_values import as_inputs, as_tensor, check_lengths, numeric_targets
from tutelage.errors import DataError, shorten

IGNORE = -100
"""The label of unlabelled positions, as in torch and transformers."""

LABEL_KEYS = ("labels", "label")
"""Keys of the labels in a batch that is a mapping."""

PROBABILITIES = "teacher_probabilities"
"""The key of class probabilities that a teacher has computed before, in a batch that is a mapping."""

WINDOW_IDS = 2**40
"""Added to the id of a text that is cut into windows, for each window after the first."""

Task = Literal["classes", "multi-label", "regression", "embedding", "ranking"]
"""The kind of labels: one class, several classes, numbers, or none (embeddings, scores of two answers)."""

TextTask = Literal["classes", "multi-label", "regression", "tokens", "mlm", "causal", "embedding", "ranking"]
"""Tasks on texts. ``tokens`` has a class for each word; ``mlm`` is masked language modelling."""

LABELS: dict[TextTask, Task] = {
    "classes": "classes", "multi-label": "multi-label", "regression": "regression", "tokens": "classes",
    "mlm": "classes", "causal": "classes", "embedding": "embedding", "ranking": "ranking",
}  # fmt: skip
"""The kind of labels of each text task."""


@dataclass(frozen=True)
class Batch:
    """Inputs of teacher and student, labels, and the positions that count.

    ``labels[i]`` is the target of ``logits[i]``. For a causal language model the labels are already shifted by one
    (:func:`causal_batch`).

    Attributes:
        inputs: a tensor for the model's first argument, a mapping of keyword arguments, or :class:`Arguments`; rows
            first.
        labels: ``[B]`` or ``[B, L]`` class indices, -100 where there is no label.
        mask: same shape, true where a position counts for the teacher's terms; ``None``: all positions count.
        ids: ``[B]`` int64, a stable number for each sample; ``None`` if the source has none.
        views: ``[B]`` int64, the augmentation seed of each row; ``None``: not augmented.
        route: ``[B]`` int64, the index of the row's value in the column that selects teachers; ``None`` without one.
        task: the kind of labels. If it is not ``classes``, the labels are in ``targets``, and ``labels`` is 0 where
            there is a label, else -100.
        targets: ``[B, C]`` float: 0 or 1 for each class of ``multi-label``, or the numbers of ``regression``.
        teacher_inputs: the teacher's inputs, if they differ from the student's (another tokenizer, language or
            preprocessing of images); of an ensemble whose members differ, a mapping ``member_0`` ... to tensors.
        teacher_labels: ``[B, L']``, the shifted labels of the teacher's tokens, if its tokenizer differs.
        spans: for two tokenizers: ``student`` ``[B, L]`` and ``teacher`` ``[B, L']``. Positions that predict the same
            stretch of text have the same number on both sides; -1: no span.
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
                return type(value)({k: f(v) for k, v in value.items()})
            return f(value) if isinstance(value, Tensor) else value

        return replace(self, **{field.name: apply(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device``; copies from pinned memory are asynchronous."""
        return self._map(lambda x: x if x.device == torch.device(device) else x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; torch's ``DataLoader`` calls this."""
        return self._map(lambda x: x.pin_memory())

    def for_teacher(self) -> Batch:
        """The batch with the inputs and labels of the teacher."""
        if self.teacher_inputs is None:
            return self
        batch = replace(self, inputs=self.teacher_inputs, teacher_inputs=None, teacher_labels=None, spans=None)
        labels = self.teacher_labels
        return batch if labels is None else replace(batch, labels=labels, mask=labels != IGNORE)

    def reads_same_tokens(self) -> bool:
        """Whether teacher and student read the same tokens, but for those that are masked for the student."""
        own, theirs = self.inputs, self.teacher_inputs
        if not (isinstance(own, dict) and isinstance(theirs, dict) and {"input_ids"} <= own.keys() & theirs.keys()):
            return True
        mine, others = own["input_ids"], theirs["input_ids"]
        if mine.shape != others.shape:
            return False
        same = mine == others
        if self.labels.shape == mine.shape:  # of masked language modelling: the token that is masked
            same |= self.labels == others
        mask = own.get("attention_mask")
        return bool((same if mask is None else same | (mask == 0)).all())

    def for_member(self, number: int) -> Batch:
        """The batch with the inputs of one member of an ensemble, if the members' inputs differ."""
        theirs = self.teacher_inputs
        own = theirs.get(f"member_{number}") if isinstance(theirs, dict) else None
        return self if own is None else replace(self, teacher_inputs=own)

    def rows(self, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop``; instead of no row the first one, with a false mask and without label.

        A process without a row of a batch runs forward and backward on it, so that the other processes do not wait
        forever.
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
        """The given rows, in the given order."""
        return self._map(lambda x: x[rows.to(x.device)])

    def split(self, parts: int) -> list[Batch]:
        """``parts`` batches of consecutive rows whose sizes differ by at most one."""
        return [self.rows(start, stop) for start, stop in even_spans(len(self), parts)]

    def labelled(self) -> Tensor:
        """Mask in the shape of ``labels``: positions that count and have a label."""
        has = self.labels != IGNORE
        return has if self.mask is None else has & self.mask

    def counted(self) -> Tensor:
        """Mask in the shape of ``labels``: positions that count for the teacher's terms."""
        return torch.ones_like(self.labels, dtype=torch.bool) if self.mask is None else self.mask

    def check_finite(self) -> Batch:
        """This batch; raises :class:`DataError` if an input, or a target of a labelled row, is not finite."""
        tensors = self.inputs if isinstance(self.inputs, dict) else {"inputs": self.inputs}
        if self.targets is not None and self.labels.ndim == 1:
            tensors = {**tensors, "targets": self.targets.masked_fill((self.labels == IGNORE)[:, None], 0.0)}
        for name, x in tensors.items():
            # A finite sum proves that all values are finite, in one fast pass.
            if x.is_floating_point() and not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
                wrong = ~torch.isfinite(x)
                bad = wrong.view(len(x), -1).any(1).nonzero().flatten()
                columns = f", column {wrong.any(0).nonzero().flatten()[:5].tolist()}" if x.ndim == 2 else ""
                which = bad if self.ids is None else self.ids[bad.to(self.ids.device)]
                kind = "ids" if self.ids is not None else "rows of the batch"
                raise DataError(
                    f"{name} hold NaN or infinity in {len(bad)} of {len(x)} samples, {kind} {which[:5].tolist()}"
                    + columns,
                    remedy="remove or repair these samples; one of them is enough to make all weights NaN",
                )
        return self


def even_spans(length: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``range(length)`` into ``parts`` consecutive spans whose sizes differ by at most one."""
    bounds = [length * i // parts for i in range(parts + 1)]
    return list(pairwise(bounds))


def as_batch(raw: Any, task: Task = "classes") -> Batch:
    """Convert an item of a common loader to a :class:`Batch`.

    Accepts a :class:`Batch`, a pair ``(inputs, labels)``, a triple ``(inputs, labels, sample ids)``
    (:class:`IndexedDataset`), a mapping of keyword arguments with a key ``labels`` or ``label`` (Hugging Face), or
    inputs alone: a tensor, ``(inputs,)`` or a mapping without labels. The inputs of a pair are a tensor, a mapping of
    keyword arguments, or a tuple or list of positional arguments. Arrays and lists of numbers become tensors.

    Labels must stand at the positions of the logits they belong to. Hugging Face models shift the labels of a causal
    language model themselves; use :func:`causal_batch` for these.

    Args:
        raw: what the loader yields.
        task: the kind of labels. ``regression`` and ``multi-label`` labels are ``[B]`` or ``[B, C]`` numbers; NaN
            where there is none.

    Raises:
        DataError: another structure, or token labels that equal the inputs (not shifted).
    """
    if isinstance(raw, Batch):
        return raw
    given, labels, ids = _parts(raw)
    inputs = as_inputs(given)
    if inputs is None:
        raise _unknown_structure(raw)
    stored = raw.get(PROBABILITIES) if isinstance(raw, Mapping) else None
    if stored is not None:
        return replace(
            as_batch({k: v for k, v in raw.items() if k != PROBABILITIES}, task), teacher_inputs=as_tensor(stored)
        )
    if labels is None:
        rows = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
        check_lengths(inputs, rows)
        return Batch(inputs, torch.full((rows,), IGNORE), task=task)
    if as_tensor(labels) is None:
        raise DataError(f"labels are a {type(labels).__name__}, not a tensor", remedy="yield torch.tensor(labels)")
    return _labelled(inputs, labels if isinstance(labels, Tensor) else as_tensor(labels), ids, task)  # type: ignore[arg-type]


def _parts(raw: Any) -> tuple[Any, Any, Tensor | None]:
    """Inputs, labels and sample ids of what a loader yields."""
    if isinstance(raw, Mapping):
        return {k: v for k, v in raw.items() if k not in LABEL_KEYS}, raw.get("labels", raw.get("label")), None
    if not isinstance(raw, (tuple, list)) or (len(raw) > 3 and as_tensor(raw) is not None):
        return raw, None, None
    if len(raw) == 3:
        ids, rows = as_tensor(raw[2]), as_tensor(raw[1])
        if ids is not None and rows is not None and ids.dtype == torch.int64 and ids.shape == (len(rows),):
            check_ids(ids)
            return raw[0], raw[1], ids
    if len(raw) not in (1, 2):
        raise _unknown_structure(raw)
    return raw[0], raw[1] if len(raw) == 2 else None, None


def has_labels(raw: Any) -> bool:
    """Whether what a loader yields has a place for labels."""
    if isinstance(raw, Mapping):
        return any(key in raw for key in LABEL_KEYS)
    return isinstance(raw, Batch) or (isinstance(raw, (tuple, list)) and len(raw) in (2, 3))


def _unknown_structure(raw: Any) -> DataError:
    kind = type(raw).__name__ + (f" of {len(raw)}" if isinstance(raw, (tuple, list)) else "")
    return DataError(
        f"a batch is {kind}, neither tensors (inputs, labels[, int64 ids]) nor a mapping with 'labels'",
        remedy="name the positions, as in batch=('x', 'length', 'y'), or pass to_batch=, a function that converts it "
        "to a tutelage.data.Batch",
    )


def check_ids(ids: Tensor) -> None:
    """Raise :class:`DataError` if an id is there twice: it is another number, such as a label."""
    if ids.is_cpu and len(ids.unique()) < len(ids):
        raise DataError(
            "the third tensor of a batch is read as sample ids, but it has the same number in several rows: "
            f"{shorten(ids.tolist())}",
            remedy="name the positions of the loader's tuples: batch=('x', 'length', 'y'), or "
            "batch=('x', 'y', 'ids') for ids that may repeat; use '_' for a position that is not used",
        )


def _labelled(inputs: Inputs, labels: Tensor, ids: Tensor | None, task: Task) -> Batch:
    """A batch with labels of ``task``."""
    if not isinstance(inputs, dict) and len(inputs) != len(labels):
        raise DataError(f"{len(inputs)} inputs but {len(labels)} labels in one batch", remedy="yield one for each")
    check_lengths(inputs, len(labels))
    if task in ("regression", "multi-label"):
        has, targets = numeric_targets(labels, task == "multi-label")
        marks = torch.zeros(len(labels), dtype=torch.long, device=labels.device).masked_fill(~has, IGNORE)
        return Batch(inputs, marks, ids=ids, task=task, targets=targets)
    labels = _indices(labels)
    tokens = inputs.get("input_ids") if isinstance(inputs, dict) else None
    if tokens is not None and labels.shape == tokens.shape:
        counted = labels != IGNORE
        if bool(counted.any()) and bool((labels == tokens)[counted].all()):
            raise DataError(
                "labels equal input_ids: each position would predict its own token",
                remedy="a causal language model needs to_batch=tutelage.data.causal_batch, which shifts by one",
            )
    attention = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    padded = attention is not None and attention.shape == labels.shape
    mask = attention.bool() if padded and attention is not None else None
    return Batch(inputs, labels, mask=mask, ids=ids, task=task)


class IndexedDataset(torch.utils.data.Dataset[tuple[Any, ...]]):
    """Adds its index to each item of a data set, as the sample id that caches and CRD need.

    Args:
        data: returns ``(input, label)`` for an index, always the same pair.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (*self.data[index], index)


def _indices(labels: Tensor) -> Tensor:
    """Labels as int64."""
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"labels are {labels.dtype}, not class indices",
            remedy="numbers are task='regression', rows of 0 and 1 task='multi-label'; for one-hot rows of single "
            "classes use labels.argmax(-1)",
        )
    return labels.long()


def causal_batch(raw: Mapping[str, Tensor]) -> Batch:
    """A :class:`Batch` for a causal language model: position t predicts token t + 1.

    Args:
        raw: ``input_ids`` ``[B, L]``; ``attention_mask`` (default: all ones), which alone marks padding, since the
            padding token may also be the end-of-sequence token; ``labels``, unshifted as for Hugging Face, -100 for
            tokens that are not learned, such as a prompt (default: ``input_ids``).

    Returns:
        A batch with labels and mask ``[B, L]``; the last position never counts.
    """
    ids = raw["input_ids"]
    attention = raw.get("attention_mask", torch.ones_like(ids))
    targets = raw.get("labels", ids).masked_fill(attention == 0, IGNORE)
    labels = torch.full_like(targets, IGNORE)
    labels[:, :-1] = targets[:, 1:]
    # With left padding, a padding position precedes the first token and must not predict it.
    labels = labels.masked_fill(attention == 0, IGNORE)
    inputs = {k: v for k, v in raw.items() if k != "labels"}
    return Batch({**inputs, "attention_mask": attention}, labels, mask=labels != IGNORE)
