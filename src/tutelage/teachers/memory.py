"""A teacher whose word on a fixed set of samples is computed once and kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError
from tutelage.taps import Needs
from tutelage.teachers.cache.columns import Array, Columns, concat_columns, take_rows
from tutelage.teachers.cache.layout import Layout, OutputLayer, tokens_per_sample
from tutelage.teachers.cache.teacher import sampling_seeds
from tutelage.teachers.signal import Signal, Teacher


class MemoryTeacher:
    """What a teacher says, by sample id, filled in one pass in a fixed order.

    The order and size of the batches of that pass do not depend on the run's seed or on where it
    was interrupted, so a resumed run is taught the same bits.

    Args:
        teacher: asked once for each sample.
        batches: every sample that training will show, unaugmented, with ids.
        device: where the teacher computes; what it says stays on the CPU.
        progress: wraps the iteration.
        needs: what to remember. Default: the logits. Not used with a ``layout``.
        layout: how it is remembered, as a cache on disk does: parts of distributions, or rows of any number of
            tokens. Default: all of it, in float32.

    Raises:
        CapabilityError: a batch without ids, an id twice, an augmented batch, whose logits
            would be those of another view, or the output head asked for without a layout that keeps it.
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
                "an output head cannot be remembered", remedy="use the live teacher, or a layout that keeps hidden"
            )
        self.needs = needs if layout is None else layout.needs
        self.is_precomputed = True
        self.output: OutputLayer | None = None
        ids: list[Array] = []
        parts: list[Columns] = []
        for batch in progress(batches):
            ids.append(_ids(batch))
            signal = teacher.signal(batch.to(device), self.needs)
            if layout is None:
                layout = _whole(signal, needs, batch.labels.ndim == 2)
            if signal.head is not None and self.output is None:
                self.output = OutputLayer.of(signal.head).to("cpu")
            seeds = torch.from_numpy(sampling_seeds(ids[-1], np.zeros_like(ids[-1])))
            parts.append(layout.encode(signal, seeds, batch.counted() if layout.tokens else None))
        if layout is None:
            raise CapabilityError("there is nothing to remember: no batch came", remedy="give training data")
        self.layout = layout
        self.provides = layout.provides
        every = np.concatenate(ids)
        order = np.argsort(every, kind="stable")
        self.ids = every[order]
        if (self.ids[1:] == self.ids[:-1]).any():
            raise CapabilityError(
                "two samples have the same id", remedy="ids must be unique within the training data"
            )
        self.columns: Columns = {}
        for name in list(parts[0]):  # one at a time: there are two copies of one column only
            self.columns |= take_rows(concat_columns([{name: part.pop(name)} for part in parts]), order)

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """What is remembered of the batch's samples.

        Raises:
            CapabilityError: more than is remembered is needed, a sample is unknown, the batch is augmented, or other
                tokens of it count than did.
        """
        kinds = needs.kinds() - ({"logits"} if self.layout.partial else set())
        missing = sorted(kinds - self.provides) or [t for t in needs.hidden if t not in self.layout.hidden]
        if missing:
            raise CapabilityError(
                f"{', '.join(missing)} of the teacher is not remembered", remedy="use the live teacher"
            )
        ids, counted = _ids(batch), batch.counted() if self.layout.tokens else None
        if counted is not None:
            ids = ids[counted.any(1).cpu().numpy()]  # the others have nothing to say
        position = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        if not np.array_equal(self.ids[position], ids):
            unknown = ids[self.ids[position] != ids]
            raise CapabilityError(
                f"nothing is remembered for sample ids {unknown[:5].tolist()}",
                remedy="remember the same data that the student trains on",
            )
        columns = take_rows(self.columns, position)
        if counted is not None:
            now = counted.sum(1).cpu().numpy()
            if not np.array_equal(now[now > 0], tokens_per_sample(columns)):
                other = ids[now[now > 0] != tokens_per_sample(columns)]
                raise CapabilityError(
                    f"of sample ids {other[:5].tolist()} other tokens count than when they were remembered",
                    remedy="remember the same data that the student trains on",
                )
        said = self.layout.decode(
            columns, needs.temperature, batch.labels.device,
            counted=counted, output=self.output, logits=needs.logits,
        )  # fmt: skip
        return Signal(
            said.logits if needs.logits else None, {tap: said.hidden[tap] for tap in needs.hidden},
            said.head if needs.head else None, said.sparse if needs.logits else None,
        )  # fmt: skip


def _whole(signal: Signal, needs: Needs, tokens: bool) -> Layout:
    """A layout of everything that was asked for."""
    leading = 2 if tokens else 1
    hidden = {tap: tuple(x.shape[leading:]) for tap, x in signal.hidden.items()}
    keep, classes = ("dense", signal.dense().shape[-1]) if needs.logits else (None, 0)
    return Layout(keep, classes, "fp32", hidden=hidden, tokens=tokens)  # type: ignore[arg-type]


def _ids(batch: Batch) -> Array:
    if batch.ids is None:
        raise CapabilityError("the batch has no sample ids", remedy="use the live teacher")
    if batch.views is not None:
        raise CapabilityError(
            "the batch is augmented, and remembered logits would be those of another view",
            remedy="use the live teacher, or no augmentation",
        )
    return batch.ids.cpu().numpy()
