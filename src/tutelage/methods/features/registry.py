"""What a recipe can name: every loss on features, with its link and its published weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tutelage.methods.features.base import FeatureLoss, FeaturePair, Where
from tutelage.methods.features.compared import (
    Angles,
    AttentionDivergence,
    AttentionSquares,
    AttentionTransfer,
    Correlation,
    Distances,
    Hint,
    ProbabilisticTransfer,
    SelectivityTransfer,
    Similarity,
    ValueRelation,
)
from tutelage.methods.features.contrast import Contrast
from tutelage.methods.features.learned import FactorTransfer, Overhaul, Review, Variational


@dataclass(frozen=True)
class FeatureLossName:
    """A loss on features, as a recipe names it.

    Attributes:
        link: what compares.
        options: what it takes.
        weight: where none is given: a number, or a function of the first pair and the options.
        where: what ``pairs: auto`` compares; ``named`` where pairs must be given.
        joint: whether all pairs make one link.
        source: where the weight comes from.
    """

    link: type[FeatureLoss]
    options: tuple[str, ...] = ()
    weight: float | Callable[[FeaturePair, Mapping[str, Any]], float] = 1.0
    where: Where = "stages"
    joint: bool = False
    source: str = "ours"


def _by_elements(mean: float, variant: str, elements: Callable[[FeaturePair], int]) -> Callable[..., float]:
    """A weight published for a mean over elements, for a variant that sums them too."""

    def weight(site: FeaturePair, options: Mapping[str, Any]) -> float:
        return mean if options.get("variant") == variant else mean / elements(site)

    return weight


def _positions(site: FeaturePair) -> int:
    return math.prod(min(a, b) for a, b in zip(site.student_shape[2:], site.teacher_shape[2:], strict=True))


def _elements(site: FeaturePair) -> int:
    """Elements of an example; of tokens, each of which is one, of a token."""
    return site.teacher_shape[-1] if len(site.teacher_shape) == 3 else math.prod(site.teacher_shape[1:])


def _of_factor(site: FeaturePair, options: Mapping[str, Any]) -> float:
    """500 for a mean over the factor's elements."""
    channels = max(round(options.get("rate", 0.5) * site.teacher_shape[1]), 1)
    elements = channels * math.prod(site.teacher_shape[2:])
    return 500.0 if options.get("variant") == "authors" else 500.0 / elements


FEATURE_LOSSES: dict[str, FeatureLossName] = {
    "attention_kl": FeatureLossName(AttentionDivergence, ("heads", "inputs", "temperature"), 1.0, "named"),
    "attention_mse": FeatureLossName(AttentionSquares, ("heads",), 1.0, "named"),
    "attention_transfer": FeatureLossName(
        AttentionTransfer, ("variant",), _by_elements(1000.0, "authors", _positions), source="Zagoruyko and Komodakis"
    ),
    "correlation": FeatureLossName(Correlation, ("gamma", "order"), 100.0, "embedding"),
    "crd": FeatureLossName(
        Contrast, ("negatives", "temperature", "variant", "width", "momentum"), 0.8, "embedding", source="Tian et al."
    ),
    "factor_transfer": FeatureLossName(
        FactorTransfer, ("rate", "share", "variant"), _of_factor, "last", source="Kim et al.",
    ),
    "hint": FeatureLossName(Hint, (), 100.0, source="Tian et al."),
    "nst": FeatureLossName(SelectivityTransfer, ("kernel",), 50.0, source="Tian et al., after Huang and Wang"),
    "overhaul": FeatureLossName(Overhaul, (), 1e-3, "activations", joint=True, source="Heo et al. on CIFAR"),
    "pkt": FeatureLossName(
        ProbabilisticTransfer, ("variant",),
        lambda site, options: 30000.0 if options.get("variant") == "authors" else 30000.0 / 64,
        "embedding", source="Tian et al., batch 64",
    ),
    "review": FeatureLossName(Review, ("levels", "width"), 1.0, joint=True, source="Chen et al., who use 0.6 to 8"),
    "rkd_angle": FeatureLossName(Angles, (), 50.0, "embedding", source="Tian et al., after Park et al."),
    "rkd_distance": FeatureLossName(Distances, (), 25.0, "embedding", source="Tian et al., after Park et al."),
    "similarity": FeatureLossName(Similarity, (), 3000.0, "last", source="Tung and Mori"),
    "value_relation": FeatureLossName(ValueRelation, ("heads", "temperature"), 1.0, "named"),
    "vid": FeatureLossName(Variational, ("variant",), _by_elements(1.0, "authors", _elements), source="Tian et al."),
}  # fmt: skip
"""Every loss that a pair can name. ``tutelage.config.FEATURE_LOSSES`` has their options."""
