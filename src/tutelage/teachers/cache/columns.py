"""Columns of numbers, with rows of one width or of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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
