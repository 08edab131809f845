"""A teacher whose logits on a fixed set of samples are computed once and kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError
from tutelage.taps import Needs
from tutelage.teachers.signal import Signal, Teacher


class MemoryTeacher:
    """Dense logits by sample id, filled in one pass in a fixed order.

    The order and size of the batches of that pass do not depend on the run's seed or on where it
    was interrupted, so a resumed run is taught the same bits.

    Args:
        teacher: asked once for each sample.
        batches: every sample that training will show, unaugmented, with ids.
        device: where the teacher computes; the logits stay on the CPU.
        progress: wraps the iteration.

    Raises:
        CapabilityError: a batch without ids, an id twice, or an augmented batch, whose logits
            would be those of another view.
    """

    provides = frozenset({"logits"})

    def __init__(
        self,
        teacher: Teacher,
        batches: Iterable[Batch],
        device: torch.device | str = "cpu",
        progress: Callable[[Iterable[Batch]], Iterable[Batch]] = lambda x: x,
    ) -> None:
        ids, logits = [], []
        for batch in progress(batches):
            ids.append(_ids(batch))
            logits.append(teacher.signal(batch.to(device), Needs()).dense().float().cpu())
        self.ids, position = torch.cat(ids).sort()
        self.logits = torch.cat(logits)[position]
        if len(self.ids) > 1 and bool((self.ids[1:] == self.ids[:-1]).any()):
            raise CapabilityError(
                "two samples have the same id", remedy="ids must be unique within the training data"
            )

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """The remembered logits of the batch's samples.

        Raises:
            CapabilityError: more than logits is needed, a sample is unknown, or the batch is augmented.
        """
        if needs.kinds() - self.provides:
            raise CapabilityError(
                f"remembered logits cannot give {', '.join(sorted(needs.kinds() - self.provides))}",
                remedy="use the live teacher",
            )
        ids = _ids(batch).cpu()
        position = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        if not torch.equal(self.ids[position], ids):
            unknown = ids[self.ids[position] != ids]
            raise CapabilityError(
                f"no logits are remembered for sample ids {unknown[:5].tolist()}",
                remedy="remember the same data that the student trains on",
            )
        return Signal(logits=self.logits[position].to(batch.labels.device, non_blocking=True))


def _ids(batch: Batch) -> Tensor:
    if batch.ids is None:
        raise CapabilityError("the batch has no sample ids", remedy="use the live teacher")
    if batch.views is not None:
        raise CapabilityError(
            "the batch is augmented, and remembered logits would be those of another view",
            remedy="use the live teacher, or no augmentation",
        )
    return batch.ids
