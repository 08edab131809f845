"""Loaders and data sets of the caller."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from tutelage.errors import DataError, first_line


def as_loader(given: Any, name: str, batch_size: int, *, shuffle: bool) -> tuple[Any, str | None]:
    """A loader of batches for what the caller gives, and a note if that is not what was given.

    Data sets of torch and of Hugging Face, whose items are single samples, get a ``DataLoader``.

    Args:
        given: a loader, or a data set.
        name: of the argument, for messages.
        batch_size: of the loader that is made.
        shuffle: whether that loader shuffles.

    Raises:
        DataError: several splits in one object.
    """
    of_hub = type(given).__module__.partition(".")[0] == "datasets"
    if of_hub and isinstance(given, dict):
        raise DataError(
            f"distill({name}=...) is a {type(given).__name__} with the splits {', '.join(map(str, given))}",
            remedy=f"give one of them, as in {name}=data[{next(iter(given), 'train')!r}]",
        )
    if not of_hub and not isinstance(given, Dataset):
        return given, None
    is_stream = isinstance(given, IterableDataset) or not hasattr(given, "__getitem__")
    if of_hub and (getattr(given, "format", None) or {}).get("type") is None and hasattr(given, "with_format"):
        given = given.with_format("torch")
    shuffle = shuffle and not is_stream
    generator = torch.Generator() if shuffle else None
    loader = DataLoader(given, batch_size, shuffle, collate_fn=_Collate(name), generator=generator)
    how = ", shuffled" if shuffle else ""
    return loader, f"{name} is a data set: it is read in batches of {batch_size}{how} (train.batch_size)"


def length_of(loader: Any) -> int | None:
    """The number of batches of a loader, if it knows it."""
    try:
        return len(loader)
    except TypeError:
        return None


def first_item(loader: Iterable[Any], name: str) -> Any:
    """The first item of a loader, without a trace in torch's random numbers; :class:`DataError` without one."""
    with torch.random.fork_rng(devices=[]):
        first = next(iter(loader), None)
    if first is None:
        raise DataError(f"{name} yields no batches", remedy="check its data set and drop_last")
    return first


class _Collate:
    """torch's ``default_collate``, with a message for samples of different sizes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, samples: list[Any]) -> Any:
        try:
            return default_collate(samples)
        except (RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"the samples of {self.name} cannot be put into one batch: {first_line(error)}",
                remedy="give a DataLoader with a collate_fn, such as transformers.DataCollatorWithPadding",
            ) from error
