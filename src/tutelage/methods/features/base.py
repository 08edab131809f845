"""What a link is: the pairs that it compares, what it is fitted to, and what of a batch counts for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.methods.base import Phase
from tutelage.students.projectors import Shape

Where = Literal["activations", "embedding", "last", "named", "stages"]


class FeaturePair(NamedTuple):
    """A pair of taps, found in both models."""

    student: str
    teacher: str
    student_shape: Shape
    teacher_shape: Shape
    tokens: bool
    """Whether there is one feature for each position of a text, some of which may not count."""


class FeatureContext(NamedTuple):
    """What a link is fitted to."""

    student: nn.Module
    teacher: nn.Module
    example: Batch
    ids: Tensor | None


class FeatureLoss(nn.Module):
    """One term of a loss on features: one pair, or several that are learned together.

    Args:
        sites: the pairs.
        setting: the models.
        options: of the loss.

    Raises:
        ModelError: features that do not go together.
    """

    relation: ClassVar[bool] = False
    """Whether the rows of a batch are compared with each other."""
    maps: ClassVar[bool] = True
    """Whether it is for feature maps only."""
    needs_ids: ClassVar[bool] = False
    """Whether it needs the sample ids of the training data."""

    def __init__(self, sites: Sequence[FeaturePair], setting: FeatureContext, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.sites, self.options = list(sites), dict(options)
        for site in sites:
            if self.maps and not len(site.student_shape) == len(site.teacher_shape) == 4:
                raise ModelError(
                    f"this loss compares feature maps, and these are {list(site.student_shape)} and "
                    f"{list(site.teacher_shape)}",
                    remedy="tap modules that give [B, C, H, W], or use hint or a relation",
                )

    def counted(self, batch: Batch) -> Tensor:
        """What the term averages over: tokens ``[B, L]``, or examples ``[B]``, as booleans."""
        if self.sites[0].tokens:
            positions = token_positions(batch)
            return positions.any(-1) if self.relation else positions
        return counted_rows(batch)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum of the loss over what counts; one feature of each for every pair."""
        raise NotImplementedError

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` or ``TypeError`` for an option's value that the loss does not take."""

    def phases(self) -> Sequence[Phase]:
        """What has to be trained first."""
        return ()

    def after_step(self) -> None:
        """Called after each optimizer step."""


def token_positions(batch: Batch) -> Tensor:
    """Positions that count: of texts with one label each, those that are no padding."""
    counted = batch.counted()
    attention = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
    if counted.ndim == 1 and attention is not None and attention.ndim == 2:
        return attention.bool() & counted.unsqueeze(-1)
    return counted


def counted_rows(batch: Batch) -> Tensor:
    """``[B]``, rows with something that counts, as booleans."""
    counted = batch.counted()
    return counted if counted.ndim == 1 else counted.flatten(1).any(-1)


def mean_over(x: Tensor, positions: Tensor) -> Tensor:
    """``[B, D]`` mean over the positions that count."""
    kept = x.float().masked_fill(~positions.unsqueeze(-1), 0.0)
    return kept.sum(1) / positions.sum(1, keepdim=True).clamp(min=1)
