"""A teacher whose outputs for a fixed set of samples are computed once and held in memory."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError
from tutelage.taps import Head, Needs
from tutelage.teachers.cache.columns import Array, Columns, concat_columns, sample_keys, sampling_seeds, take_rows
from tutelage.teachers.cache.layout import Layout, tokens_per_sample, without_inputs
from tutelage.teachers.signal import Signal, Teacher


class MemoryTeacher:
    """Teacher outputs by sample id, computed in one pass in a fixed order.

    Order and size of the batches of that pass depend neither on the run's seed nor on an interruption, so a resumed
    run gets the same bits.

    Args:
        teacher: runs once for each sample.
        batches: every training sample, without augmentation, with ids.
        device: where the teacher runs; its outputs stay on the CPU.
        progress: wraps the iteration.
        needs: what to store. Default: the logits. Ignored with a ``layout``.
        layout: how to store it, as in a cache on disk: sparse distributions, or rows for tokens. Default: dense
            float32.

    Raises:
        CapabilityError: a batch without ids, a repeated id, an augmented batch (its logits would be those of another
            view), or an output head without a layout that stores it.
    """

    def __init__(
        self,
        teacher: Teacher,
        batches: Iterable[Batch],
        device: torch.device | str = "cpu",
        progress: Callable[[Iterable[Batch]], Iterable[Batch]] = lambda x: x,
        needs: Needs = Needs(),  # noqa: B008  # frozen
        layout: Layout | None = None,
    ) -> None:
        if layout is None and needs.head:
            raise CapabilityError(
                "an output head cannot be held in memory",
                remedy="use the live teacher, or a layout that keeps hidden",
            )
        self.needs = needs if layout is None else layout.needs
        self.is_precomputed = True
        self.output: Head | None = None
        ids: list[Array] = []
        parts: list[Columns] = []
        for batch in progress(batches):
            ids.append(_ids(batch))
            signal = teacher.signal(batch.to(device), self.needs)
            if layout is None:
                layout = _dense_layout(signal, needs, batch.labels.ndim == 2)
            if signal.head is not None and self.output is None:
                self.output = without_inputs(signal.head).map(Tensor.cpu)
            parts.append(layout.encode(signal, sampling_seeds(ids[-1], np.zeros_like(ids[-1])), batch.counted()))
        if layout is None:
            raise CapabilityError("there is no batch to store teacher outputs of", remedy="give training data")
        self.layout = layout
        self.provides = layout.provides
        unordered = np.concatenate(ids)
        order = np.argsort(unordered, kind="stable")
        self.ids = unordered[order]
        if (self.ids[1:] == self.ids[:-1]).any():
            raise CapabilityError("two samples have the same id", remedy="make ids unique within the training data")
        self.columns: Columns = {}
        for name in list(parts[0]):  # one at a time, so that only one column exists twice
            self.columns |= take_rows(concat_columns([{name: part.pop(name)} for part in parts]), order)

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """The stored outputs for the batch's samples.

        Raises:
            CapabilityError: something needed is not stored, a sample is unknown, the batch is augmented, or other
                tokens of a sample count than when it was stored.
        """
        if missing := self.layout.missing(needs):
            raise CapabilityError(
                f"{', '.join(missing)} of the teacher is not in memory", remedy="use the live teacher"
            )
        ids, counted = _ids(batch), batch.counted() if self.layout.tokens else None
        if counted is not None:
            ids = ids[counted.any(1).cpu().numpy()]  # samples without counted tokens have no rows
        position = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        if not np.array_equal(self.ids[position], ids):
            unknown = ids[self.ids[position] != ids]
            raise CapabilityError(
                f"there are no teacher outputs in memory for sample ids {unknown[:5].tolist()}",
                remedy="compute them for the same data that the student trains on",
            )
        columns = take_rows(self.columns, position)
        if counted is not None:
            now = counted.sum(1).cpu().numpy()
            now, before = now[now > 0], tokens_per_sample(columns)
            if not np.array_equal(now, before):
                raise CapabilityError(
                    f"the teacher outputs of sample ids {ids[now != before][:5].tolist()} were computed with another "
                    "mask of tokens",
                    remedy="compute them for the same data that the student trains on",
                )
        return self.layout.decode(columns, needs, batch.labels.device, counted=counted, output=self.output)


def _dense_layout(signal: Signal, needs: Needs, tokens: bool) -> Layout:
    """A layout of everything that is needed, in float32."""
    hidden = {tap: tuple(x.shape[2 if tokens else 1 :]) for tap, x in signal.hidden.items()}
    classes = signal.dense().shape[-1] if needs.logits else 0
    return Layout("dense" if needs.logits else None, classes, "fp32", hidden=hidden, tokens=tokens)


def _ids(batch: Batch) -> Array:
    if batch.views is not None:
        raise CapabilityError(
            "the batch is augmented, and teacher outputs in memory would be those of another view",
            remedy="use the live teacher, or no augmentation",
        )
    return sample_keys(batch)[0]
