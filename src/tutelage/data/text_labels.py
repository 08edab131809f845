"""Labels of texts: class names in the order of the logits, and class indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tutelage.data.batch import IGNORE, TextTask
from tutelage.data.text_sources import RawTextData, RawTextSplit
from tutelage.errors import DataError, nearest


def resolve_class_names(
    raw: RawTextData, label: Sequence[str], task: TextTask, classes: Sequence[str] | None
) -> list[str]:
    """Class names in the order of the logits: as given, as the source numbers them, or sorted.

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
            f"the data has labels that are not among the classes given: {', '.join(map(repr, missing[:5]))}"
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
    """Class indices, targets, and tags of words of a split."""
    known, values = {name: i for i, name in enumerate(names)}, [rows.columns[c] for c in label]
    numbered = raw.names.get(label[0]) if label else None

    def index(value: Any) -> int:
        return known[numbered[value] if numbered is not None else _name(value)]

    def has(value: Any) -> bool:
        return value is not None and not (numbered is not None and isinstance(value, int) and value < 0)

    if task == "classes":
        return torch.tensor([index(v) if has(v) else IGNORE for v in values[0]], dtype=torch.int64), None, None
    none = torch.full((rows.length,), IGNORE)
    if task == "tokens":
        tags = [[index(v) if has(v) else IGNORE for v in (row or [])] for row in values[0]]
        return torch.zeros_like(none), None, tags
    if task == "multi-label":
        if len(label) > 1:
            table = [[_number(v, c, raw, split) for v in values[i]] for i, c in enumerate(label)]
            targets = torch.tensor(table).T.contiguous()
        else:
            targets = torch.zeros(rows.length, len(names))
            for i, row in enumerate(values[0]):
                targets[i, [index(v) for v in (row or [])]] = 1.0
        return torch.zeros_like(none), targets, None
    if task == "regression":
        table = [[_number(v, c, raw, split) for v in values[i]] for i, c in enumerate(label)]
        targets = torch.tensor(table).T.contiguous()
        return torch.where(targets.isnan().any(1), none, 0), targets.nan_to_num(0.0), None
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
