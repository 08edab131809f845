"""Loaders of many kinds, and the same batches for a loop by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROWS, BATCH, WIDTH, RATE, TEMPERATURE = 18, 6, 4, 0.1, 2.0
GENERATOR = torch.Generator().manual_seed(2)
X = torch.randn(ROWS, WIDTH, generator=GENERATOR)
LENGTHS = torch.rand(ROWS, generator=GENERATOR) + 0.5
WEIGHT = torch.randn(2, WIDTH, generator=GENERATOR)


def front(x: Tensor, lengths: Tensor | None) -> Tensor:
    """``[B, 4]`` of any of the inputs: numbers, sequences, images; each row times its length."""
    if x.ndim == 4:
        x = x.flatten(1)
    if x.ndim == 3:
        x = x.mean(1)
    return x if lengths is None else x * lengths.unsqueeze(1)


@dataclass
class Loader:
    """What ``distill`` gets, and the same batches for the loop by hand.

    Attributes:
        items: what the loader yields.
        plain: arguments of the model and labels (``None`` without) of each of these.
        loader: in place of the list of items.
        options: of ``distill``.
        evaluation: in place of the loader.
        keywords: whether the model gets the arguments by name.
    """

    items: list[Any]
    plain: list[tuple[dict[str, Tensor], Tensor | None]]
    task: str = "classes"
    loader: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    evaluation: Any = None
    keywords: bool = False


def parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(BATCH) for x in tensors), strict=True))


def labels(x: Tensor = X, lengths: Tensor | None = None) -> Tensor:
    return (front(x, lengths) @ WEIGHT.T).argmax(1)


def simple(wrap: Callable[[Tensor, Tensor], Any], **rest: Any) -> Loader:
    pairs = parts(X, labels())
    return Loader([wrap(x, y) for x, y in pairs], [({"x": x}, y) for x, y in pairs], **rest)


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return X[index], labels()[index]


class Stream:
    """A loader without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(parts(X, labels()))


def nested() -> Loader:
    triples = parts(X, LENGTHS, labels(X, LENGTHS))
    return Loader([((x, n), y) for x, n, y in triples], [({"x": x, "lengths": n}, y) for x, n, y in triples])


def named_positions() -> Loader:
    triples = parts(X, LENGTHS, labels(X, LENGTHS))
    plain: list[Any] = [({"x": x, "lengths": n}, y) for x, n, y in triples]
    return Loader(list(triples), plain, options={"batch": ("x", "lengths", "y")}, keywords=True)


def alone(
    wrap: Callable[[Tensor], Any], evaluation: Callable[[Tensor, Tensor], Any], keywords: bool = False
) -> Loader:
    pairs = parts(X, labels())
    return Loader(
        [wrap(x) for x, _ in pairs], [({"x": x}, None) for x, _ in pairs],
        evaluation=[evaluation(x, y) for x, y in pairs], keywords=keywords,
    )  # fmt: skip


def regression() -> Loader:
    pairs = parts(X, X @ WEIGHT[0])
    return Loader(list(pairs), [({"x": x}, y) for x, y in pairs], task="regression")


def multi_label() -> Loader:
    pairs = parts(X, (X @ WEIGHT.T > 0).float())
    return Loader(list(pairs), [({"x": x}, y) for x, y in pairs], task="multi-label")


def of_lengths() -> Loader:
    sequences = [torch.randn(BATCH, n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in (3, 5, 4)]
    pairs = [(x, labels(x)) for x in sequences]
    return Loader(list(pairs), [({"x": x}, y) for x, y in pairs])


def images() -> Loader:
    pairs = parts(X.view(ROWS, 1, 2, 2), labels())
    return Loader(list(pairs), [({"x": x}, y) for x, y in pairs])


def hub() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"x": X.tolist(), "label": labels().tolist()})


def loader(dataset: Any) -> Any:
    return torch.utils.data.DataLoader(dataset, batch_size=BATCH)


LOADERS: dict[str, Callable[[], Loader]] = {
    "list of `(x, y)`": lambda: simple(lambda x, y: (x, y)),
    "list of `[x, y]`": lambda: simple(lambda x, y: [x, y]),
    "`DataLoader`": lambda: simple(
        lambda x, y: (x, y), loader=loader(torch.utils.data.TensorDataset(X, labels()))
    ),
    "`DataLoader` with ids": lambda: simple(
        lambda x, y: (x, y), loader=loader(torch.utils.data.TensorDataset(X, labels(), torch.arange(ROWS)))
    ),
    "NumPy arrays": lambda: simple(lambda x, y: (x.numpy(), y.numpy())),
    "lists of numbers": lambda: simple(lambda x, y: (x.tolist(), y.tolist())),
    "mapping with `labels`": lambda: simple(lambda x, y: {"x": x, "labels": y}, keywords=True),
    "mapping with texts": lambda: simple(
        lambda x, y: {"x": x, "label": y, "text": ["a"] * len(x)}, keywords=True
    ),
    "`(mapping, y)`": lambda: simple(lambda x, y: ({"x": x}, y), keywords=True),
    "nested `((x, lengths), y)`": nested,
    "`batch=(\"x\", \"lengths\", \"y\")`": named_positions,
    "`x` alone": lambda: alone(lambda x: x, lambda x, y: (x, y)),
    "`(x,)` alone": lambda: alone(lambda x: (x,), lambda x, y: (x, y)),
    "mapping without labels": lambda: alone(lambda x: {"x": x}, lambda x, y: {"x": x, "labels": y}, keywords=True),
    "numbers as labels": regression,
    "several labels": multi_label,
    "torch data set": lambda: simple(lambda x, y: (x, y), loader=Rows()),
    "Hugging Face data set": lambda: simple(lambda x, y: {"x": x, "labels": y}, loader=hub(), keywords=True),
    "stream without length": lambda: simple(
        lambda x, y: (x, y), loader=Stream(), evaluation=parts(X, labels()), options={"train": {"steps": 3}}
    ),
    "sequences of other lengths": of_lengths,
}  # fmt: skip
