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
from tutelage.teachers.cache.columns import Array, Columns, take_rows
from tutelage.teachers.cache.files import MANIFEST, has_output, hash_keys, read_output, write_manifest, write_output
from tutelage.teachers.cache.layout import Layout, OutputLayer, tokens_per_sample
from tutelage.teachers.cache.reader import CacheReader
from tutelage.teachers.cache.writer import CacheWriter
from tutelage.teachers.prefetching import compute_signal, current_autocast
from tutelage.teachers.signal import Signal, Teacher

LOOK_SECONDS = 2.0
"""Other processes' new shards are looked for at most this often."""


class CachedTeacher:
    """Reads what is known, asks the live teacher for the rest, and keeps that.

    What it gives is what is stored, also of a row that was computed just now: a run that was interrupted is taught
    the same bits. Of each batch one row's input is compared with the digest that was stored with it, so that data in
    another order, another preprocessing or another augmentation cannot go unnoticed. Where tokens are kept, every
    row's input is, and which of its tokens count.

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
        self.reader = CacheReader(self.folder, verify=verify)
        check_same(self.folder, self.reader.made_from, made_from, self.reader.layout, layout)
        self.provides = layout.provides
        self.is_precomputed = True
        self.writer: CacheWriter | None = None
        self.pending: set[tuple[int, int]] = set()
        self.looked = time.monotonic()
        self._output: OutputLayer | None = None
        self.computed_rows = self.read_rows = self.compared_batches = 0

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
        ids, views, real = self._keys(batch)
        position = self._find(ids[real], views[real])
        if not len(position):
            columns = self.layout.empty()
        elif (position >= 0).all():
            keys, columns = self.reader.rows(position)
            self._compare(batch, keys, real, columns)
            self.read_rows += len(position)
        else:
            columns = take_rows(self._ask(batch, ids, views, _all(real, position < 0)), np.flatnonzero(real))
        signal = self.layout.decode(
            columns, needs.temperature, batch.labels.device,
            counted=batch.counted() if self.layout.tokens else None, output=self._head(batch), logits=needs.logits,
        )  # fmt: skip
        hidden = {tap: signal.hidden[tap] for tap in needs.hidden}
        return Signal(
            signal.logits if needs.logits else None, hidden, signal.head if needs.head else None,
            signal.sparse if needs.logits else None,
        )  # fmt: skip

    def prefetch(self, batch: Batch, needs: Needs) -> Callable[[], Signal]:
        """Say that a batch comes next, so that its rows are read meanwhile; the result gives its signal."""
        if self.reader.scattered:
            ids, views, real = self._keys(batch)
            position = self.reader.find(ids[real], views[real])
            self.reader.expect(position[position >= 0])
        return partial(compute_signal, self, batch, needs, current_autocast(batch.labels.device))

    def fill(self, batch: Batch) -> None:
        """Make sure that the batch's rows are kept.

        Raises:
            CacheError: as :meth:`signal`.
        """
        ids, views, real = self._keys(batch)
        position = self._find(ids[real], views[real])
        if not (position >= 0).all():
            self._ask(batch, ids, views, _all(real, position < 0))
        elif len(position):
            keys, columns = self.reader.rows(position)
            self._compare(batch, keys, real, columns)

    def check(self, needs: Needs) -> None:
        """Raise :class:`CapabilityError` unless the cache keeps what is needed."""
        missing = [tap for tap in needs.hidden if tap not in self.layout.hidden]
        missing += ["the output head"] * (needs.head and "head" not in self.provides) + ["logits"] * (
            needs.logits and self.layout.keep is None
        )
        if missing:
            raise CapabilityError(
                f"the cache does not keep {', '.join(missing)}",
                where=str(self.folder), remedy="write another cache, or use the live teacher",
            )  # fmt: skip
        if needs.logits:
            self.layout.check_temperature(needs.temperature)

    def _keys(self, batch: Batch) -> tuple[Array, Array, Array]:
        """Sample ids, view seeds, and which samples have something to be kept: of tokens those where any counts."""
        ids, views = sample_keys(batch)
        real = np.ones(len(ids), dtype=bool)
        if self.layout.tokens:
            counted = batch.counted()
            if counted.ndim != 2:
                raise CapabilityError(
                    f"the cache keeps a row for each token, and the batch's labels are {tuple(counted.shape)}",
                    where=str(self.folder), remedy="use it for texts whose tokens have labels each",
                )  # fmt: skip
            real = counted.any(1).cpu().numpy()
        return ids, views, real

    def _head(self, batch: Batch) -> OutputLayer | None:
        """The output head on the batch's device, where what goes into it is kept."""
        if "head" not in self.provides:
            return None
        if self._output is None:
            if not has_output(self.folder) and self.live is not None:
                self._keep_head(batch.to(self.device))
            self._output = read_output(self.folder)
        if self._output.weight.device != batch.labels.device:
            self._output = self._output.to(batch.labels.device)
        return self._output

    def _keep_head(self, batch: Batch) -> None:
        """Write the output head, once it is known that it alone makes the logits."""
        assert self.live is not None
        one = self.live.signal(batch.rows(0, 1), Needs(logits=True, head=True))
        assert one.head is not None
        made = one.head.map(Tensor.float).scores(slice(None)).float()  # bf16 inside of autocast
        said = one.dense().float()
        if made.shape != said.shape or not torch.allclose(made, said, rtol=1e-2, atol=1e-2 * float(said.abs().max())):
            raise CapabilityError(
                "the teacher does more to its logits than its output head, a scale and a cap, so they cannot be made "
                "from what goes into it",
                where=str(self.folder), remedy="keep dense, topk or stochastic_rounding logits",
            )  # fmt: skip
        write_output(self.folder, OutputLayer.of(one.head))

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
        shown, counted = batch.to(self.device), batch.counted()
        signal = self.live.signal(shown, self.layout.needs)
        if "head" in self.provides and not has_output(self.folder):
            self._keep_head(shown)
        seeds = torch.from_numpy(sampling_seeds(ids, views))
        columns = self.layout.encode(signal, seeds, counted if self.layout.tokens else None)
        self.computed_rows += len(ids)
        real = (counted if counted.ndim == 1 else counted.flatten(1).any(-1)).cpu().numpy()
        new = missing & real
        _, first = np.unique(np.stack([ids, views], 1), axis=0, return_index=True)
        once = np.zeros(len(ids), dtype=bool)
        once[first] = True
        rows = np.flatnonzero(new & once)
        if len(rows):
            if self.writer is None:
                self.writer = CacheWriter(self.folder, self.layout, rank=self.rank)
            digests = np.array([input_digest(batch, int(row)) for row in rows], dtype=np.uint64)
            self.writer.put({"id": ids[rows], "view": views[rows], "digest": digests}, take_rows(columns, rows))
            self.pending.update(zip(ids[rows].tolist(), views[rows].tolist(), strict=True))
        return columns

    def _compare(self, batch: Batch, keys: Mapping[str, Array], real: Array, columns: Columns) -> None:
        """Raise :class:`CacheError` where rows were made from something else than the batch's ``real`` rows."""
        rows = np.flatnonzero(real)
        some = (
            range(len(rows)) if self.layout.tokens else [self.compared_batches % len(rows)]
        )  # another place in each batch
        self.compared_batches += 1
        counts = batch.counted().sum(1).cpu().numpy()[rows] if self.layout.tokens else None
        for i in some:
            if input_digest(batch, int(rows[i])) == int(keys["digest"][i]) and (
                counts is None or tokens_per_sample(columns)[i] == counts[i]
            ):
                continue
            view = f", view seed {int(keys['view'][i])}" if batch.views is not None else ""
            raise CacheError(
                f"sample {int(keys['id'][i])}{view} does not look as it did when its row was written",
                where=str(self.folder),
                remedy="data in another order, another preprocessing or another augmentation, or other tokens that "
                "count: write another cache",
            )


def _all(real: Array, missing: Array) -> Array:
    """``missing``, of the real rows, for all rows."""
    out = np.zeros(len(real), dtype=bool)
    out[real] = missing
    return out


def sample_keys(batch: Batch) -> tuple[Array, Array]:
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


def sampling_seeds(ids: Array, views: Array) -> Array:
    """What decides the draws of a row."""
    return hash_keys(ids, views).view(np.int64)


def input_digest(batch: Batch, row: int) -> int:
    """A number that tells a row's input, which of its tokens count, and its route, from another.

    How far it is padded, and on which side, makes no difference.
    """
    given = batch.for_teacher().inputs
    inputs = given if isinstance(given, dict) else {"": given}
    attended = inputs.get("attention_mask")
    found = hashlib.blake2b(digest_size=8)
    for name, x in inputs.items():
        found.update(name.encode())
        padded = attended is not None and attended.ndim == 2 and x.shape[:2] == attended.shape
        found.update(_bytes(x[row][attended[row].bool()] if padded and attended is not None else x[row]))
    if batch.labels.ndim == 2:
        counted = batch.counted()[row]
        known = attended is not None and attended.shape == batch.labels.shape
        found.update(_bytes(counted[attended[row].bool()] if known and attended is not None else counted))
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
