"""Cells of labels that hold several values: lists of numbers become columns."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tutelage.data.text_checks import is_missing, place
from tutelage.data.text_sources import RawTextData, RawTextSplit
from tutelage.errors import DataError, shorten


def expand_targets(raw: RawTextData, label: Sequence[str]) -> tuple[RawTextData, list[str]]:
    """The data with a column for each value of a column of lists, ``size[0]``, ``size[1]`` ..., and their names.

    Other columns are left as they are.

    Raises:
        DataError: a row has another number of values than the first.
    """
    column = label[0] if len(label) == 1 else ""
    lists = [v for rows in raw.splits.values() for v in rows.columns.get(column, ()) if isinstance(v, list)]
    if not lists:
        return raw, list(label)
    names = [f"{column}[{i}]" for i in range(len(lists[0]))]
    if not names or isinstance(lists[0][0], list):
        raise DataError(
            f"column {column!r} holds {shorten(lists[0])}, no list of numbers",
            where=raw.name,
            remedy="give each row a list of as many numbers as there are targets",
        )

    def values(split: str, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        for row, value in enumerate(rows[column]):
            if not is_missing(value) and (not isinstance(value, list) or len(value) != len(names)):
                raise DataError(
                    f"{place(row, column, split)}: {shorten(value)} is not a list of {len(names)} numbers, as the "
                    "first row has",
                    where=raw.name,
                    remedy="give every row as many numbers as there are targets; null for a row without label",
                )
        cells = [value if isinstance(value, list) else [None] * len(names) for value in rows[column]]
        return {name: [value[i] for value in cells] for i, name in enumerate(names)}

    splits = {
        k: RawTextSplit({**rows.columns, **values(k, rows.columns)}, rows.ids) for k, rows in raw.splits.items()
    }
    return replace(raw, splits=splits), names
