"""What tells a caller's own training data from other data, for a cache of what a teacher says of it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from tutelage.data import Batch, LoaderBatches, RankSlice
from tutelage.errors import CapabilityError, DataError
from tutelage.teachers.cache import input_digest

AGAIN = 8
"""Batches that are looked at a second time, to see whether a sample always looks the same."""


def samples(
    loader: Iterable[Any],
    to_batch: Callable[[Any], Batch],
    shown: Callable[[Iterator[list[Batch]]], Iterable[list[Batch]]] = lambda batches: batches,
) -> dict[str, Any]:
    """How many samples a loader gives, a digest of their ids, and one of what each of them looks like, as JSON.

    It does not depend on their order or on the size of a batch. The loader is read once, without any model, and the
    first batches of another epoch after that.

    Args:
        loader: of training data.
        to_batch: makes batches of what it yields.
        shown: wraps the iteration.

    Raises:
        CapabilityError: batches without ids, augmented ones, or a sample that does not always look the same.
        DataError: ids that are not one whole number for each sample, or the loader drops some.
    """
    batches = LoaderBatches(loader, 0, to_batch)
    batches.check_no_drop_last()
    ids, digests = [], []
    for (batch,) in itertools.chain(
        shown(batches.epoch(0, RankSlice())), itertools.islice(batches.epoch(1, RankSlice()), AGAIN)
    ):
        ids.append(_ids(batch))
        digests.append(np.array([input_digest(batch, row) for row in range(len(batch))], dtype=np.uint64))
    every = np.stack([np.concatenate(ids).view(np.uint64), np.concatenate(digests)], 1)
    every = np.unique(every, axis=0)
    again = np.flatnonzero(every[1:, 0] == every[:-1, 0])
    if len(again):
        raise CapabilityError(
            f"the sample of id {int(every[again[0], 0])} does not always look the same: the loader augments, or two "
            f"samples have this id ({len(again)} such samples)",
            where="distill(cache=...)",
            remedy="take the augmentation out, or give every sample a number of its own; a recipe with data.augment "
            "and data.views keeps several views of a sample",
        )
    return {
        "samples": len(every),
        "ids": hashlib.sha256(every[:, 0].tobytes()).hexdigest()[:16],
        "inputs": hashlib.sha256(every[:, 1].tobytes()).hexdigest()[:16],
    }


def _ids(batch: Batch) -> Any:
    if batch.ids is None:
        raise CapabilityError(
            "a cache keeps the teacher's word by sample id, and the loader's batches have none",
            where="distill(cache=...)",
            remedy="tutelage.data.IndexedDataset(data) numbers the samples of a data set of pairs; else "
            "set ids in to_batch, or leave cache out",
        )
    if batch.views is not None:
        raise CapabilityError(
            "the loader's batches are augmented, each time in another view, and the cache would not be read again",
            where="distill(cache=...)",
            remedy="take the augmentation out; a recipe with data.augment and data.views keeps several views",
        )
    if batch.ids.shape != (len(batch),) or batch.ids.dtype != torch.int64:
        raise DataError(
            f"the ids of a batch of {len(batch)} are {batch.ids.dtype} {tuple(batch.ids.shape)}",
            where="distill(cache=...)",
            remedy="give one int64 for each sample",
        )
    return batch.ids.cpu().numpy()


def tokenizer(loader: Iterable[Any]) -> dict[str, Any] | None:
    """Class and vocabulary of the tokenizer that a loader's collator has, as those of transformers do."""
    found = getattr(getattr(loader, "collate_fn", None), "tokenizer", None)
    vocabulary = getattr(found, "get_vocab", None)
    if not callable(vocabulary):
        return None
    text = json.dumps(sorted(vocabulary().items()), ensure_ascii=True)
    known = {"class": type(found).__name__, "vocabulary": hashlib.sha256(text.encode()).hexdigest()[:16]}
    template = getattr(found, "chat_template", None)
    return (
        known if not template else known | {"chat_template": hashlib.sha256(str(template).encode()).hexdigest()[:16]}
    )
