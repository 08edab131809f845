"""A teacher whose outputs are stored on disk; the live teacher computes only rows that are missing."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.data.batch import Batch
from tutelage.errors import CacheError, CapabilityError, shorten
from tutelage.taps import Head, Needs
from tutelage.teachers.cache.columns import Array, Columns, input_digest, sample_keys, sampling_seeds, take_rows
from tutelage.teachers.cache.files import MANIFEST, has_output, read_output, write_manifest, write_output
from tutelage.teachers.cache.layout import Layout, tokens_per_sample, without_inputs
from tutelage.teachers.cache.reader import CacheReader
from tutelage.teachers.cache.writer import CacheWriter
from tutelage.teachers.prefetching import compute_signal, current_autocast
from tutelage.teachers.signal import Signal, Teacher

REFRESH_SECONDS = 2.0
"""Shortest time between two searches for new shards of other processes."""


class CachedTeacher(AbstractContextManager["CachedTeacher"]):
    """Reads stored teacher outputs, and computes and stores those that are missing.

    A signal always has the stored numbers, also for a row that was computed in this call, so an interrupted run
    resumes with the same bits. For one row of each batch, and for every row of a token cache, the input is compared
    with the digest of the input that the row was computed from. So it is an error if the order of the data, the
    preprocessing or the augmentation changed.

    Args:
        folder: of the cache; created if it does not exist.
        layout: what to store.
        made_from: what the outputs depend on: teacher, preprocessing, data, augmentation. Compared field by field.
        live: computes missing rows; ``None``: a missing row is an error.
        device: where the live teacher runs.
        rank: of this process among several that write.

    Raises:
        CacheError: the cache was made with different settings (the message names the fields), is damaged,
            or cannot be written.
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
    ) -> None:
        self.folder, self.layout, self.live, self.device, self.rank = Path(folder), layout, live, device, rank
        if not (self.folder / MANIFEST).exists():
            if live is None:
                raise CacheError(
                    "there is no cache in this folder", where=str(folder), remedy="write it with: tutelage cache"
                )
            write_manifest(self.folder, layout, made_from)
        self.reader = CacheReader(self.folder)
        check_same(self.folder, self.reader.made_from, made_from, self.reader.layout, layout)
        self.provides = layout.provides
        self.is_precomputed = True
        self.computed_rows = 0
        self.writer: CacheWriter | None = None
        self._pending: set[tuple[int, int]] = set()
        self._refresh_time = time.monotonic()
        self._output: Head | None = None
        self._compared_batches = 0

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write all rows to disk; afterwards other processes can read them."""
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()
        self._pending.clear()

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """The stored teacher outputs for a batch.

        Raises:
            CapabilityError: the cache does not store what is needed, or the batch has no sample ids.
            CacheError: an input differs from the one that the row was computed from, or writing failed.
        """
        self.check(needs)
        columns, output = self._columns(batch), self._head(batch)
        return self.layout.decode(columns, needs, batch.labels.device, counted=batch.counted(), output=output)

    def prefetch(self, batch: Batch, needs: Needs) -> Callable[[], Signal]:
        """Start to read the rows of a batch; call the result to get the signal."""
        if self.reader.scattered:
            ids, views, real = self._keys(batch)
            position = self.reader.find(ids[real], views[real])
            self.reader.prefetch(position[position >= 0])
        return partial(compute_signal, self, batch, needs, current_autocast(batch.labels.device))

    def fill(self, batch: Batch) -> None:
        """Store the rows of a batch that are missing; raises as :meth:`signal`."""
        self._columns(batch)

    def check(self, needs: Needs) -> None:
        """Raise :class:`CapabilityError` unless the cache stores what is needed."""
        if missing := self.layout.missing(needs):
            raise CapabilityError(
                f"the cache does not keep {', '.join(missing)}",
                where=str(self.folder), remedy="write another cache, or use the live teacher",
            )  # fmt: skip
        if needs.logits:
            self.layout.check_temperature(needs.temperature)

    def _columns(self, batch: Batch) -> Columns:
        """The columns of the samples that have rows; missing rows are computed and stored."""
        ids, views, real = self._keys(batch)
        position = self._find(ids[real], views[real])
        if not len(position):
            return self.layout.empty()
        if (position >= 0).all():
            keys, columns = self.reader.rows(position)
            self._compare(batch, keys, real, columns)
            return columns
        rows = np.flatnonzero(real)
        return take_rows(self._compute(batch, ids, views, rows[position < 0]), rows)

    def _keys(self, batch: Batch) -> tuple[Array, Array, Array]:
        """Sample ids, view seeds, and a mask of samples with rows: in a token cache those with counted tokens."""
        ids, views = sample_keys(batch)
        real = np.ones(len(ids), dtype=bool)
        if self.layout.tokens:
            counted = batch.counted()
            if counted.ndim != 2:
                raise CapabilityError(
                    f"the cache stores a row for each token, and the labels of the batch have shape "
                    f"{tuple(counted.shape)}",
                    where=str(self.folder), remedy="use it for texts with a label for each token",
                )  # fmt: skip
            real = counted.any(1).cpu().numpy()
        return ids, views, real

    def _head(self, batch: Batch) -> Head | None:
        if "head" not in self.provides:
            return None
        if self._output is None:
            if not has_output(self.folder) and self.live is not None:
                self._store_head(batch.to(self.device))
            self._output = read_output(self.folder)
        self._output = self._output.map(lambda x: x.to(batch.labels.device))
        return self._output

    def _store_head(self, batch: Batch) -> None:
        """Write the output head; before, check that it computes the teacher's logits."""
        assert self.live is not None
        sample = self.live.signal(batch.rows(0, 1), Needs(logits=True, head=True))
        assert sample.head is not None
        computed = sample.head.map(Tensor.float).scores(slice(None)).float()  # bf16 under autocast
        logits = sample.dense().float()
        tolerance = 1e-2 * float(logits.abs().max())
        if computed.shape != logits.shape or not torch.allclose(computed, logits, rtol=1e-2, atol=tolerance):
            raise CapabilityError(
                "a cache of head inputs (keep: hidden) cannot reproduce the teacher's logits: they are more than a "
                "linear layer with a scale and a soft cap",
                where=str(self.folder), remedy="set keep to dense, topk or stochastic_rounding",
            )  # fmt: skip
        write_output(self.folder, without_inputs(sample.head))

    def _find(self, ids: Array, views: Array) -> Array:
        position = self.reader.find(ids, views)
        if (position >= 0).all():
            return position
        now = time.monotonic()
        if self._pending and any(key in self._pending for key in zip(ids.tolist(), views.tolist(), strict=True)):
            assert self.writer is not None
            self.writer.flush()
            self._pending.clear()
        elif now - self._refresh_time <= REFRESH_SECONDS:
            return position
        self._refresh_time = now
        return self.reader.find(ids, views) if self.reader.refresh() else position

    def _compute(self, batch: Batch, ids: Array, views: Array, missing: Array) -> Columns:
        """The columns of all samples from the live teacher; the ``missing`` rows are stored, each once."""
        if self.live is None:
            raise CacheError(
                f"the cache has no row for sample ids {ids[missing][:5].tolist()}; {len(missing)} samples of this "
                "batch have no row",
                where=str(self.folder), remedy="write them with: tutelage cache",
            )  # fmt: skip
        moved, counted = batch.to(self.device), batch.counted()
        signal = self.live.signal(moved, self.layout.needs)
        if "head" in self.provides and not has_output(self.folder):
            self._store_head(moved)
        columns = self.layout.encode(signal, sampling_seeds(ids, views), counted)
        self.computed_rows += len(ids)
        real = (counted if counted.ndim == 1 else counted.flatten(1).any(-1)).cpu().numpy()
        _, first = np.unique(np.stack([ids, views], 1), axis=0, return_index=True)
        rows = np.intersect1d(missing[real[missing]], first)
        if len(rows):
            if self.writer is None:
                self.writer = CacheWriter(self.folder, self.layout, rank=self.rank)
            digests = np.array([input_digest(batch, int(row)) for row in rows], dtype=np.uint64)
            keys = {"id": ids[rows], "view": views[rows], "digest": digests}
            self.writer.put(keys, take_rows(columns, rows))
            self._pending.update(zip(ids[rows].tolist(), views[rows].tolist(), strict=True))
        return columns

    def _compare(self, batch: Batch, keys: Mapping[str, Array], real: Array, columns: Columns) -> None:
        """Raise :class:`CacheError` if rows were computed from other inputs than the batch's ``real`` rows."""
        rows = np.flatnonzero(real)
        checked = range(len(rows)) if self.layout.tokens else [self._compared_batches % len(rows)]
        self._compared_batches += 1
        counts = batch.counted().sum(1).cpu().numpy()[rows] if self.layout.tokens else None
        for i in checked:
            if input_digest(batch, int(rows[i])) == int(keys["digest"][i]) and (
                counts is None or tokens_per_sample(columns)[i] == counts[i]
            ):
                continue
            view = f", view seed {int(keys['view'][i])}" if batch.views is not None else ""
            raise CacheError(
                f"sample {int(keys['id'][i])}{view} differs from the input that its cached row was computed from",
                where=str(self.folder),
                remedy="write another cache: the order of the data, the preprocessing, the augmentation or the mask "
                "of tokens changed",
            )


def check_same(
    folder: Path, stored: Mapping[str, Any], given: Mapping[str, Any], stored_layout: Layout, layout: Layout
) -> None:
    """Raise :class:`CacheError`, with the names of the fields, if a cache differs from what a run needs.

    A cache may store more taps than are needed.
    """
    there = _flatten({**stored, "stored": stored_layout.to_dict()})
    here = _flatten({**given, "stored": layout.to_dict()})

    def text_of(values: dict[str, Any], key: str) -> str:
        return "nothing" if values.get(key) is None else shorten(values[key])

    differences = "; ".join(
        f"{key} (in the cache {text_of(there, key)}, now {text_of(here, key)})"
        for key in {**there, **here}
        if there.get(key) != here.get(key) and (key in here or not key.startswith("stored.hidden."))
    )
    if differences:
        raise CacheError(
            f"the cache was made with different settings: {differences}",
            where=str(folder), remedy="use the settings that the cache was made from, or another folder",
        )  # fmt: skip


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
