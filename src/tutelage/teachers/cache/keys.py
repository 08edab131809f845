"""Keys of rows: sample ids, view seeds, and digests of inputs."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError
from tutelage.teachers.cache.columns import Array


def sample_keys(batch: Batch) -> tuple[Array, Array]:
    """Sample ids and view seeds of a batch; seeds are 0 without augmentation."""
    if batch.ids is None:
        raise CapabilityError(
            "the batch has no sample ids, by which teacher outputs are stored",
            remedy="yield batches with ids=, or use the live teacher",
        )
    ids = batch.ids.cpu().numpy()
    return ids, np.zeros_like(ids) if batch.views is None else batch.views.cpu().numpy()


def hash_keys(ids: Array, views: Array) -> Array:
    """A 64-bit hash of each (id, view)."""
    with np.errstate(over="ignore"):
        mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= views.view(np.uint64) if views.dtype == np.int64 else views.astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        out: Array = mixed ^ (mixed >> np.uint64(32))
    return out


def sampling_seeds(ids: Array, views: Array) -> Tensor:
    """The seeds of the random draws of rows."""
    return torch.from_numpy(hash_keys(ids, views).view(np.int64))


def input_digest(batch: Batch, row: int) -> int:
    """A 64-bit digest of one sample: the teacher's input, which tokens count, and the route.

    Padding makes no difference, neither its length nor its side.
    """
    given = batch.for_teacher().inputs
    inputs = given if isinstance(given, dict) else {"": given}
    attended = inputs.get("attention_mask")
    digest = hashlib.blake2b(digest_size=8)

    def update(x: Tensor) -> None:
        values: Any = x[row]
        if attended is not None and attended.ndim == 2 and x.shape[:2] == attended.shape:
            values = values[attended[row].bool()]
        digest.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())

    for name, x in inputs.items():
        digest.update(name.encode())
        update(x)
    if batch.labels.ndim == 2:
        update(batch.counted())
    if batch.route is not None:
        update(batch.route)
    return int.from_bytes(digest.digest(), "little")
