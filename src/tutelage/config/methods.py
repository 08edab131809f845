"""Sections of a recipe's ``method``: one class for each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tutelage.config.base import Count, Fraction, Misfit, NotNegative, Positive, Section, suggest
from tutelage.config.models import ModelConfig

SOFT_OBJECTIVES: dict[str, tuple[str, ...]] = {
    "binary_kd": (),
    "dist": ("beta", "gamma"),
    "dkd": ("alpha", "beta"),
    "js": ("beta",),
    "kd": ("standardize",),
    "mlkd": ("temperatures", "instance", "batch", "classes"),
    "mse": (),
    "reverse_kl": (),
    "skew_kl": ("alpha", "reverse"),
    "soft_cross_entropy": (),
    "tvd": (),
}
"""Objectives on logits by name, each with its options."""

SOFT_TEMPERATURES: dict[str, float | None] = {
    "binary_kd": 4.0, "dist": 1.0, "dkd": 4.0, "js": 1.0, "kd": 4.0, "mlkd": None, "mse": None, "reverse_kl": 1.0,
    "skew_kl": 1.0, "soft_cross_entropy": 4.0, "tvd": 1.0,
}  # fmt: skip
"""T of each where none is given; none for those that take none."""

FEATURE_OBJECTIVES: dict[str, tuple[str, ...]] = {
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
"""Objectives on a pair of hidden states by name, each with its options."""

PROJECTORS = ("auto", "conv1x1", "identity", "linear", "mlp")
"""Kinds of projectors."""


def _known(what: str, table: Mapping[str, Any]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"unknown {what} {name!r}{suggest(name, table)}; allowed: {', '.join(table)}")
        return name

    return AfterValidator(check)


FeatureObjective = Annotated[str, _known("objective", FEATURE_OBJECTIVES)]


class MethodConfig(Section):
    """What every method has."""

    taught: ClassVar[bool] = True
    """Whether it needs a teacher."""


class SoftConfig(MethodConfig):
    """Soft labels beside hard ones: what every method has."""

    temperature: Positive | None = None
    """T, of teacher and student alike. Default: 4 for ``dkd``, ``kd`` and ``soft_cross_entropy``, else 1; ``mse``
    and ``mlkd`` have none."""
    alpha: NotNegative = 0.9
    """Weight of the soft labels; at most 1 unless ``hard`` is given."""
    hard: NotNegative | None = None
    """Weight of the hard labels. Default: 1 - alpha."""
    soft: Annotated[str, _known("soft objective", SOFT_OBJECTIVES)] = "kd"
    """How the soft labels are compared: ``dist``, ``dkd``, ``js``, ``kd``, ``mlkd``, ``mse``, ``reverse_kl``,
    ``skew_kl``, ``soft_cross_entropy`` or ``tvd``. Where labels are several or numbers: ``binary_kd``, ``mse``."""
    soft_options: dict[str, Any] = Field(default_factory=dict)
    """Options of that: ``alpha`` and ``beta`` of dkd, ``standardize`` of kd, ``beta`` and ``gamma`` of dist ..."""

    @model_validator(mode="after")
    def _weighed(self) -> SoftConfig:
        if self.hard is None and self.alpha > 1:
            raise Misfit(
                f"alpha: {self.alpha:g} leaves {1 - self.alpha:g} for the labels; give at most 1, or 'hard' too",
                "alpha",
            )
        check_known_options(self.soft, self.soft_options, SOFT_OBJECTIVES, "soft_options")
        usual = SOFT_TEMPERATURES[self.soft]
        if self.temperature is not None and usual is None:
            raise Misfit(f"{self.soft} has no temperature, given {self.temperature:g}; leave it out", "temperature")
        self.temperature = self.temperature or usual
        return self


def check_known_options(
    name: str, options: Mapping[str, Any], table: Mapping[str, tuple[str, ...]], key: str
) -> None:
    """Raise :class:`Misfit` where ``options`` holds one that ``name`` does not take."""
    for option in options:
        if option not in table[name]:
            raise Misfit(
                f"{name} has no option {option!r}{suggest(option, table[name])}; "
                f"its options: {', '.join(table[name]) or 'none'}",
                key,
            )


class LogitConfig(SoftConfig):
    """Soft labels of Hinton et al.: alpha * T^2 * KL(p_T || p_S) + (1 - alpha) * CE; or others on logits."""

    kind: Literal["logit"] = "logit"
    """Learns from the teacher's logits."""


class PairConfig(Section):
    """Two modules whose outputs are compared. What it leaves out is taken from the method."""

    student: str
    """Tap of the student, such as ``stages.1``; ``head:input`` for what goes into a module."""
    teacher: str
    """Tap of the teacher."""
    objective: FeatureObjective | None = None
    """What compares them."""
    weight: NotNegative | None = None
    """Weight of this pair."""
    projector: Literal[PROJECTORS] | None = None  # type: ignore[valid-type]
    """Kind of the projector."""
    norm: bool | None = None
    """Batch norm after the projector."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the objective."""


def _pairs(given: Any) -> Any:
    if given is None or given == "auto":
        return None
    if not isinstance(given, list) or not given:
        raise ValueError(f"{given!r} is no list of pairs; allowed: auto, or [{{student: PATH, teacher: PATH}}, ...]")
    return given


class FeatureConfig(SoftConfig):
    """Hidden states beside soft labels: alpha * kd + (1 - alpha) * ce + an objective over pairs, weighted."""

    kind: Literal["feature"]
    """Matches hidden states of teacher and student, through what the objective learns for that."""
    pairs: Annotated[list[PairConfig] | None, BeforeValidator(_pairs)] = None
    """``auto``, the default: what the objective's paper compares, as the table of objectives below says. Or a list of
    ``{student: TAP, teacher: TAP}``, each with ``objective``, ``weight``, ``projector``, ``norm`` and ``options``
    of its own where wanted. ``tutelage taps RECIPE`` lists what there is to tap."""
    objective: FeatureObjective = "hint"
    """One of the table of objectives below."""
    weight: NotNegative | None = None
    """Weight of each pair. Default: the published one of the objective, as the run prints it."""
    projector: Literal[PROJECTORS] = "auto"  # type: ignore[valid-type]
    """Brings the student's feature to the teacher's channels, for ``hint``. ``auto``: a linear one (``conv1x1`` on
    maps) where they differ. Sizes are matched by pooling or interpolation."""
    norm: bool = False
    """Batch norm after the projector."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the objective, as in the table below."""
    first: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of all steps in which the pairs alone are learned, up to the tapped modules; the rest then goes without
    them. The two stages of FitNets, each with its own optimizer and schedule. Default 0: both together."""

    @model_validator(mode="after")
    def _taken(self) -> FeatureConfig:
        check_known_options(self.objective, self.options, FEATURE_OBJECTIVES, "options")
        for pair in self.pairs or []:
            check_known_options(pair.objective or self.objective, pair.options, FEATURE_OBJECTIVES, "pairs")
        return self


class SimkdConfig(SoftConfig):
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


def _peers(given: Any) -> Any:
    if isinstance(given, int) and not isinstance(given, bool):
        if given < 1:
            raise ValueError(f"{given} peers, and a student alone has nobody to learn from; give 1 or more")
        return [None] * given
    if not isinstance(given, list) or not given:
        raise ValueError(f"{given!r} is neither a number nor a list of models; for example 2, or [convnet, mlp]")
    return [{"model": one} if isinstance(one, str) else one for one in given]


class MutualConfig(MethodConfig):
    """Students that teach each other: of each, CE + weight * the mean over its peers of T^2 * KL(p_peer || p). Deep
    mutual learning; with `target: mean`, `refresh` and `burn_in` codistillation. The recipe's student is one of them,
    the one that is exported and compared with itself alone; its peers are saved in `models/` and measured too."""

    taught: ClassVar[bool] = False
    kind: Literal["mutual"]
    """Learns from peers that are trained along; the teacher, where there is one, is only compared with."""
    peers: Annotated[list[ModelConfig | None], BeforeValidator(_peers)] = 1  # type: ignore[assignment]
    """Whom the student learns with, beside itself: a number of copies of its architecture with other
    initialisations, or a list of models such as ``[{model: convnet, options: {widths: [8, 16]}}, mlp]``, where
    ``null`` is a copy. Default: one copy, so two students in all."""
    temperature: Positive = 1.0
    """T, of all students alike."""
    weight: NotNegative = 1.0
    """Of what the peers say."""
    target: Literal["each", "mean"] = "each"
    """``each``: the mean of the losses to each peer; ``mean``: the loss to the mean of their probabilities."""
    refresh: Count | None = None
    """Learn from copies of the peers that are renewed every so many steps. Default: from the peers as they are."""
    burn_in: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the steps in which the labels alone are learned."""


def _exits(given: Any) -> Any:
    if given is None or given == "auto":
        return None
    if not isinstance(given, list) or not given:
        raise ValueError(f"{given!r} is no list of taps; allowed: auto, or for example [stages.0, stages.1]")
    return given


class ByotConfig(MethodConfig):
    """Be your own teacher: exits at the student's stages learn from the labels and from its own deepest classifier.
    Exits are trained along, measured and not exported."""

    taught: ClassVar[bool] = False
    kind: Literal["byot"]
    """The network teaches itself; the teacher, where there is one, is only compared with."""
    exits: Annotated[list[str] | None, BeforeValidator(_exits)] = None
    """``auto``, the default: the last feature map of each resolution but the deepest. Or a list of taps, as
    ``tutelage taps RECIPE`` shows them."""
    alpha: Fraction = 0.3
    """Of an exit: (1 - alpha) * CE + alpha * KL to the deepest, without T^2."""
    temperature: Positive = 3.0
    """T of that KL."""
    hint: NotNegative = 0.03
    """Weight of the squared distance of an exit's feature to what goes into the student's head."""
    factor: Count = 4
    """By how much an exit's bottleneck is narrower than that."""


class SupervisedConfig(MethodConfig):
    """The labels alone, smoothed or not, in place of a teacher's: a control. Learns from labelled images only."""

    taught: ClassVar[bool] = False
    kind: Literal["supervised"]
    """Cross-entropy; the teacher, where there is one, is only compared with."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the target that is spread evenly over all classes; 0.1 is usual."""


class TeacherFreeConfig(MethodConfig):
    """Tf-KD: (1 - alpha) * CE + alpha * soft labels of a teacher that nobody trained. Learns from labelled images
    only."""

    taught: ClassVar[bool] = False
    kind: Literal["teacher-free"]
    """Soft labels made by hand, a control; the teacher, where there is one, is only compared with."""
    alpha: Fraction = 0.1
    """Weight of those soft labels."""
    temperature: Positive = 20.0
    """T at which they are softened; the paper has 20 or more."""
    correct: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    """Probability of the label before that; the others share the rest. Above one over the number of classes."""
    variant: Literal["authors", "paper"] = "authors"
    """``authors``: KL(softmax(p / T) || student), the code to which the published numbers and alpha belong, close to
    label smoothing; ``paper``: T^2 * KL of both at T."""


METHOD_KINDS: dict[str, type[MethodConfig]] = {
    "byot": ByotConfig,
    "feature": FeatureConfig,
    "logit": LogitConfig,
    "mutual": MutualConfig,
    "simkd": SimkdConfig,
    "supervised": SupervisedConfig,
    "teacher-free": TeacherFreeConfig,
}
"""Every method that a recipe can name, with its options."""
