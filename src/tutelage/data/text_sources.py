"""Sources of texts: table files, folders of plain text, data sets of Hugging Face."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutelage.data.image_sources import load_hub_splits, path_id
from tutelage.errors import ConfigError, DataError, did_you_mean, first_line, require, suggest

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
"""Suffixes of table files."""

Paths = str | Mapping[Any, str]


@dataclass
class RawTextSplit:
    """One split of a source.

    Attributes:
        columns: the columns of texts, labels and route, by name.
        length: number of rows.
        ids: a stable number for each row.
    """

    columns: dict[str, Sequence[Any]]
    length: int
    ids: Tensor


@dataclass
class RawTextData:
    """The splits of a source.

    Attributes:
        name: name of the source, for messages.
        splits: the splits by name.
        names: class names of the columns that hold class indices.
        digest: fingerprint of the content.
    """

    name: str
    splits: dict[str, RawTextSplit]
    names: dict[str, list[str]] = field(default_factory=dict)
    digest: str = ""


def open_texts(source: str, *, path: Paths | None, options: dict[str, Any], columns: Sequence[str]) -> RawTextData:
    """Read the given columns of a source.

    Args:
        source: ``table``, ``plain`` or ``hf:DATASET_ID``.
        path: a file or a folder, or one for each split.
        options: arguments of ``load_dataset``.
        columns: names of the columns.

    Raises:
        ConfigError: the source is unknown.
        DataError: data is missing or broken, or a column does not exist.
    """
    kind, _, name = source.partition(":")
    if kind == "hf" and name:
        return _huggingface(name, options, columns)
    readers: dict[str, Callable[[Path, Sequence[str]], RawTextSplit]] = {"plain": _plain, "table": _table}
    if source not in readers:
        names = [*readers, "hf:DATASET_ID"]
        raise ConfigError(
            f"data.source: unknown source of texts {source!r}" + suggest(source, names),
            remedy=f"allowed: {', '.join(names)}",
        )
    assert path is not None
    files = {"train": path} if isinstance(path, str) else dict(path)
    splits = {split: readers[source](Path(file), columns) for split, file in files.items()}
    start = 0
    for split, raw in splits.items():
        if source == "table":  # continue the numbers of the file before
            raw.ids = raw.ids + start
            start += raw.length
        if not raw.length:
            raise DataError("has no rows", where=files[split], remedy="give a file with texts")
    digest = hashlib.blake2b(digest_size=8)
    for split, file in files.items():
        digest.update(split.encode())
        for each in _files(Path(file)):
            with open(each, "rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    return RawTextData(str(path), splits, digest=digest.hexdigest())


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*.txt") if p.is_file())


# Tables ------------------------------------------------------------------------------------------------


def read_table(path: Path) -> Any:
    """Read a CSV, TSV, JSON-lines or Parquet file as an Arrow table.

    Raises:
        DataError: the file is missing, broken, or has another suffix.
    """
    import pyarrow as pa

    if not path.is_file():
        raise DataError("no such file", where=str(path), remedy=did_you_mean(path, "check data.path"))
    if path.suffix not in READERS:
        raise DataError(
            f"ends in {path.suffix or 'nothing'}", where=str(path), remedy=f"allowed: {', '.join(TABLES)}"
        )
    try:
        return READERS[path.suffix](path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read as {path.suffix[1:]}: {first_line(error)}",
            where=str(path),
            remedy="repair the file, or fetch it again",
        ) from None


def _table(path: Path, columns: Sequence[str]) -> RawTextSplit:
    """Read columns of a table file."""
    table = read_table(path)
    values = {}
    for column in columns:
        if column not in table.column_names:
            raise DataError(
                f"has no column {column!r}" + suggest(column, table.column_names),
                where=str(path),
                remedy=f"its columns: {', '.join(table.column_names)}",
            )
        values[column] = table[column].to_pylist()
    return RawTextSplit(values, table.num_rows, torch.arange(table.num_rows))


def _csv(path: Path, delimiter: str = ",") -> Any:
    from pyarrow import csv

    # A quoted text may hold line breaks, and a line may be longer than pyarrow's usual block of 1 MiB.
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    return csv.read_csv(path, read_options=csv.ReadOptions(block_size=_block(path)), parse_options=parse)


def _json(path: Path) -> Any:
    from pyarrow import json

    return json.read_json(path, read_options=json.ReadOptions(block_size=_block(path)))


def _block(path: Path) -> int:
    """A block size that fits any line: the file size, up to the maximum of pyarrow."""
    return min(max(path.stat().st_size + 1, 2**20), 2**31 - 1)


def _parquet(path: Path) -> Any:
    from pyarrow import parquet

    return parquet.read_table(path)


READERS: dict[str, Callable[[Path], Any]] = {
    ".csv": _csv, ".json": _json, ".jsonl": _json, ".parquet": _parquet, ".tsv": lambda path: _csv(path, "\t"),
}  # fmt: skip
"""The reader of a table, by suffix."""


# Plain text --------------------------------------------------------------------------------------------


def _plain(path: Path, columns: Sequence[str]) -> RawTextSplit:
    """Read the paragraphs (separated by empty lines) of .txt files."""
    if not path.exists():
        raise DataError("no such file or folder", where=str(path), remedy="check data.path")
    texts, ids = [], []
    for file in _files(path):
        try:
            content = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"is not UTF-8: {error.reason} at byte {error.start}",
                where=str(file),
                remedy="convert it: iconv -t UTF-8",
            ) from None
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        for i, paragraph in enumerate(p for p in content.split("\n\n") if p.strip()):
            texts.append(" ".join(paragraph.split()))
            ids.append(path_id(f"{name}#{i}"))
    if not texts:
        raise DataError("has no text", where=str(path), remedy="give files that end in .txt and contain text")
    return RawTextSplit(dict.fromkeys(columns, texts), len(texts), torch.tensor(ids, dtype=torch.int64))


# Hugging Face ------------------------------------------------------------------------------------------


def _huggingface(name: str, options: dict[str, Any], columns: Sequence[str]) -> RawTextData:
    require("datasets", "text", f"the data set hf:{name}")
    import datasets

    parts = load_hub_splits(name, options)
    names: dict[str, list[str]] = {}
    splits, start = {}, 0
    for split, part in parts.items():
        for column in columns:
            if column not in part.features:
                raise DataError(
                    f"hf:{name} has no column {column!r}" + suggest(column, list(part.features)),
                    remedy=f"its columns: {', '.join(part.features)}",
                )
            feature = part.features[column]
            inner = getattr(feature, "feature", feature)  # of a sequence of class labels
            if isinstance(inner, datasets.ClassLabel):
                names[column] = list(inner.names)
        splits[split] = RawTextSplit(
            {column: part[column][:] for column in columns}, len(part), torch.arange(start, start + len(part))
        )
        start += len(part)
    digest = "-".join(str(getattr(part, "_fingerprint", "")) for part in parts.values())
    return RawTextData(f"hf:{name}", splits, names, digest)
