"""Rows as columns of numbers, of one width or of any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LONG = 64
"""From this mean length on, rows are copied one by one: an index for each number would cost more than they."""


@dataclass
class Ragged:
    """Rows of different lengths: all values in a row, and where each row ends."""

    values: Array
    lengths: Array


Columns = dict[str, Array | Ragged]


def concat_columns(parts: Sequence[Columns]) -> Columns:
    """Rows of several parts after each other."""
    joined: Columns = {}
    for name in parts[0]:
        columns = [part[name] for part in parts]
        if isinstance(columns[0], Ragged):
            joined[name] = Ragged(
                np.concatenate([c.values for c in columns]),  # type: ignore[union-attr]
                np.concatenate([c.lengths for c in columns]),  # type: ignore[union-attr]
            )
        else:
            joined[name] = np.concatenate(columns)  # type: ignore[arg-type]
    return joined


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
    some = lengths[rows].astype(np.int64)
    first = starts[rows].astype(np.int64)
    if len(rows) and some.mean() >= LONG:
        spans = zip(first.tolist(), (first + some).tolist(), strict=True)
        return Ragged(np.concatenate([values[start:stop] for start, stop in spans]), some)
    before = np.cumsum(some) - some
    at = np.arange(int(some.sum())) + np.repeat(first - before, some)
    return Ragged(values[at], some)


def nbytes(columns: Columns) -> int:
    """Bytes of all columns."""
    return sum(c.values.nbytes + 4 * len(c.lengths) if isinstance(c, Ragged) else c.nbytes for c in columns.values())
