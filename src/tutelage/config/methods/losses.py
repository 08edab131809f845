"""Losses that a recipe can name: on logits (``soft``) and on pairs of features (``loss``), each with its options.

The name of an entry is the name of its function in ``tutelage.losses``. A new loss is that function, one entry here
and, if it has options, a section. ``CONTRIBUTING.md`` shows both.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError

from tutelage.config.base import BelowOne, Count, Fraction, NotNegative, Positive, Section, Share
from tutelage.config.messages import must_be
from tutelage.errors import shorten, suggest

Shape = tuple[int, ...]
Heads = Literal["each", "mean"]
Variant = Literal["paper", "authors"]


class LossOptions(Section):
    """Options of a loss. An option that is left out has the default of the function in ``tutelage.losses``."""

    method_only: ClassVar[frozenset[str]] = frozenset()
    """Options that the method uses itself, and does not pass to the function."""

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the function."""
        return self.model_dump(exclude_none=True, exclude=set(self.method_only))


# Losses on logits --------------------------------------------------------------------------------------


class DistOptions(LossOptions):
    """Options of DIST."""

    beta: NotNegative | None = None
    """Weight of the correlation across classes."""
    gamma: NotNegative | None = None
    """Weight of the correlation across the rows of the batch."""


class DkdOptions(LossOptions):
    """Options of decoupled KD."""

    alpha: NotNegative | None = None
    """Weight of the target class against all others."""
    beta: NotNegative | None = None
    """Weight of the distribution over the other classes."""


class JsOptions(LossOptions):
    """Options of the generalised Jensen-Shannon divergence."""

    beta: Fraction | None = None
    """The teacher's share of the mixture."""


class KdOptions(LossOptions):
    """Options of Hinton's loss."""

    standardize: bool | None = None
    """Divide logits by their standard deviation first."""


class MlkdOptions(LossOptions):
    """Options of multi-level logit distillation."""

    temperatures: Annotated[list[Positive], Field(min_length=1)] | None = None
    """The temperatures that are summed over."""
    instance: NotNegative | None = None
    """Weight of the KL of each row."""
    batch: NotNegative | None = None
    """Weight of the similarities between rows."""
    classes: NotNegative | None = None
    """Weight of the similarities between classes."""


class SkewKlOptions(LossOptions):
    """Options of the skewed KL divergence."""

    alpha: BelowOne | None = None
    """The other side's share of the mixture."""
    reverse: bool | None = None
    """From the student to the mixture, in place of from the teacher."""


@dataclass(frozen=True)
class LogitLossSpec:
    """A loss on logits.

    Attributes:
        options: the section of its options.
        temperature: the default T; ``None`` for a loss without temperature.
        needs_labels: whether the function takes the target class too, so that only rows with a label count.
        tasks: the kinds of labels that it is for.
    """

    options: type[LossOptions] = LossOptions
    temperature: float | None = 4.0
    needs_labels: bool = False
    tasks: tuple[str, ...] = ("classes",)


LOGIT_LOSSES: dict[str, LogitLossSpec] = {
    "binary_kd": LogitLossSpec(tasks=("multi-label",)),
    "dist": LogitLossSpec(DistOptions, temperature=1.0),
    "dkd": LogitLossSpec(DkdOptions, needs_labels=True),
    "js": LogitLossSpec(JsOptions, temperature=1.0),
    "kd": LogitLossSpec(KdOptions),
    "margin_mse": LogitLossSpec(temperature=None, tasks=("classes", "ranking")),
    "mlkd": LogitLossSpec(MlkdOptions, temperature=None),
    "mse": LogitLossSpec(temperature=None, tasks=("classes", "multi-label", "regression")),
    "reverse_kl": LogitLossSpec(temperature=1.0),
    "skew_kl": LogitLossSpec(SkewKlOptions, temperature=1.0),
    "soft_cross_entropy": LogitLossSpec(),
    "tvd": LogitLossSpec(temperature=1.0),
}
"""Every loss on logits by the name of its function."""

SOFT_OF_TASK = {"classes": "kd", "multi-label": "binary_kd", "regression": "mse", "ranking": "margin_mse"}
"""The default loss on logits for each kind of labels."""


# Losses on features ------------------------------------------------------------------------------------


class AttentionOptions(LossOptions):
    """Options of ``attention_mse``."""

    heads: Heads | None = None
    """``each``: head by head; ``mean``: the mean over heads, whose numbers may then differ."""


class AttentionKlOptions(AttentionOptions):
    """Options of ``attention_kl``."""

    inputs: Literal["scores", "probabilities"] = "probabilities"
    """What the taps give: attention before or after the softmax."""
    temperature: Positive | None = None
    """T of the distributions."""


class AttentionTransferOptions(LossOptions):
    """Options of attention transfer."""

    variant: Literal["normalised", "authors"] | None = None
    """``authors``: a mean over positions, to which the published weight belongs; ``normalised``: their sum."""


class CorrelationOptions(LossOptions):
    """Options of correlation congruence."""

    gamma: Positive | None = None
    """Of the Gaussian kernel."""
    order: Count | None = None
    """Order of its Taylor expansion."""


class CrdOptions(LossOptions):
    """Options of contrastive representation distillation."""

    method_only: ClassVar[frozenset[str]] = frozenset({"negatives", "width", "momentum"})
    negatives: Count = 16_384
    """Negatives for each example, at most all other examples."""
    temperature: Positive = 0.07
    """T of the contrast."""
    variant: Variant = "authors"
    """``authors``: the code to which the published weight belongs."""
    width: Count = 128
    """Width of the embeddings that are compared."""
    momentum: BelowOne = 0.5
    """Momentum of the memory."""


class FactorTransferOptions(LossOptions):
    """Options of factor transfer."""

    method_only: ClassVar[frozenset[str]] = frozenset({"rate", "share"})
    rate: Positive = 0.5
    """Channels of the factor, as a share of the teacher's."""
    share: Share = 0.1
    """Share of the steps that train the paraphraser."""
    variant: Variant | None = None
    """``authors``: a mean over elements; ``paper``: their sum."""


class NstOptions(LossOptions):
    """Options of neuron selectivity transfer."""

    kernel: Literal["polynomial", "linear"] | None = None
    """The kernel of the maximum mean discrepancy."""


class ReviewOptions(LossOptions):
    """Options of knowledge review."""

    method_only: ClassVar[frozenset[str]] = frozenset({"width"})
    levels: list[Count] | None = None
    """Sizes to which maps are pooled, in addition to their own."""
    width: Count | None = None
    """Channels of the fusion. Default: the student's deepest, at most 512."""


class ValueRelationOptions(LossOptions):
    """Options of ``value_relation``."""

    heads: Count | None = None
    """Relation heads; they must divide both widths."""
    temperature: Positive | None = None
    """T of the distributions."""


class VariantOptions(LossOptions):
    """Options of ``pkt`` and ``vid``."""

    variant: Variant | None = None
    """``authors``: the code to which the published weight belongs; ``paper``: the formula of the paper."""


@dataclass(frozen=True)
class FeatureLossSpec:
    """A loss on pairs of features.

    Attributes:
        options: the section of its options.
        weight: the default weight: a number, or a function of the shapes of student and teacher and the options.
        pairs: what ``pairs: auto`` compares; ``named`` if pairs must be given.
        source: where the weight comes from.
        compares: ``elements`` of two features of any kind; ``maps`` ``[B, C, H, W]``; ``examples`` of a batch with
            each other (a relation); ``attention`` ``[B, H, L, L]``; or ``vectors`` of tokens ``[B, L, D]``.
        projects: whether a projector first gives the student's feature the teacher's shape.
        joint: whether all pairs together are one term.
        module: the class in ``tutelage.methods.features`` that computes it. The default calls the function.
    """

    options: type[LossOptions] = LossOptions
    weight: float | Callable[[Shape, Shape, Any], float] = 1.0
    pairs: Literal["activations", "embedding", "last", "named", "stages"] = "stages"
    source: str = "ours"
    compares: Literal["elements", "maps", "examples", "attention", "vectors"] = "elements"
    projects: bool = False
    joint: bool = False
    module: str = "PairwiseLoss"


def _attention_transfer_weight(student: Shape, teacher: Shape, options: AttentionTransferOptions) -> float:
    """1000 for a mean over positions."""
    positions = math.prod(min(a, b) for a, b in zip(student[2:], teacher[2:], strict=True))
    return 1000.0 if options.variant == "authors" else 1000.0 / positions


def _vid_weight(student: Shape, teacher: Shape, options: VariantOptions) -> float:
    """1 for a mean over the elements of an example, or of a token."""
    elements = teacher[-1] if len(teacher) == 3 else math.prod(teacher[1:])
    return 1.0 if options.variant == "authors" else 1.0 / elements


def _factor_transfer_weight(student: Shape, teacher: Shape, options: FactorTransferOptions) -> float:
    """500 for a mean over the factor's elements."""
    elements = max(round(options.rate * teacher[1]), 1) * math.prod(teacher[2:])
    return 500.0 if options.variant == "authors" else 500.0 / elements


def _pkt_weight(student: Shape, teacher: Shape, options: VariantOptions) -> float:
    """30000 for a mean over the pairs of a batch of 64."""
    return 30000.0 if options.variant == "authors" else 30000.0 / 64


FEATURE_LOSSES: dict[str, FeatureLossSpec] = {
    "attention_kl": FeatureLossSpec(
        AttentionKlOptions, pairs="named", compares="attention", module="TokenPairwiseLoss"
    ),
    "attention_mse": FeatureLossSpec(
        AttentionOptions, pairs="named", compares="attention", module="TokenPairwiseLoss"
    ),
    "attention_transfer": FeatureLossSpec(
        AttentionTransferOptions, _attention_transfer_weight, source="Zagoruyko and Komodakis", compares="maps"
    ),
    "correlation": FeatureLossSpec(CorrelationOptions, 100.0, "embedding", compares="examples"),
    "crd": FeatureLossSpec(CrdOptions, 0.8, "embedding", "Tian et al.", module="ContrastiveLoss"),
    "factor_transfer": FeatureLossSpec(
        FactorTransferOptions, _factor_transfer_weight, "last", "Kim et al.", module="FactorTransferLoss"
    ),
    "hint": FeatureLossSpec(weight=100.0, source="Tian et al.", projects=True),
    "nst": FeatureLossSpec(NstOptions, 50.0, source="Tian et al., after Huang and Wang", compares="maps"),
    "overhaul": FeatureLossSpec(
        weight=1e-3, pairs="activations", source="Heo et al. on CIFAR", compares="maps", joint=True,
        module="OverhaulLoss",
    ),
    "pkt": FeatureLossSpec(
        VariantOptions, _pkt_weight, "embedding", "Tian et al., batch 64", compares="examples"
    ),
    "review": FeatureLossSpec(
        ReviewOptions, source="Chen et al., who use 0.6 to 8", compares="maps", joint=True, module="ReviewLoss"
    ),
    "rkd_angle": FeatureLossSpec(
        weight=50.0, pairs="embedding", source="Tian et al., after Park et al.", compares="examples"
    ),
    "rkd_distance": FeatureLossSpec(
        weight=25.0, pairs="embedding", source="Tian et al., after Park et al.", compares="examples"
    ),
    "similarity": FeatureLossSpec(weight=3000.0, pairs="last", source="Tung and Mori", compares="examples"),
    "value_relation": FeatureLossSpec(
        ValueRelationOptions, pairs="named", compares="vectors", module="TokenPairwiseLoss"
    ),
    "vid": FeatureLossSpec(VariantOptions, _vid_weight, source="Tian et al.", module="VidLoss"),
}  # fmt: skip
"""Every loss on features by the name of its function."""

PROJECTORS = ("auto", "conv1x1", "identity", "linear", "mlp")
"""Kinds of projectors."""


def option_misfits(
    name: str, given: Mapping[str, Any], spec: LogitLossSpec | FeatureLossSpec, key: str
) -> Iterator[tuple[str, str]]:
    """The options that loss ``name`` does not have, and their wrong values; ``key`` holds the options."""
    known = list(spec.options.model_fields)
    try:
        spec.options.model_validate(dict(given))
    except ValidationError as error:
        for details in error.errors(include_url=False):
            option = str(details["loc"][0])
            what = f"{name}: {option} is {shorten(details['input'])}; it must be {must_be(details)}"
            if details["type"] == "extra_forbidden":
                what = f"{name} has no option {shorten(option)}{suggest(option, known)}; its options: "
                what += ", ".join(known) or "none"
            yield f"{key}.{option}", what
