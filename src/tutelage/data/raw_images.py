"""Splits of images as a source gives them, before they are resized and split."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from tutelage.data.batch import IGNORE

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
UNLABELED = ("unlabeled", "unlabelled", "unsupervised")
"""Names of a folder or split of training images without labels."""


@dataclass(frozen=True)
class RawSplit:
    """A split of a source: labels, and pixels or a function that opens an image.

    Attributes:
        labels: ``[N]`` class indices; -100 without label.
        ids: ``[N]`` stable sample ids.
        pixels: uint8 ``[N, C, H, W]``; ``None`` if there is ``open``.
        open: row -> PIL image.
        route: int64 ``[N]``, index of the route of each row.
    """

    labels: Tensor
    ids: Tensor
    pixels: Tensor | None = None
    open: Callable[[int], Any] | None = None
    route: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor) -> Self:
        """The split with only the given rows."""
        tensors = {"labels": self.labels, "ids": self.ids, "pixels": self.pixels, "route": self.route}
        chosen: dict[str, Any] = {name: x[rows] for name, x in tensors.items() if x is not None}
        return replace(self, open=None if self.open is None else partial(_open_row, self.open, rows), **chosen)


def _open_row(opener: Callable[[int], Any], rows: Tensor, row: int) -> Any:
    return opener(int(rows[row]))


@dataclass
class RawImages:
    """A source: its splits, its class names, and the mean and standard deviation of its pixels, if known."""

    classes: list[str]
    splits: dict[str, RawSplit]
    mean: list[float] | None = None
    std: list[float] | None = None
    route_names: list[str] = field(default_factory=list)
    """The value of each index in ``route``."""
    note: str | None = None
    """One line on what the source contains and is not read."""


def index_values(values: Iterable[Any], names: list[str]) -> Tensor:
    """The index of each value in ``names``, which gets new values in alphabetical order."""
    texts = [str(value) for value in values]
    names += sorted(set(texts) - set(names))
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[text] for text in texts], dtype=torch.int64)


def join_unlabeled(splits: dict[str, RawSplit]) -> dict[str, RawSplit]:
    """The splits, with the one called ``unlabeled`` at the end of the training split; no two images share an id."""
    extra, start = splits.pop("unlabeled", None), 0
    if extra is not None and len(extra):
        train = splits["train"]
        splits["train"] = RawSplit(
            torch.cat([train.labels, torch.full_like(extra.labels, IGNORE)]),
            torch.cat([train.ids, extra.ids + len(train)]),
            open=partial(_open_joined, train, extra),
            route=None if train.route is None or extra.route is None else torch.cat([train.route, extra.route]),
        )
    for name, split in splits.items():
        splits[name] = replace(split, ids=split.ids + start)
        start += len(split)
    return splits


def _open_joined(first: RawSplit, second: RawSplit, row: int) -> Any:
    part, place = (first, row) if row < len(first) else (second, row - len(first))
    assert part.open is not None
    return part.open(place)


def path_id(path: str) -> int:
    """A stable sample id, from a path relative to the data set's folder."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big") >> 1
