"""Links that are functions of a pair, with a projector where shapes must agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.methods.features.base import FeatureContext, FeatureLoss, FeaturePair, mean_over, token_positions
from tutelage.students import build_projector


class PairwiseLoss(FeatureLoss):
    """One pair and a function of tensors, with a projector where shapes must agree."""

    maps = False
    loss: Callable[..., Tensor]
    projects: ClassVar[bool] = False

    def __init__(self, sites: Sequence[FeaturePair], setting: FeatureContext, options: Mapping[str, Any]) -> None:
        kept = {k: v for k, v in options.items() if k not in ("projector", "norm")}
        super().__init__(sites, setting, kept)
        (site,) = sites
        self.projector: nn.Module | None = None
        if self.projects:
            self.projector = build_projector(
                site.student_shape, site.teacher_shape,
                kind=options.get("projector", "auto"), norm=options.get("norm", False),
            )  # fmt: skip

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Try the options on features of ones."""
        probe = torch.ones(2, 2, 2, 2)
        cls.loss(probe, probe, **options)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum of the loss over what counts."""
        s, t = student[0], teacher[0]
        if self.projector is not None:
            s = self.projector(s, t)
        if self.sites[0].tokens and self.relation:
            positions = token_positions(batch)
            s, t = mean_over(s, positions), mean_over(t, positions)
        return type(self).loss(s, t, mask=self.counted(batch), reduction="sum", **self.options)


class Hint(PairwiseLoss):
    """FitNets' regressor, and the mean square."""

    loss = staticmethod(losses.hint)
    projects = True


class AttentionTransfer(PairwiseLoss):
    """Maps of activation."""

    loss = staticmethod(losses.attention_transfer)
    maps = True


class SelectivityTransfer(PairwiseLoss):
    """Sets of channels."""

    loss = staticmethod(losses.nst)
    maps = True


class Correlation(PairwiseLoss):
    """Kernels between examples."""

    loss = staticmethod(losses.correlation)
    relation = True


class ProbabilisticTransfer(PairwiseLoss):
    """Distributions over neighbours."""

    loss = staticmethod(losses.pkt)
    relation = True


class Angles(PairwiseLoss):
    """Angles of triples of examples."""

    loss = staticmethod(losses.rkd_angle)
    relation = True


class Distances(PairwiseLoss):
    """Distances of pairs of examples."""

    loss = staticmethod(losses.rkd_distance)
    relation = True


class Similarity(PairwiseLoss):
    """Inner products of pairs of examples."""

    loss = staticmethod(losses.similarity)
    relation = True


class TokenRelation(PairwiseLoss):
    """Base of losses whose examples are the query tokens of an attention."""

    heads_first: ClassVar[bool] = True
    remedy: ClassVar[str] = (
        "tap an attention module's probabilities, as in `attention.self[1]` of a model built with "
        "attn_implementation: eager"
    )

    def __init__(self, sites: Sequence[FeaturePair], setting: FeatureContext, options: Mapping[str, Any]) -> None:
        super().__init__(sites, setting, options)
        s, t = sites[0].student_shape, sites[0].teacher_shape
        kind, wanted = ("attention [B, H, L, L]", 4) if self.heads_first else ("vectors [B, L, D]", 3)
        square = not self.heads_first or (s[-1:] == s[-2:-1] and t[-1:] == t[-2:-1])
        if not len(s) == len(t) == wanted or not square:
            raise ModelError(
                f"this loss compares {kind}, and these are {list(s)} and {list(t)}",
                remedy=self.remedy,
            )

    def counted(self, batch: Batch) -> Tensor:
        """Query tokens that count, ``[B, L]``."""
        length = self.sites[0].teacher_shape[-2]
        known = token_positions(batch)
        if known.ndim == 2:
            return known
        return known.unsqueeze(-1).expand(-1, length)  # of images, every patch


class AttentionSquares(TokenRelation):
    """Attention, compared by squares. TinyBERT's loss where the tap gives scores; on probabilities it is another."""

    loss = staticmethod(losses.attention_mse)


class AttentionDivergence(TokenRelation):
    """Attention, compared as distributions. What a tap gives is taken for probabilities unless ``inputs: scores``."""

    loss = staticmethod(losses.attention_kl)

    def __init__(self, sites: Sequence[FeaturePair], setting: FeatureContext, options: Mapping[str, Any]) -> None:
        super().__init__(sites, setting, {"inputs": "probabilities", **options})


class ValueRelation(TokenRelation):
    """Relations between values."""

    loss = staticmethod(losses.value_relation)
    heads_first = False
    remedy = "tap the layer that makes values (or queries, or keys)"

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Try the options on tokens of ones, as wide as there are heads."""
        heads = options.get("heads", 1)
        probe = torch.ones(1, 2, heads if isinstance(heads, int) and heads > 0 else 1)
        cls.loss(probe, probe, **{"heads": heads, **options})
