"""What the labels say, by what labels are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from tutelage import losses
from tutelage.data.batch import Batch, Task
from tutelage.errors import CapabilityError, ConfigError


class HardLoss(NamedTuple):
    """The loss of the labels of one task.

    Attributes:
        term: its name.
        loss: ``(logits, batch, label_smoothing)`` -> the sum over positions with a label.
        soft: the loss on logits that goes with it where none is given.
    """

    term: str
    loss: Callable[[Tensor, Batch, float], Tensor]
    soft: str


def _classes(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    return losses.cross_entropy(logits, batch.labels, label_smoothing=smoothing, mask=batch.mask, reduction="sum")


def _multi_label(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    targets = _targets(logits, batch)
    smooth = targets * (1 - smoothing) + smoothing / 2
    return losses.binary_cross_entropy(logits, smooth, mask=batch.labelled(), reduction="sum")


def _regression(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    return losses.mse(logits, _targets(logits, batch), mask=batch.labelled(), reduction="sum")


def _targets(logits: Tensor, batch: Batch) -> Tensor:
    if batch.targets is None or batch.targets.shape != logits.shape:
        given = None if batch.targets is None else tuple(batch.targets.shape)
        raise CapabilityError(
            f"targets are {given} where the logits are {tuple(logits.shape)}",
            remedy="one target for each logit: set the model's number of labels",
        )
    return batch.targets


HARD: dict[Task, HardLoss] = {
    "classes": HardLoss("ce", _classes, "kd"),
    "multi-label": HardLoss("bce", _multi_label, "binary_kd"),
    "regression": HardLoss("squared_error", _regression, "mse"),
    "ranking": HardLoss("ce", _classes, "margin_mse"),
}
"""By what labels are: one class of several, any number of them, or numbers."""


def hard_of(task: Task) -> HardLoss:
    """The loss of the labels of ``task``.

    Raises:
        ConfigError: unknown task.
    """
    if task not in HARD:
        raise ConfigError(f"task={task!r}", remedy=f"allowed: {', '.join(HARD)}")
    return HARD[task]
