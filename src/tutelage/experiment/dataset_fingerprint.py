"""Fingerprints of a caller's own training data, which tell whether a cache of teacher outputs belongs to it."""

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

REREAD_BATCHES = 8
"""Batches that are read a second time, to see whether a sample always looks the same."""


def short_hash(content: str | bytes) -> str:
    """The first 16 hex digits of a SHA-256."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def fingerprint_samples(
    loader: Iterable[Any],
    to_batch: Callable[[Any], Batch],
    watch: Callable[[Iterator[list[Batch]]], Iterable[list[Batch]]] = lambda batches: batches,
) -> dict[str, Any]:
    """The number of a loader's samples, a digest of their ids and one of their contents, as JSON.

    It does not depend on the samples' order or the batch size. Reads one epoch and the first batches of another,
    without any model.
    """
    batches = LoaderBatches(loader, 0, to_batch)
    batches.check_no_drop_last()
    ids, digests = [], []
    for (batch,) in itertools.chain(
        watch(batches.epoch(0, RankSlice())), itertools.islice(batches.epoch(1, RankSlice()), REREAD_BATCHES)
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
            remedy="remove the augmentation, or give every sample its own id; a recipe with data.augment "
            "and data.views keeps several views of a sample",
        )
    return {
        "samples": len(every),
        "ids": short_hash(every[:, 0].tobytes()),
        "inputs": short_hash(every[:, 1].tobytes()),
    }


def _ids(batch: Batch) -> Any:
    if batch.ids is None:
        raise CapabilityError(
            "a cache keeps teacher outputs by sample id, and the loader's batches have no ids",
            where="distill(cache=...)",
            remedy="tutelage.data.IndexedDataset(data) numbers the samples of a data set of pairs; else "
            "set ids in to_batch, or leave cache out",
        )
    if batch.views is not None:
        raise CapabilityError(
            "the loader's batches are augmented differently each time, so cached outputs would never be used again",
            where="distill(cache=...)",
            remedy="remove the augmentation; a recipe with data.augment and data.views keeps several views",
        )
    if batch.ids.shape != (len(batch),) or batch.ids.dtype != torch.int64:
        raise DataError(
            f"the ids of a batch of {len(batch)} are {batch.ids.dtype} {tuple(batch.ids.shape)}",
            where="distill(cache=...)",
            remedy="give one int64 for each sample",
        )
    return batch.ids.cpu().numpy()


def fingerprint_tokenizer(loader: Iterable[Any]) -> dict[str, Any] | None:
    """Class and vocabulary of the tokenizer of a loader's collator, as those of transformers have one."""
    tokenizer = getattr(getattr(loader, "collate_fn", None), "tokenizer", None)
    vocabulary = getattr(tokenizer, "get_vocab", None)
    if not callable(vocabulary):
        return None
    facts = {
        "class": type(tokenizer).__name__,
        "vocabulary": short_hash(json.dumps(sorted(vocabulary().items()), ensure_ascii=True)),
    }
    template = getattr(tokenizer, "chat_template", None)
    return facts | {"chat_template": short_hash(str(template))} if template else facts
