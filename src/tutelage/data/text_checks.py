"""Checks of the values in the columns of texts and labels; a message names split, row and column."""

from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.data.batch import TextTask
from tutelage.errors import DataError, shorten


def is_missing(value: Any) -> bool:
    """Whether a cell holds no label: ``null``, NaN or an empty text."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def place(row: int, column: str, split: str) -> str:
    """Where a value stands."""
    return f"row {row} (the first is 0) of the {split} split, column {column!r}"


def check_text_values(
    rows: Mapping[str, Sequence[Any]], columns: Sequence[str], task: TextTask, split: str, where: str
) -> None:
    """Raise :class:`DataError` if a value is neither missing nor what the task reads from the column."""
    for column in columns:
        for row, value in enumerate(rows[column]):
            if value is None or (isinstance(value, str) and task != "tokens"):
                continue
            if task == "tokens":
                expected, remedy = "a list of words", "give each text as a list of words"
                fits = isinstance(value, list) and all(isinstance(word, str) for word in value)
            elif task == "causal" and len(columns) == 1 and isinstance(value, list):
                expected, remedy = "a conversation", "give each message a role and a text as content"
                fits = all(map(_is_message, value))
                if fits and all(message["role"] != "assistant" for message in value):
                    expected, remedy = "a conversation with an answer", "add messages with role assistant"
                    fits = False
            else:
                expected, remedy, fits = "a text", "name the column of texts: data.text", False
                if isinstance(value, list) and task == "causal":
                    remedy = "put prompt and answer into one column of messages, and name it: data.text: messages"
            if not fits:
                raise DataError(
                    f"{place(row, column, split)}: {shorten(value)} is a value of type {type(value).__name__}, "
                    f"not {expected}",
                    where=where,
                    remedy=remedy,
                )


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("content"), str) and "role" in message


def check_label_values(
    rows: Mapping[str, Sequence[Any]], labels: Sequence[str], task: TextTask, text: str, split: str, where: str
) -> None:
    """Raise :class:`DataError` if a label is a list where one is expected, or does not fit the words of its text."""
    lists = task == "tokens" or (task == "multi-label" and len(labels) == 1)
    for column in labels:
        for row, value in enumerate(rows[column]):
            if is_missing(value):
                continue
            one = (each for each in value if each is not None) if isinstance(value, list) else (value,)
            if isinstance(value, list) != lists or not all(isinstance(each, str | int | float) for each in one):
                raise DataError(
                    f"{place(row, column, split)}: {shorten(value)} is a value of type {type(value).__name__}, not "
                    + ("a list of labels" if lists else "one label"),
                    where=where,
                    remedy="if a cell holds several labels, set data.separator to what separates them"
                    if task == "multi-label" and isinstance(value, str)
                    else "name another column as data.label, or set another data.task",
                )
            if task == "tokens" and len(value) != len(rows[text][row] or []):
                raise DataError(
                    f"{place(row, column, split)}: {len(value)} labels for {len(rows[text][row] or [])} words",
                    where=where,
                    remedy="give one label for each word; null for a word without label",
                )
    if task in ("multi-label", "regression"):
        _check_complete(rows, labels, split, where)
    if task == "multi-label" and lists:
        _check_names(rows[labels[0]], labels[0], split, where)


def _check_names(values: Sequence[Any], column: str, split: str, where: str) -> None:
    """Raise :class:`DataError` if lists of numbers are no names of labels: targets, or yes and no for each class."""
    is_table = all(each in (0, 1) for value in values for each in value or ())
    for row, value in enumerate(values):
        if any(isinstance(each, float) and not each.is_integer() for each in value or ()):
            remedy = "for several targets set data.task: regression"
        elif value and is_table and len(set(value)) < len(value):
            remedy = "list only the labels of the row; or, for 0 and 1 for each class, use a column for each class"
        else:
            continue
        raise DataError(
            f"{place(row, column, split)}: {shorten(value)} is not a list of labels", where=where, remedy=remedy
        )


def _check_complete(rows: Mapping[str, Sequence[Any]], labels: Sequence[str], split: str, where: str) -> None:
    """Raise :class:`DataError` if a row has some of its labels only: cells of several columns, or of a list."""
    for row, cells in enumerate(zip(*(rows[column] for column in labels), strict=True)):
        values = cells[0] if isinstance(cells[0], list) else cells
        empty = [i for i, value in enumerate(values) if is_missing(value)]
        if empty and len(empty) < len(values):
            column, what = labels[0], f"value {empty[0]} (the first is 0) of the list is empty"
            if values is cells:
                filled = next(i for i in range(len(cells)) if i not in empty)
                column, what = labels[empty[0]], f"is empty, but column {labels[filled]!r} of the row is not"
            raise DataError(
                f"{place(row, column, split)}: {what}",
                where=where,
                remedy="give all labels of a row; or none, for a row without label",
            )


def check_routes(rows: Mapping[str, Sequence[Any]], column: str, split: str, where: str) -> None:
    """Raise :class:`DataError` if a row has no route."""
    row = next((row for row, value in enumerate(rows[column]) if is_missing(value)), None)
    if row is not None:
        raise DataError(
            f"{place(row, column, split)}: no value, so no teacher is chosen",
            where=where,
            remedy="give every row a value, or remove data.route",
        )
