"""Inputs and labels as loaders yield them, as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.errors import DataError


class Arguments(dict[str, Tensor]):
    """The positional arguments of a model, by their number.

    A model whose ``forward`` takes so many positional arguments gets them one by one; any other gets one tuple.
    """

    is_positional = True


Inputs = Tensor | dict[str, Tensor]


def as_tensor(value: Any) -> Tensor | None:
    """A tensor, array, number or list of numbers as a tensor; ``None`` for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.from_numpy(np.array(value)) if value.dtype.kind in "fiub" else None
    return torch.tensor(value) if isinstance(value, (list, tuple)) and _is_numeric(value) else None


def _is_numeric(values: Sequence[Any]) -> bool:
    """Whether ``values`` are numbers, or lists of numbers of one length."""
    if values and isinstance(first := values[0], (list, tuple)):
        return all(isinstance(v, (list, tuple)) and len(v) == len(first) and _is_numeric(v) for v in values)
    return bool(values) and all(isinstance(v, (bool, int, float, np.number)) for v in values)


def as_inputs(raw: Any) -> Inputs | None:
    """Inputs of a model: a tensor, keyword arguments, or positional arguments; ``None`` if there is no tensor.

    Values of a mapping that are no tensors, such as texts, are left out.
    """
    if (tensor := as_tensor(raw)) is not None:
        return tensor
    if isinstance(raw, Mapping):
        named = {str(k): x for k, v in raw.items() if (x := as_tensor(v)) is not None}
        return named or None
    if isinstance(raw, (tuple, list)) and raw:
        values = [as_tensor(v) for v in raw]
        if all(v is not None for v in values):
            return Arguments({str(i): v for i, v in enumerate(values) if v is not None})
    return None


def check_lengths(inputs: Inputs, rows: int) -> None:
    """Raise :class:`DataError` unless every input has ``rows`` rows."""
    for name, x in (inputs if isinstance(inputs, dict) else {"inputs": inputs}).items():
        if x.ndim == 0 or len(x) != rows:
            who = f"input {name!r}" if isinstance(inputs, dict) else "the input"
            given = "is one number" if x.ndim == 0 else f"has {len(x)} rows"
            ragged = isinstance(inputs, Arguments) and len(inputs) == rows
            raise DataError(
                f"{who} {given}, but the batch has {rows} labels",
                remedy="pad samples of different lengths in the loader's collate_fn, for example with "
                "torch.nn.utils.rnn.pad_sequence"
                if ragged
                else "yield tensors with the batch as first dimension, or convert them by to_batch=",
            )


def numeric_targets(labels: Tensor, is_multi_label: bool) -> tuple[Tensor, Tensor]:
    """Which rows are labelled, ``[B]``, and their targets ``[B, C]``: numbers, or 0 and 1 for each class.

    A row of NaN is not labelled, and for classes one of -100 neither.

    Raises:
        DataError: a row that is labelled in part, a target that is no number, or one of a class above 1 or below 0.
    """
    targets = labels.to(torch.float32)
    targets = targets[:, None] if targets.ndim == 1 else targets
    if targets.ndim != 2:
        raise DataError(
            f"labels are {tuple(labels.shape)}", remedy="yield one row for each sample: [B] for one target, or [B, C]"
        )
    absent = targets.isnan() | ((targets == -100) & is_multi_label)
    missing = absent.all(1)
    for wrong, what, remedy in (
        (absent.any(1) & ~missing, "has a target for some columns only", "give all targets of a sample, or none"),
        (targets.isinf().any(1), "has an infinite target", "give a number"),
        (
            is_multi_label & ~missing & ((targets < 0) | (targets > 1)).any(1),
            "has a label that is not between 0 and 1",
            "give 1 for each class of the sample and 0 for the others; numbers are task='regression'",
        ),
    ):
        if bool(wrong.any()):
            raise DataError(f"row {int(wrong.nonzero()[0])} of a batch {what}", remedy=remedy)
    return ~missing, targets.nan_to_num(0.0).masked_fill(missing[:, None], 0.0)
