"""Files of prompts, seed tasks and texts to evaluate on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from tutelage.errors import DataError, refusal

PromptRow = dict[str, Any]


def _jsonl(path: Path) -> Iterator[PromptRow]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise DataError("is no JSON object", where=f"{path}:{number}", remedy="write one object a line")
            yield row


def _json(path: Path) -> Iterator[PromptRow]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError("is no list of JSON objects", where=str(path), remedy="write [{...}, {...}]")
    yield from rows


def _csv(path: Path) -> Iterator[PromptRow]:
    with open(path, encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _parquet(path: Path) -> Iterator[PromptRow]:
    import pyarrow.parquet

    yield from pyarrow.parquet.read_table(path).to_pylist()


def _txt(path: Path) -> Iterator[PromptRow]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            yield {"prompt": line.strip()}


READERS: dict[str, Callable[[Path], Iterator[PromptRow]]] = {
    ".csv": _csv, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet, ".txt": _txt,
}  # fmt: skip
"""Readers by the suffix of the file."""


def read_rows(file: str, what: str) -> list[PromptRow]:
    """The rows of a file; raises :class:`DataError` if it is empty or unreadable. Messages name ``what`` it holds."""
    path = Path(file)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"is no file of {what}", where=file, remedy=f"its name must end in one of: {', '.join(READERS)}"
        )
    try:
        rows = list(reader(path))
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  (pyarrow, csv and json each have errors of their own)
        reason = refusal(error) if isinstance(error, OSError) else " ".join(str(error).split())[:200]
        raise DataError(f"cannot be read: {reason}", where=file, remedy=f"give a file of {what}") from None
    if not rows:
        raise DataError(f"holds no {what}", where=file, remedy="give a file that is not empty")
    return rows


def row_names(rows: list[PromptRow], file: str) -> list[str]:
    """The name of each row: its column ``id``, or its number. Two equal names are a :class:`DataError`."""
    names = [str(row["id"]) if row.get("id") is not None else str(i) for i, row in enumerate(rows)]
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(
            f"two rows have the id {twice!r}", where=file, remedy="give each row an id of its own, or none"
        )
    return names


def read_tasks(file: str | None) -> list[str]:
    """Seed tasks from a file, whose rows need an ``instruction``; without a file, those of this package."""
    if file is None:
        text = resources.files(__package__).joinpath("seeds.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
    else:
        rows = read_rows(file, "tasks")
    tasks = []
    for number, row in enumerate(rows, 1):
        task, more = row.get("instruction", row.get("prompt")), row.get("input")
        if not isinstance(task, str) or not task.strip():
            raise DataError(
                f"row {number} has no instruction", where=str(file), remedy="each row needs a column 'instruction'"
            )
        tasks.append(task.strip() + (f"\n\n{more.strip()}" if isinstance(more, str) and more.strip() else ""))
    return tasks
