"""Sources of texts (table files, folders of plain text, data sets of Hugging Face), and the labels of texts."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutelage.data.batch import IGNORE, TextTask
from tutelage.data.image_sources import load_hub_splits
from tutelage.data.raw_images import path_id
from tutelage.data.table_files import read_table, table_parts
from tutelage.data.text_checks import is_missing, place
from tutelage.errors import ConfigError, DataError, nearest, require, shorten, suggest

TOOLS = "tools"
"""The column of the functions that a chat template describes to the model."""

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
        has_tools: whether there is a column ``tools``, which chat templates take beside the messages.
    """

    name: str
    splits: dict[str, RawTextSplit]
    names: dict[str, list[str]] = field(default_factory=dict)
    digest: str = ""
    has_tools: bool = False


def read_texts(
    source: str, *, path: Paths | None, options: dict[str, Any] | None, columns: Sequence[str],
    texts: Sequence[str] = (),
) -> RawTextData:  # fmt: skip
    """Read columns of a source.

    Args:
        source: ``table``, ``plain`` or ``hf:DATASET_ID``.
        path: a file or a folder, or one for each split.
        options: arguments of ``load_dataset``.
        columns: names of the columns.
        texts: those whose cells in a CSV file are texts, whatever they look like.

    Raises:
        ConfigError: the source is unknown.
        DataError: data is missing or broken, or a column does not exist.
    """
    columns = list(dict.fromkeys(columns))
    kind, _, name = source.partition(":")
    if kind == "hf" and name:
        return _huggingface(name, options or {}, columns)
    if source not in ("plain", "table"):
        names = ["plain", "table", "hf:DATASET_ID"]
        raise ConfigError(
            f"data.source: unknown source of texts {source!r}" + suggest(source, names),
            remedy=f"allowed: {', '.join(names)}",
        )
    assert path is not None
    files = {"train": path} if isinstance(path, str) else dict(path)
    start, has_tools, splits = 0, False, dict[str, RawTextSplit]()
    for split, file in files.items():
        if source == "plain":
            splits[split] = _plain(Path(file), columns)
        else:
            table = read_table(Path(file), texts)
            check_columns(columns, table.column_names, str(file))
            splits[split] = RawTextSplit({n: table[n].to_pylist() for n in columns}, torch.arange(table.num_rows))
            has_tools |= TOOLS in table.column_names and table[TOOLS].null_count < table.num_rows
    for split, raw in splits.items():
        if source == "table":  # continue the numbers of the file before
            raw.ids = raw.ids + start
            start += len(raw)
        if not len(raw):
            raise DataError("has no rows", where=files[split], remedy="give a file with texts")
    digest = hashlib.blake2b(source.encode(), digest_size=8)
    for split, file in files.items():
        for each in table_parts(Path(file)) if source == "table" else _files(Path(file)):
            name = each.suffix if each == Path(file) else each.relative_to(file).as_posix()
            digest.update(json.dumps([split, name, each.stat().st_size]).encode())
            with open(each, "rb") as opened:
                hashlib.file_digest(opened, lambda: digest)
    return RawTextData(str(path), splits, digest=digest.hexdigest(), has_tools=has_tools)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*.txt") if p.is_file())


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
    parts.pop("unlabeled", None)
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
    has_tools = any(TOOLS in p.features and any(v is not None for v in p[TOOLS][:]) for p in parts.values())
    return RawTextData(f"hf:{name}", splits, names, digest, has_tools)


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
        labels = {_name(v) for v in flat if not is_missing(v)}
        if not labels:
            raise DataError(
                f"column {label[0]!r} has no labels", where=raw.name, remedy="name the column of labels: data.label"
            )
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
    is_whole = isinstance(value, bool) or (isinstance(value, float) and value.is_integer())
    return str(int(value)) if is_whole else str(value)


def encode_labels(
    raw: RawTextData, rows: RawTextSplit, label: Sequence[str], task: TextTask, names: list[str], split: str
) -> tuple[Tensor, Tensor | None, list[list[int]] | None]:
    """Class indices, targets, and the class of each word, of a split."""
    known, values = {name: i for i, name in enumerate(names)}, [rows.columns[c] for c in label]
    numbered = raw.names.get(label[0]) if label else None

    def index(value: Any) -> int:
        return known[numbered[value] if numbered is not None else _name(value)]

    def has(value: Any) -> bool:
        return not is_missing(value) and not (numbered is not None and isinstance(value, int) and value < 0)

    if task == "classes":
        return torch.tensor([index(v) if has(v) else IGNORE for v in values[0]], dtype=torch.int64), None, None
    none = torch.full((len(rows),), IGNORE)
    if task == "tokens":
        tags = [[index(v) if has(v) else IGNORE for v in (row or [])] for row in values[0]]
        return torch.tensor([0 if any(tag != IGNORE for tag in row) else IGNORE for row in tags]), None, tags
    if task == "regression" or (task == "multi-label" and len(label) > 1):
        table = [[_number(v, place(r, c, split), raw) for r, v in enumerate(values[i])] for i, c in enumerate(label)]
        targets = torch.tensor(table).T.contiguous()
        outside = ((targets < 0) | (targets > 1)).nonzero() if task == "multi-label" else targets[:0]
        if len(outside):
            row, column = outside[0].tolist()
            raise DataError(
                f"{place(row, label[column], split)}: {shorten(values[column][row])} is not between 0 and 1",
                where=raw.name,
                remedy="give 1 for yes and 0 for no; numbers are data.task: regression",
            )
        return torch.where(targets.isnan().any(1), none, 0), targets.nan_to_num(0.0), None
    if task == "multi-label":
        targets = torch.zeros(len(rows), len(names))
        for i, row in enumerate(values[0]):
            targets[i, [index(v) for v in (row or []) if has(v)]] = 1.0
        unlabelled = [is_missing(row) or (len(row) > 0 and not any(map(has, row))) for row in values[0]]
        return torch.where(torch.tensor(unlabelled, dtype=torch.bool), none, 0), targets, None
    return none, None, None


def _number(value: Any, where: str, raw: RawTextData) -> float:
    if is_missing(value):
        return math.nan
    what, number = "a number", math.inf
    with suppress(TypeError, ValueError, OverflowError):
        number = float(value)
        what = "a finite number of float32"
    if abs(number) <= torch.finfo(torch.float32).max:
        return number
    raise DataError(
        f"{where}: {shorten(value)} is not {what}", where=raw.name, remedy="give numbers, or set another data.task"
    )
