"""Losses that are a function of one pair of features, with a projector if shapes must agree."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from tutelage import losses
from tutelage.config import FEATURE_LOSSES, ResolvedPair
from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.methods.features.base import FeatureContext, FeatureLoss, FeaturePair, mean_over, token_positions
from tutelage.students import build_projector


class PairwiseLoss(FeatureLoss):
    """One pair, and the function of ``tutelage.losses`` that the loss is named for."""

    def __init__(self, settings: ResolvedPair, pairs: Sequence[FeaturePair], context: FeatureContext) -> None:
        super().__init__(settings, pairs, context)
        (pair,) = pairs
        self.function: Callable[..., Tensor] = getattr(losses, settings.loss)
        self.projector: nn.Module | None = None
        if FEATURE_LOSSES[settings.loss].projects:
            self.projector = build_projector(
                pair.student_shape, pair.teacher_shape, kind=settings.projector, norm=settings.norm
            )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum of the loss over what counts."""
        s, t = student[0], teacher[0]
        if self.projector is not None:
            s = self.projector(s, t)
        if self.pairs[0].tokens and self.compares == "examples":
            positions = token_positions(batch)
            s, t = mean_over(s, positions), mean_over(t, positions)
        return self.function(s, t, mask=self.counted(batch), reduction="sum", **self.arguments)


class TokenPairwiseLoss(PairwiseLoss):
    """A pairwise loss whose examples are the query tokens of an attention.

    TinyBERT's ``attention_mse`` is on scores; on the probabilities of an attention module it is another loss.
    """

    def __init__(self, settings: ResolvedPair, pairs: Sequence[FeaturePair], context: FeatureContext) -> None:
        super().__init__(settings, pairs, context)
        s, t = pairs[0].student_shape, pairs[0].teacher_shape
        attention = self.compares == "attention"
        kind, ndim = ("attention [B, H, L, L]", 4) if attention else ("vectors [B, L, D]", 3)
        square = not attention or (s[-1:] == s[-2:-1] and t[-1:] == t[-2:-1])
        if not len(s) == len(t) == ndim or not square:
            raise ModelError(
                f"this loss compares {kind}, and these are {list(s)} and {list(t)}",
                remedy="tap an attention module's probabilities, as in `attention.self[1]` of a model built with "
                "attn_implementation: eager"
                if attention
                else "tap the layer that computes values (or queries, or keys)",
            )

    def counted(self, batch: Batch) -> Tensor:
        """Query tokens that count, ``[B, L]``; of images, every patch."""
        positions = token_positions(batch)
        if positions.ndim == 2:
            return positions
        return positions.unsqueeze(-1).expand(-1, self.pairs[0].teacher_shape[-2])
