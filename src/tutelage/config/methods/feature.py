"""Options of methods on hidden states."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from tutelage.config.base import BelowOne, Count, NotNegative, Section, known
from tutelage.config.methods.base import auto_or_list
from tutelage.config.methods.logit import SoftLabelOptions
from tutelage.config.methods.losses import FEATURE_LOSSES, PROJECTORS, LossOptions, option_misfits

FeatureLossName = Annotated[str, known("loss", FEATURE_LOSSES)]


class PairOptions(Section):
    """Two modules whose outputs are compared. Missing keys are taken from the method."""

    student: str
    """Tap of the student, such as ``stages.1``; ``head:input`` for the input of a module."""
    teacher: str
    """Tap of the teacher."""
    loss: FeatureLossName | None = None
    """The loss that compares them."""
    weight: NotNegative | None = None
    """Weight of this pair."""
    projector: Literal[PROJECTORS] | None = None  # type: ignore[valid-type]
    """Kind of the projector."""
    norm: bool | None = None
    """Batch norm after the projector."""
    student_channels: Literal["first", "last"] | None = None
    """Where a feature map of the student has its channels. Default: read from its shape."""
    teacher_channels: Literal["first", "last"] | None = None
    """The same for the teacher."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the loss."""


class ResolvedPair(NamedTuple):
    """A pair with all that it takes from the method; of ``pairs: auto`` one with empty taps."""

    student: str
    teacher: str
    loss: str
    weight: float | None
    projector: str
    norm: bool
    options: LossOptions
    channels: tuple[str | None, str | None] = (None, None)


class FeatureOptions(SoftLabelOptions):
    """Hidden states, soft labels and hard labels: alpha * kd + (1 - alpha) * ce + the weighted losses of pairs."""

    kind: Literal["feature"] = "feature"
    """The loss compares hidden states of teacher and student, and their logits."""
    pairs: Annotated[list[PairOptions] | None, auto_or_list("pairs", "[{student: PATH, teacher: PATH}, ...]")] = None
    """``auto``, the default: the pairs of the loss's paper, as in the table of losses below. Or a list of ``{student:
    TAP, teacher: TAP}``, each with its own ``loss``, ``weight``, ``projector``, ``norm`` and ``options`` if needed.
    ``tutelage taps RECIPE`` lists all taps."""
    loss: FeatureLossName = "hint"
    """A loss of the table below."""
    weight: NotNegative | None = None
    """Weight of each pair. Default: the loss's published weight, which the run prints."""
    projector: Literal[PROJECTORS] = "auto"  # type: ignore[valid-type]
    """Module that maps the student's feature to the teacher's channels; of the losses, only ``hint`` takes one.
    ``auto``: linear (``conv1x1`` on maps) if the channels differ, else none. Pooling or interpolation matches
    sizes."""
    norm: bool = False
    """Batch norm after the projector."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the loss, as in the table below."""
    stage1_fraction: BelowOne = 0.0
    """Share of all steps that train the pairs alone, up to the tapped modules; the other steps train without them.
    The two stages of FitNets, each with its own optimizer and schedule. Default 0: both together."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Options that a loss does not have, and projectors where it takes none."""
        yield from super().misfits()
        yield from option_misfits(self.loss, self.options, FEATURE_LOSSES[self.loss], "options")
        given = enumerate(self.pairs or [PairOptions(student="", teacher="")])
        for prefix, pair in (("" if self.pairs is None else f"pairs.{i}.", pair) for i, pair in given):
            name = pair.loss or self.loss
            if self.pairs is not None:
                options = {key: value for key, value in pair.options.items() if value is not None}
                yield from option_misfits(name, options, FEATURE_LOSSES[name], f"{prefix}options")
            if not FEATURE_LOSSES[name].projects:
                if (pair.projector or self.projector) != "auto":
                    own = prefix if pair.projector is not None else ""
                    yield f"{own}projector", f"{name} takes no projector; leave out projector and norm"
                elif self.norm if pair.norm is None else pair.norm:
                    own = prefix if pair.norm is not None else ""
                    yield f"{own}norm", f"{name} takes no projector; leave out projector and norm"

    def resolved_pairs(self) -> list[ResolvedPair]:
        """The pairs with all that they take from the method."""
        return [self._resolved(pair) for pair in self.pairs or [PairOptions(student="", teacher="")]]

    def _resolved(self, pair: PairOptions) -> ResolvedPair:
        name = pair.loss or self.loss
        shared = self.options if name == self.loss else {}
        given = {k: v for k, v in {**shared, **pair.options}.items() if v is not None}
        return ResolvedPair(
            pair.student, pair.teacher, name,
            weight=self.weight if pair.weight is None else pair.weight,
            projector=pair.projector or self.projector,
            norm=self.norm if pair.norm is None else pair.norm,
            options=FEATURE_LOSSES[name].options.model_validate(given),
            channels=(pair.student_channels, pair.teacher_channels),
        )  # fmt: skip


class SimkdOptions(SoftLabelOptions):
    """SimKD: the student's projected features go through the teacher's own classifier."""

    kind: Literal["simkd"] = "simkd"
    """The student gets a projector and the teacher's classifier in place of its own head, and is exported with
    them."""
    alpha: NotNegative = 0.0
    """Weight of the soft labels. Default 0, as in the paper."""
    hard: NotNegative | None = 0.0
    """Weight of the hard labels. Default 0, as in the paper."""
    weight: NotNegative = 1.0
    """Weight of the squared distance to the teacher's features."""
    factor: Count = 2
    """Divisor of the width of the teacher's features, which gives the width of the projector's middle layer."""
    variant: Literal["authors", "paper"] = "authors"
    """``authors``: mean over elements, for the published numbers and weight 1; ``paper``: sum over elements."""
