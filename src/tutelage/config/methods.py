"""Sections of a recipe's ``method``: one class for each kind."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tutelage.config.base import Fraction, Misfit, NotNegative, Positive, Section, suggest


class LogitConfig(Section):
    """Soft labels of Hinton et al.: alpha * T^2 * KL(p_T || p_S) + (1 - alpha) * CE."""

    kind: Literal["logit"] = "logit"
    temperature: Positive = 4.0
    alpha: Fraction = 0.9


FEATURE_OBJECTIVES: dict[str, tuple[str, ...]] = {
    "attention_transfer": ("variant",),
    "correlation": ("gamma", "order"),
    "hint": (),
    "nst": ("kernel",),
    "pkt": ("variant",),
    "rkd_angle": (),
    "rkd_distance": (),
    "similarity": (),
}
"""Objectives on a pair of hidden states by name, each with its options."""

PROJECTORS = ("auto", "conv1x1", "identity", "linear", "mlp")
"""Kinds of projectors."""


def _objective(name: str) -> str:
    if name not in FEATURE_OBJECTIVES:
        raise ValueError(
            f"unknown objective {name!r}{suggest(name, FEATURE_OBJECTIVES)}; allowed: {', '.join(FEATURE_OBJECTIVES)}"
        )
    return name


FeatureObjective = Annotated[str, AfterValidator(_objective)]


class PairConfig(Section):
    """Two modules whose outputs are compared. What it leaves out is taken from the method."""

    student: str
    """Path of a module of the student, such as ``stages.1``."""
    teacher: str
    """Path of a module of the teacher."""
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


class FeatureConfig(Section):
    """Hidden states beside soft labels: alpha * kd + (1 - alpha) * ce + an objective over pairs, weighted."""

    kind: Literal["feature"]
    """Matches hidden states of teacher and student, through projectors where the objective needs them."""
    temperature: Positive = 4.0
    """T, of teacher and student alike."""
    alpha: Fraction = 0.9
    """Weight of the soft labels; the hard ones have 1 - alpha."""
    pairs: Annotated[list[PairConfig] | None, BeforeValidator(_pairs)] = None
    """``auto``, the default: the last feature maps of every resolution that both models have. Or a list of
    ``{student: PATH, teacher: PATH}``, each with ``objective``, ``weight``, ``projector``, ``norm`` and ``options``
    of its own where wanted."""
    objective: FeatureObjective = "hint"
    """``attention_transfer``, ``correlation``, ``hint``, ``nst``, ``pkt``, ``rkd_angle``, ``rkd_distance`` or
    ``similarity``."""
    weight: NotNegative = 1.0
    """Weight of each pair. Papers use about 100 for ``hint``, 25 and 50 for ``rkd_distance`` and ``rkd_angle``."""
    projector: Literal[PROJECTORS] = "auto"  # type: ignore[valid-type]
    """Brings the student's feature to the teacher's channels, for ``hint``. ``auto``: a linear one (``conv1x1`` on
    maps) where they differ. Sizes are matched by pooling or interpolation."""
    norm: bool = False
    """Batch norm after the projector."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the objective: ``variant`` of attention_transfer and pkt, ``kernel`` of nst, ``gamma`` and
    ``order`` of correlation."""

    @model_validator(mode="after")
    def _known(self) -> FeatureConfig:
        chosen = [(self.objective, self.options)]
        chosen += [(pair.objective or self.objective, pair.options) for pair in self.pairs or []]
        for name, options in chosen:
            for key in options:
                if key not in FEATURE_OBJECTIVES[name]:
                    allowed = ", ".join(FEATURE_OBJECTIVES[name]) or "none"
                    raise Misfit(f"{name} has no option {key!r}; its options: {allowed}", "options")
        return self


METHOD_KINDS: dict[str, type[Section]] = {"feature": FeatureConfig, "logit": LogitConfig}
"""Every method that a recipe can name, with its options."""
