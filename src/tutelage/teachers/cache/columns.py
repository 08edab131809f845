"""Columns of numbers, with rows of one width or of different lengths, and the keys of rows."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError

Array = npt.NDArray[Any]

LONG = 64
"""Mean row length from which rows are copied one by one; for shorter rows, one index array is faster."""


@dataclass
class Ragged:
    """Rows of different lengths: the values of all rows, concatenated, and the length of each row."""

    values: Array
    lengths: Array


Columns = dict[str, Array | Ragged]


def concat_columns(parts: Sequence[Columns]) -> Columns:
    """The rows of several parts, concatenated."""
    result: Columns = {}
    for name in parts[0]:
        columns: list[Any] = [part[name] for part in parts]
        if isinstance(columns[0], Ragged):
            result[name] = Ragged(*(np.concatenate([getattr(c, n) for c in columns]) for n in ("values", "lengths")))
        else:
            result[name] = np.concatenate(columns)
    return result


def take_rows(columns: Columns, rows: Array) -> Columns:
    """The given rows."""
    out: Columns = {}
    for name, column in columns.items():
        if isinstance(column, Ragged):
            ends = np.cumsum(column.lengths)
            out[name] = take_ragged(column.values, ends - column.lengths, column.lengths, rows)
        else:
            out[name] = column[rows]
    return out


def take_ragged(values: Array, starts: Array, lengths: Array, rows: Array) -> Ragged:
    """The given rows of a ragged column."""
    selected = lengths[rows].astype(np.int64)
    first = starts[rows].astype(np.int64)
    if len(rows) and selected.mean() >= LONG:
        spans = zip(first.tolist(), (first + selected).tolist(), strict=True)
        return Ragged(np.concatenate([values[start:stop] for start, stop in spans]), selected)
    before = np.cumsum(selected) - selected
    at = np.arange(int(selected.sum())) + np.repeat(first - before, selected)
    return Ragged(values[at], selected)


def nbytes(columns: Columns) -> int:
    """Bytes of all columns."""
    return sum(c.values.nbytes + 4 * len(c.lengths) if isinstance(c, Ragged) else c.nbytes for c in columns.values())


def prefix_sums(values: Array) -> Array:
    """``[N + 1]`` sums of the values before each place, from 0 to the total."""
    out: Array = np.concatenate([[0], np.cumsum(values)]).astype(np.int64)
    return out


def sum_groups(values: Array, lengths: Array) -> Array:
    """The sum of each group, where consecutive groups have ``lengths`` values."""
    ends, total = np.cumsum(lengths), prefix_sums(values)
    out: Array = total[ends] - total[ends - lengths]
    return out


def sample_keys(batch: Batch) -> tuple[Array, Array]:
    """Sample ids and view seeds of a batch; seeds are 0 without augmentation."""
    if batch.ids is None:
        raise CapabilityError(
            "the batch has no sample ids, by which teacher outputs are stored",
            remedy="yield batches with ids=, or use the live teacher",
        )
    ids = batch.ids.cpu().numpy()
    return ids, np.zeros_like(ids) if batch.views is None else batch.views.cpu().numpy()


def hash_keys(ids: Array, views: Array) -> Array:
    """A 64-bit hash of each (id, view)."""
    with np.errstate(over="ignore"):
        mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= views.view(np.uint64) if views.dtype == np.int64 else views.astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        out: Array = mixed ^ (mixed >> np.uint64(32))
    return out


def sampling_seeds(ids: Array, views: Array) -> Tensor:
    """The seeds of the random draws of rows."""
    return torch.from_numpy(hash_keys(ids, views).view(np.int64))


def input_digest(batch: Batch, row: int) -> int:
    """A 64-bit digest of one sample: the teacher's input, which tokens count, and the route.

    Padding makes no difference, neither its length nor its side.
    """
    given = batch.for_teacher().inputs
    inputs = given if isinstance(given, dict) else {"": given}
    attended = inputs.get("attention_mask")
    digest = hashlib.blake2b(digest_size=8)

    def update(x: Tensor) -> None:
        values: Any = x[row]
        if attended is not None and attended.ndim == 2 and x.shape[:2] == attended.shape:
            values = values[attended[row].bool()]
        digest.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())

    for name, x in inputs.items():
        digest.update(name.encode())
        update(x)
    if batch.labels.ndim == 2:
        update(batch.counted())
    if batch.route is not None:
        update(batch.route)
    return int.from_bytes(digest.digest(), "little")
