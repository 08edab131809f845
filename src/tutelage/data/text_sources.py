"""Sources of texts (table files, folders of plain text, data sets of Hugging Face), and the labels of texts."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutelage.data.batch import IGNORE, TextTask
from tutelage.data.image_sources import load_hub_splits
from tutelage.data.raw_images import path_id
from tutelage.errors import ConfigError, DataError, did_you_mean, first_line, nearest, require, suggest

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
"""Suffixes of table files."""

Paths = str | Mapping[Any, str]


@dataclass
class RawTextSplit:
    """One split of a source.

    Attributes:
        columns: the columns of texts, labels and route, by name.
        ids: a stable number for each row.
    """

    columns: dict[str, Sequence[Any]]
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class RawTextData:
    """The splits of a source.

    Attributes:
        name: the path or the id, for messages.
        splits: the splits by name.
        names: class names, by column, of the columns that hold class indices.
        digest: fingerprint of the content.
    """

    name: str
    splits: dict[str, RawTextSplit]
    names: dict[str, list[str]] = field(default_factory=dict)
    digest: str = ""


def read_texts(
    source: str, *, path: Paths | None, options: dict[str, Any] | None, columns: Sequence[str]
) -> RawTextData:
    """Read columns of a source.

    Args:
        source: ``table``, ``plain`` or ``hf:DATASET_ID``.
        path: a file or a folder, or one for each split.
        options: arguments of ``load_dataset``.
        columns: names of the columns.

    Raises:
        ConfigError: the source is unknown.
        DataError: data is missing or broken, or a column does not exist.
    """
    columns = list(dict.fromkeys(columns))
    kind, _, name = source.partition(":")
    if kind == "hf" and name:
        return _huggingface(name, options or {}, columns)
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
            start += len(raw)
        if not len(raw):
            raise DataError("has no rows", where=files[split], remedy="give a file with texts")
    digest = hashlib.blake2b(source.encode(), digest_size=8)
    for split, file in files.items():
        for each in _files(Path(file)):
            name = each.suffix if each == Path(file) else each.relative_to(file).as_posix()
            digest.update(json.dumps([split, name, each.stat().st_size]).encode())
            with open(each, "rb") as opened:
                hashlib.file_digest(opened, lambda: digest)
    return RawTextData(str(path), splits, digest=digest.hexdigest())


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*.txt") if p.is_file())


def read_table(path: Path) -> Any:
    """Read a CSV, TSV, JSON-lines or Parquet file as an Arrow table.

    Raises:
        DataError: the file is missing, broken, or has another suffix.
    """
    import pyarrow as pa
    from pyarrow import csv, json, parquet

    if not path.is_file():
        raise DataError("no such file", where=str(path), remedy=did_you_mean(path, "check data.path"))
    if path.suffix not in TABLES:
        ending = f"the suffix {path.suffix}" if path.suffix else "no suffix"
        raise DataError(
            f"has {ending}, so the kind of table is unknown", where=str(path), remedy=f"allowed: {', '.join(TABLES)}"
        )
    # A block must fit the longest line; the default is 1 MiB, the maximum 2 GiB.
    block = min(max(path.stat().st_size + 1, 2**20), 2**31 - 1)
    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path)
        if path.suffix in (".json", ".jsonl"):
            return json.read_json(path, read_options=json.ReadOptions(block_size=block))
        delimiter = "\t" if path.suffix == ".tsv" else ","
        parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)  # a quoted text may have line breaks
        return csv.read_csv(path, read_options=csv.ReadOptions(block_size=block), parse_options=parse)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read as {path.suffix[1:]}: {first_line(error)}",
            where=str(path),
            remedy="repair the file, or download it again",
        ) from None


def _table(path: Path, columns: Sequence[str]) -> RawTextSplit:
    table = read_table(path)
    check_columns(columns, table.column_names, str(path))
    return RawTextSplit({name: table[name].to_pylist() for name in columns}, torch.arange(table.num_rows))


def check_columns(columns: Sequence[str], known: Sequence[str], where: str) -> None:
    """Raise :class:`DataError` if one of ``columns`` is unknown."""
    for column in columns:
        if column not in known:
            raise DataError(
                f"has no column {column!r}" + suggest(column, known),
                where=where,
                remedy=f"its columns: {', '.join(known)}",
            )


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
    return RawTextSplit(dict.fromkeys(columns, texts), torch.tensor(ids, dtype=torch.int64))


def _huggingface(name: str, options: dict[str, Any], columns: Sequence[str]) -> RawTextData:
    require("datasets", "text", f"the data set hf:{name}")
    import datasets

    parts = load_hub_splits(name, options)
    names: dict[str, list[str]] = {}
    splits, start = {}, 0
    for split, part in parts.items():
        check_columns(columns, list(part.features), f"hf:{name}")
        for column in columns:
            feature = part.features[column]
            inner = getattr(feature, "feature", feature)  # of a sequence of class labels
            if isinstance(inner, datasets.ClassLabel):
                names[column] = list(inner.names)
        splits[split] = RawTextSplit(
            {column: part[column][:] for column in columns}, torch.arange(start, start + len(part))
        )
        start += len(part)
    digest = "-".join(str(getattr(part, "_fingerprint", "")) for part in parts.values())
    return RawTextData(f"hf:{name}", splits, names, digest)


def resolve_class_names(
    raw: RawTextData, label: Sequence[str], task: TextTask, classes: Sequence[str] | None
) -> list[str]:
    """Class names in the order of the logits: the given ones, those of the source, or the sorted labels.

    Raises:
        DataError: the data has labels that are not among ``classes``.
    """
    if task in ("regression", "mlm", "causal", "embedding", "ranking"):
        return list(label) if task == "regression" else []
    if task == "multi-label" and len(label) > 1:
        names = list(label)
    elif label and label[0] in raw.names:
        names = raw.names[label[0]]
    else:
        values = [v for rows in raw.splits.values() for v in rows.columns[label[0]]]
        flat = values if task == "classes" else [x for v in values for x in (v or [])]
        labels = {_name(v) for v in flat if v is not None}
        try:
            names = sorted(labels, key=int)  # integers in numeric order
        except ValueError:
            names = sorted(labels)
    if classes is None:
        return names
    missing, unknown = sorted(set(names) - set(classes)), sorted(set(classes) - set(names))
    if missing:
        close = nearest(missing[0], unknown, 1)
        raise DataError(
            f"the data has labels that are not among the given classes: {', '.join(map(repr, missing[:5]))}"
            + (f" (is {missing[0]!r} the class {close[0]!r}?)" if close else ""),
            where="label map",
            remedy=f"classes are matched by name; given: {', '.join(list(classes)[:20])}",
        )
    return list(classes)


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, (bool, float)) and value == int(value) else str(value)


def encode_labels(
    raw: RawTextData, rows: RawTextSplit, label: Sequence[str], task: TextTask, names: list[str], split: str
) -> tuple[Tensor, Tensor | None, list[list[int]] | None]:
    """Class indices, targets, and the class of each word, of a split."""
    known, values = {name: i for i, name in enumerate(names)}, [rows.columns[c] for c in label]
    numbered = raw.names.get(label[0]) if label else None

    def index(value: Any) -> int:
        return known[numbered[value] if numbered is not None else _name(value)]

    def has(value: Any) -> bool:
        return value is not None and not (numbered is not None and isinstance(value, int) and value < 0)

    if task == "classes":
        return torch.tensor([index(v) if has(v) else IGNORE for v in values[0]], dtype=torch.int64), None, None
    none = torch.full((len(rows),), IGNORE)
    if task == "tokens":
        tags = [[index(v) if has(v) else IGNORE for v in (row or [])] for row in values[0]]
        return torch.zeros_like(none), None, tags
    if task == "regression" or (task == "multi-label" and len(label) > 1):
        table = [[_number(v, c, raw, split) for v in values[i]] for i, c in enumerate(label)]
        targets = torch.tensor(table).T.contiguous()
        if task == "regression":
            return torch.where(targets.isnan().any(1), none, 0), targets.nan_to_num(0.0), None
        return torch.zeros_like(none), targets, None
    if task == "multi-label":
        targets = torch.zeros(len(rows), len(names))
        for i, row in enumerate(values[0]):
            targets[i, [index(v) for v in (row or [])]] = 1.0
        return torch.zeros_like(none), targets, None
    return none, None, None


def _number(value: Any, column: str, raw: RawTextData, split: str) -> float:
    if value is None:
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(
            f"column {column!r} of the {split} split holds {value!r}, not a number",
            where=raw.name,
            remedy="give numbers, or set another data.task",
        ) from None
