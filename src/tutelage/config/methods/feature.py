"""Methods on hidden states."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tutelage.config.base import NotNegative, Section
from tutelage.config.methods.base import auto_or_list, check_known_options, known
from tutelage.config.methods.logit import SoftLabelOptions

FEATURE_LOSSES: dict[str, tuple[str, ...]] = {
    "attention_kl": ("heads", "inputs", "temperature"),
    "attention_mse": ("heads",),
    "attention_transfer": ("variant",),
    "correlation": ("gamma", "order"),
    "crd": ("negatives", "temperature", "variant", "width", "momentum"),
    "factor_transfer": ("rate", "share", "variant"),
    "hint": (),
    "nst": ("kernel",),
    "overhaul": (),
    "pkt": ("variant",),
    "review": ("levels", "width"),
    "rkd_angle": (),
    "rkd_distance": (),
    "similarity": (),
    "value_relation": ("heads", "temperature"),
    "vid": ("variant",),
}
"""Losses on a pair of hidden states by name, each with its options."""

PROJECTORS = ("auto", "conv1x1", "identity", "linear", "mlp")
"""Kinds of projectors."""

FeatureLossName = Annotated[str, known("loss", FEATURE_LOSSES)]


class PairOptions(Section):
    """Two modules whose outputs are compared. What it leaves out is taken from the method."""

    student: str
    """Tap of the student, such as ``stages.1``; ``head:input`` for what goes into a module."""
    teacher: str
    """Tap of the teacher."""
    loss: FeatureLossName | None = None
    """What compares them."""
    weight: NotNegative | None = None
    """Weight of this pair."""
    projector: Literal[PROJECTORS] | None = None  # type: ignore[valid-type]
    """Kind of the projector."""
    norm: bool | None = None
    """Batch norm after the projector."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the loss."""


class FeatureOptions(SoftLabelOptions):
    """Hidden states beside soft labels: alpha * kd + (1 - alpha) * ce + a loss over pairs, weighted."""

    kind: Literal["feature"]
    """Matches hidden states of teacher and student, through what the loss learns for that."""
    pairs: Annotated[list[PairOptions] | None, auto_or_list("pairs", "[{student: PATH, teacher: PATH}, ...]")] = None
    """``auto``, the default: what the loss's paper compares, as the table of losses below says. Or a list of
    ``{student: TAP, teacher: TAP}``, each with ``loss``, ``weight``, ``projector``, ``norm`` and ``options``
    of its own where wanted. ``tutelage taps RECIPE`` lists what there is to tap."""
    loss: FeatureLossName = "hint"
    """One of the table of losses below."""
    weight: NotNegative | None = None
    """Weight of each pair. Default: the published one of the loss, as the run prints it."""
    projector: Literal[PROJECTORS] = "auto"  # type: ignore[valid-type]
    """Brings the student's feature to the teacher's channels, for ``hint``. ``auto``: a linear one (``conv1x1`` on
    maps) where they differ. Sizes are matched by pooling or interpolation."""
    norm: bool = False
    """Batch norm after the projector."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the loss, as in the table below."""
    stage1_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of all steps in which the pairs alone are learned, up to the tapped modules; the rest then goes without
    them. The two stages of FitNets, each with its own optimizer and schedule. Default 0: both together."""

    @model_validator(mode="after")
    def _taken(self) -> FeatureOptions:
        check_known_options(self.loss, self.options, FEATURE_LOSSES, "options")
        for pair in self.pairs or []:
            check_known_options(pair.loss or self.loss, pair.options, FEATURE_LOSSES, "pairs")
        return self


class SimkdOptions(SoftLabelOptions):
    """SimKD: the student's features, projected, go through the teacher's own classifier."""

    kind: Literal["simkd"]
    """The student gets a projector and the teacher's classifier in place of its own head, and exports with them."""
    alpha: NotNegative = 0.0
    """Weight of the soft labels beside it. Default 0, as in the paper."""
    hard: NotNegative | None = 0.0
    """Weight of the hard labels beside it. Default 0, as in the paper."""
    weight: NotNegative = 1.0
    """Weight of the squared distance to the teacher's features."""
    factor: Annotated[int, Field(ge=1)] = 2
    """By how much the projector's middle layer is narrower than the teacher's features."""
    variant: Literal["authors", "paper"] = "authors"
    """``authors``: mean over elements, to which the published numbers and weight 1 belong; ``paper``: their sum."""
