"""The loss of the labels, by the kind of labels."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from tutelage import losses
from tutelage.data.batch import Batch, Task
from tutelage.errors import CapabilityError, ConfigError, shorten


class LabelLoss(NamedTuple):
    """The loss of the labels of one task.

    Attributes:
        term: its name.
        loss: ``(logits, batch, label_smoothing)`` -> the sum over positions with a label.
    """

    term: str
    loss: Callable[[Tensor, Batch, float], Tensor]


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


LABEL_LOSSES: dict[Task, LabelLoss] = {
    "classes": LabelLoss("ce", _classes),
    "multi-label": LabelLoss("bce", _multi_label),
    "regression": LabelLoss("squared_error", _regression),
    "ranking": LabelLoss("ce", _classes),
}
"""By the kind of labels: one class of several, any number of classes, numbers, or a ranking."""


def label_loss(task: Task) -> LabelLoss:
    """The loss of the labels of ``task``.

    Raises:
        ConfigError: unknown task.
    """
    if task not in LABEL_LOSSES:
        raise ConfigError(f"task={shorten(task)}", remedy=f"allowed: {', '.join(LABEL_LOSSES)}")
    return LABEL_LOSSES[task]
