"""A teacher whose word on a fixed set of samples is computed once and kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError
from tutelage.taps import Needs
from tutelage.teachers.signal import Signal, Teacher


class MemoryTeacher:
    """Dense logits and hidden states by sample id, filled in one pass in a fixed order.

    The order and size of the batches of that pass do not depend on the run's seed or on where it
    was interrupted, so a resumed run is taught the same bits.

    Args:
        teacher: asked once for each sample.
        batches: every sample that training will show, unaugmented, with ids.
        device: where the teacher computes; what it says stays on the CPU.
        progress: wraps the iteration.
        needs: what to remember. Default: the logits.

    Raises:
        CapabilityError: a batch without ids, an id twice, an augmented batch, whose logits
            would be those of another view, or the output head asked for.
    """

    def __init__(
        self,
        teacher: Teacher,
        batches: Iterable[Batch],
        device: torch.device | str = "cpu",
        progress: Callable[[Iterable[Batch]], Iterable[Batch]] = lambda x: x,
        needs: Needs = Needs(),  # noqa: B008  # frozen
    ) -> None:
        if needs.head:
            raise CapabilityError("an output head cannot be remembered", remedy="use the live teacher")
        self.needs = needs
        self.provides = needs.kinds()
        ids: list[Tensor] = []
        said: dict[str | None, list[Tensor]] = {}
        for batch in progress(batches):
            ids.append(_ids(batch))
            signal = teacher.signal(batch.to(device), needs)
            parts: list[tuple[str | None, Tensor]] = list(signal.hidden.items())
            if needs.logits:
                parts.append((None, signal.dense()))
            for name, part in parts:
                said.setdefault(name, []).append(part.float().cpu())
        self.ids, position = torch.cat(ids).sort()
        self.said: dict[str | None, Tensor] = {}
        for name in list(said):  # one at a time: there are two copies of one part only
            self.said[name] = torch.cat(said.pop(name))[position]
        if len(self.ids) > 1 and bool((self.ids[1:] == self.ids[:-1]).any()):
            raise CapabilityError(
                "two samples have the same id", remedy="ids must be unique within the training data"
            )

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """What is remembered of the batch's samples.

        Raises:
            CapabilityError: more than is remembered is needed, a sample is unknown, or the batch is augmented.
        """
        missing = sorted(needs.kinds() - self.provides) or [tap for tap in needs.hidden if tap not in self.said]
        if missing:
            raise CapabilityError(
                f"{', '.join(missing)} of the teacher is not remembered", remedy="use the live teacher"
            )
        ids = _ids(batch).cpu()
        position = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        if not torch.equal(self.ids[position], ids):
            unknown = ids[self.ids[position] != ids]
            raise CapabilityError(
                f"nothing is remembered for sample ids {unknown[:5].tolist()}",
                remedy="remember the same data that the student trains on",
            )

        def rows(name: str | None) -> Tensor:
            return self.said[name][position].to(batch.labels.device, non_blocking=True)

        return Signal(rows(None) if needs.logits else None, {tap: rows(tap) for tap in needs.hidden})


def _ids(batch: Batch) -> Tensor:
    if batch.ids is None:
        raise CapabilityError("the batch has no sample ids", remedy="use the live teacher")
    if batch.views is not None:
        raise CapabilityError(
            "the batch is augmented, and remembered logits would be those of another view",
            remedy="use the live teacher, or no augmentation",
        )
    return batch.ids
