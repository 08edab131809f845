"""Cells of labels that hold several values: separated labels become lists, lists of numbers become columns."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tutelage.data.text_checks import is_missing, place
from tutelage.data.text_sources import RawTextData, RawTextSplit
from tutelage.errors import DataError, shorten

SEPARATORS = (";", "|", ",")
"""What may separate the labels in one cell."""


def find_separator(values: Sequence[str], *, is_known: bool) -> str | None:
    """What separates the labels in the cells; ``None`` where each cell is one label, or a list as text.

    Without ``is_known`` that cells hold several labels, the labels must be fewer than the different cells.
    """
    cells, best = set(values), (0, "")
    for separator in SEPARATORS:
        labels = {label for cell in cells for label in _labels_of(cell, separator)}
        count = sum(separator in cell for cell in cells)
        if count > best[0] and (is_known or len(labels) < len(cells)) and not any(map(_is_list, cells)):
            best = count, separator
    return best[1] or None


def split_labels(raw: RawTextData, column: str, separator: str) -> RawTextData:
    """The data with a list of labels in place of each cell of separated labels; an empty cell is no label.

    Raises:
        DataError: a cell holds a list.
    """

    def split(name: str, row: int, cell: Any) -> list[Any] | None:
        if isinstance(cell, list) or (isinstance(cell, str) and _is_list(cell)):
            raise DataError(
                f"{place(row, column, name)}: {shorten(cell)} is a list, and data.separator is for separated labels",
                where=raw.name,
                remedy="save lists as JSON lines or Parquet, without data.separator"
                if isinstance(cell, str)
                else "remove data.separator",
            )
        if is_missing(cell):
            return None
        return _labels_of(cell, separator) if isinstance(cell, str) else [cell]

    splits = {
        name: RawTextSplit(
            {**rows.columns, column: [split(name, row, cell) for row, cell in enumerate(rows.columns[column])]},
            rows.ids,
        )
        for name, rows in raw.splits.items()
    }
    return replace(raw, splits=splits)


def _labels_of(cell: str, separator: str) -> list[str]:
    return [label for each in cell.split(separator) if (label := each.strip())]


def _is_list(cell: str) -> bool:
    return cell.strip().startswith("[") and cell.strip().endswith("]")


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
