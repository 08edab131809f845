"""The base of losses on features: the pairs that are compared, and which examples or tokens count."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from tutelage.config import FEATURE_LOSSES, ResolvedPair
from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.methods.base import Phase
from tutelage.students.projectors import Shape


class FeaturePair(NamedTuple):
    """A pair of taps that exist in both models."""

    student: str
    teacher: str
    student_shape: Shape
    teacher_shape: Shape
    tokens: bool
    """Whether there is one feature for each position of a text, some of which may not count."""
    channels_last: tuple[bool, bool] = (False, False)
    """Whether a map of student and teacher has its channels last; the shapes have them first."""

    def describe(self) -> str:
        """The pair in words, for a user to check."""
        sides = zip((self.student, self.teacher), (self.student_shape, self.teacher_shape), strict=True)
        mine, theirs = (f"{tap} ({_in_words(shape)})" for tap, shape in sides)
        return f"student {mine}, teacher {theirs}"


def _in_words(shape: Shape) -> str:
    if len(shape) == 4:
        return f"map of {shape[2]}x{shape[3]}, {shape[1]} channels"
    return f"{shape[1]} tokens, {shape[2]} wide" if len(shape) == 3 else f"{shape[-1]} wide"


class FeatureContext(NamedTuple):
    """What a loss may be built from: the models, a few samples, and the sample ids of the training data."""

    student: nn.Module
    teacher: nn.Module
    example: Batch
    ids: Tensor | None


class FeatureLoss(nn.Module):
    """One term of a loss on features: of one pair, or of several that are learned together.

    Args:
        settings: the loss and its options.
        pairs: the pairs.
        context: the models.

    Raises:
        ModelError: features that do not fit each other, or the loss.
    """

    needs_ids: ClassVar[bool] = False
    """Whether it needs the sample ids of the training data."""

    def __init__(self, settings: ResolvedPair, pairs: Sequence[FeaturePair], context: FeatureContext) -> None:
        super().__init__()
        self.pairs, self.compares = list(pairs), FEATURE_LOSSES[settings.loss].compares
        self.options: Any = settings.options
        self.arguments = settings.options.arguments()
        for pair in pairs:
            if self.compares == "maps" and not len(pair.student_shape) == len(pair.teacher_shape) == 4:
                raise ModelError(
                    f"{settings.loss} compares feature maps [B, C, H, W]; student {pair.student!r} gives "
                    f"{list(pair.student_shape)}, teacher {pair.teacher!r} {list(pair.teacher_shape)}",
                    remedy="tap modules that give [B, C, H, W], or use hint or a relation",
                )

    def counted(self, batch: Batch) -> Tensor:
        """What the term averages over: tokens ``[B, L]``, or examples ``[B]``, as booleans."""
        if self.pairs[0].tokens:
            positions = token_positions(batch)
            return positions.any(-1) if self.compares == "examples" else positions
        return counted_rows(batch)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum of the loss over what counts.

        Args:
            student: one feature for each pair.
            teacher: one feature for each pair.
            batch: labels and masks.
        """
        raise NotImplementedError

    def phases(self) -> Sequence[Phase]:
        """What is trained before the method."""
        return ()

    def after_step(self) -> None:
        """Called after each optimizer step."""


def token_positions(batch: Batch) -> Tensor:
    """The positions that count, as booleans. For texts with one label each, those that are not padding."""
    counted = batch.counted()
    attention = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
    if counted.ndim == 1 and attention is not None and attention.ndim == 2:
        return attention.bool() & counted.unsqueeze(-1)
    return counted


def counted_rows(batch: Batch) -> Tensor:
    """``[B]``, the rows in which something counts, as booleans."""
    counted = batch.counted()
    return counted if counted.ndim == 1 else counted.flatten(1).any(-1)


def mean_over(x: Tensor, positions: Tensor) -> Tensor:
    """``[B, D]``, the mean over the positions that count."""
    masked = x.float().masked_fill(~positions.unsqueeze(-1), 0.0)
    return masked.sum(1) / positions.sum(1, keepdim=True).clamp(min=1)
