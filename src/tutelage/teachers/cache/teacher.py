"""A teacher whose word is kept on disk, and asked for only where it is not there yet."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.data.batch import Batch
from tutelage.errors import CacheError, CapabilityError
from tutelage.taps import Needs
from tutelage.teachers.ahead import answered, precision_of
from tutelage.teachers.cache.files import MANIFEST, hashed, write_manifest
from tutelage.teachers.cache.layout import Array, Layout, taken
from tutelage.teachers.cache.reader import Reader
from tutelage.teachers.cache.writer import Writer
from tutelage.teachers.signal import Signal, Teacher

LOOK_SECONDS = 2.0
"""Other processes' new shards are looked for at most this often."""


class CachedTeacher:
    """Reads what is known, asks the live teacher for the rest, and keeps that.

    What it gives is what is stored, also of a row that was computed just now: a run that was interrupted is taught
    the same bits. Of each batch one row's input is compared with the digest that was stored with it, so that data in
    another order, another preprocessing or another augmentation cannot go unnoticed.

    Args:
        folder: of the cache; written where there is none.
        layout: what is kept.
        made_from: what a cache depends on: teacher, preprocessing, data, augmentation. Compared field by field.
        live: asked for rows that are missing; ``None`` for a cache that must hold all.
        device: where the live teacher computes.
        rank: of this process among several that write.
        verify: compare shards with their checksums first.

    Raises:
        CacheError: the cache was made from something else (names the fields), is damaged, or cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        layout: Layout,
        made_from: Mapping[str, Any],
        live: Teacher | None = None,
        *,
        device: torch.device | str = "cpu",
        rank: int = 0,
        verify: bool = True,
    ) -> None:
        self.folder, self.layout, self.live, self.device, self.rank = Path(folder), layout, live, device, rank
        if not (self.folder / MANIFEST).exists():
            if live is None:
                raise CacheError("holds no cache", where=str(folder), remedy="write it with tutelage cache")
            write_manifest(self.folder, layout, made_from)
        self.reader = Reader(self.folder, verify=verify)
        check_same(self.folder, self.reader.made_from, made_from, self.reader.layout, layout)
        self.provides = layout.provides
        self.writer: Writer | None = None
        self.pending: set[tuple[int, int]] = set()
        self.looked = time.monotonic()
        self.asked = self.read = self.compared = 0

    def __enter__(self) -> CachedTeacher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write what is left. The cache can be read by others from then on."""
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()
        self.pending.clear()

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """The teacher's word on the batch, as it is stored.

        Raises:
            CapabilityError: what is needed is not kept, or the batch has no sample ids.
            CacheError: the input of a row is not the one that it was made from, or writing failed.
        """
        self.check(needs)
        ids, views = keys_of(batch)
        position = self._find(ids, views)
        if (position >= 0).all():
            keys, columns = self.reader.rows(position)
            self._compare(batch, keys)
            self.read += len(ids)
        else:
            columns = self._ask(batch, ids, views, position < 0)
        signal = self.layout.decode(columns, needs.temperature, batch.labels.device)
        hidden = {tap: signal.hidden[tap] for tap in needs.hidden}
        return Signal(signal.logits if needs.logits else None, hidden, sparse=signal.sparse if needs.logits else None)

    def ask(self, batch: Batch, needs: Needs) -> Callable[[], Signal]:
        """Say that a batch comes next, so that its rows are read meanwhile; the result gives its signal."""
        if self.reader.scattered:
            position = self.reader.find(*keys_of(batch))
            self.reader.expect(position[position >= 0])
        return partial(answered, self, batch, needs, precision_of(batch.labels.device))

    def fill(self, batch: Batch) -> None:
        """Make sure that the batch's rows are kept.

        Raises:
            CacheError: as :meth:`signal`.
        """
        ids, views = keys_of(batch)
        position = self._find(ids, views)
        if (position >= 0).all():
            self._compare(batch, self.reader.rows(position[:1] if len(position) else position)[0])
        else:
            self._ask(batch, ids, views, position < 0)

    def check(self, needs: Needs) -> None:
        """Raise :class:`CapabilityError` unless the cache keeps what is needed."""
        missing = [tap for tap in needs.hidden if tap not in self.layout.hidden]
        missing += ["the output head"] * needs.head + ["logits"] * (needs.logits and self.layout.keep is None)
        if missing:
            raise CapabilityError(
                f"the cache does not keep {', '.join(missing)}",
                where=str(self.folder), remedy="write another cache, or use the live teacher",
            )  # fmt: skip
        if needs.logits and self.layout.keep in ("topk", "sampled"):
            self.layout.check_temperature(needs.temperature)

    def _find(self, ids: Array, views: Array) -> Array:
        position = self.reader.find(ids, views)
        if (position >= 0).all():
            return position
        if self.pending and any(key in self.pending for key in zip(ids.tolist(), views.tolist(), strict=True)):
            assert self.writer is not None
            self.writer.flush()
            self.pending.clear()
            self.reader.refresh()
            self.looked = time.monotonic()
            return self.reader.find(ids, views)
        if time.monotonic() - self.looked > LOOK_SECONDS:
            self.looked = time.monotonic()
            if self.reader.refresh():
                return self.reader.find(ids, views)
        return position

    def _ask(self, batch: Batch, ids: Array, views: Array, missing: Array) -> Any:
        """The live teacher's word on the whole batch, in its shape; what is missing is kept."""
        if self.live is None:
            absent = ids[missing][:5].tolist()
            raise CacheError(
                f"has no row for sample ids {absent}, {int(missing.sum())} of this batch",
                where=str(self.folder), remedy="write them with tutelage cache",
            )  # fmt: skip
        signal = self.live.signal(batch.to(self.device), self.layout.needs)
        columns = self.layout.encode(signal, torch.from_numpy(seeds_of(ids, views)))
        self.asked += len(ids)
        counted = batch.counted()
        real = (counted if counted.ndim == 1 else counted.flatten(1).any(-1)).cpu().numpy()
        new = missing & real
        _, first = np.unique(np.stack([ids, views], 1), axis=0, return_index=True)
        once = np.zeros(len(ids), dtype=bool)
        once[first] = True
        rows = np.flatnonzero(new & once)
        if len(rows):
            if self.writer is None:
                self.writer = Writer(self.folder, self.layout, rank=self.rank)
            digests = np.array([digest(batch, int(row)) for row in rows], dtype=np.uint64)
            self.writer.put({"id": ids[rows], "view": views[rows], "digest": digests}, taken(columns, rows))
            self.pending.update(zip(ids[rows].tolist(), views[rows].tolist(), strict=True))
        return columns

    def _compare(self, batch: Batch, keys: Mapping[str, Array]) -> None:
        row = self.compared % len(keys["id"])  # another place in each batch
        self.compared += 1
        if digest(batch, row) != int(keys["digest"][row]):
            view = f", view seed {int(keys['view'][row])}" if batch.views is not None else ""
            raise CacheError(
                f"sample {int(keys['id'][row])}{view} does not look as it did when its row was written",
                where=str(self.folder),
                remedy="data in another order, another preprocessing or another augmentation: write another cache",
            )


def keys_of(batch: Batch) -> tuple[Array, Array]:
    """Sample ids and view seeds (0 where nothing is augmented) of a batch.

    Raises:
        CapabilityError: the batch has no ids.
    """
    if batch.ids is None:
        raise CapabilityError(
            "a cache keeps rows by sample id, and the batch has none", remedy="use the live teacher"
        )
    ids = batch.ids.cpu().numpy()
    return ids, np.zeros_like(ids) if batch.views is None else batch.views.cpu().numpy()


def seeds_of(ids: Array, views: Array) -> Array:
    """What decides the draws of a row."""
    return hashed(ids, views).view(np.int64)


def digest(batch: Batch, row: int) -> int:
    """A number that tells a row's input, and its route, from another; how far it is padded makes no difference."""
    given = batch.for_teacher().inputs
    inputs = given if isinstance(given, dict) else {"": given}
    attended = inputs.get("attention_mask")
    found = hashlib.blake2b(digest_size=8)
    for name, x in inputs.items():
        found.update(name.encode())
        padded = attended is not None and attended.ndim == 2 and x.shape[:2] == attended.shape
        found.update(_bytes(x[row][attended[row].bool()] if padded and attended is not None else x[row]))
    if batch.route is not None:
        found.update(_bytes(batch.route[row]))
    return int.from_bytes(found.digest(), "little")


def _bytes(x: Tensor) -> Any:
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def check_same(
    folder: Path, stored: Mapping[str, Any], given: Mapping[str, Any], kept: Layout, layout: Layout
) -> None:
    """Raise :class:`CacheError`, naming the fields, unless a cache is what is asked for.

    A cache may keep more taps than are needed.
    """
    differing = [
        f"{key} (there {_shown(a)}, here {_shown(b)})" for key, a, b in _differences(dict(stored), dict(given))
    ]
    a, b = kept.to_dict(), layout.to_dict()
    more, wanted = a.pop("hidden"), b.pop("hidden")
    differing += [f"stored.{key} (there {_shown(x)}, here {_shown(y)})" for key, x, y in _differences(a, b)]
    differing += [
        f"stored.hidden.{tap} (there {more.get(tap)}, here {shape})"
        for tap, shape in wanted.items()
        if more.get(tap) != shape
    ]
    if differing:
        raise CacheError(
            f"was made from something else: {'; '.join(differing)}",
            where=str(folder), remedy="use the settings that it was made from, or another folder",
        )  # fmt: skip


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key in [*a, *(k for k in b if k not in a)]:
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found += _differences(x, y, f"{prefix}{key}.")
        elif x != y:
            found.append((f"{prefix}{key}", x, y))
    return found


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
