"""Learning from a teacher's hidden states, beside its logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tutelage import objectives
from tutelage.data.batch import Batch
from tutelage.errors import ConfigError, ModelError, nearest
from tutelage.methods.base import Method, Term
from tutelage.methods.logit import LogitMethod
from tutelage.students import build_projector, feature_shapes, stages
from tutelage.students.projectors import Shape
from tutelage.taps import Needs, Observation, find
from tutelage.teachers.signal import Signal


@dataclass(frozen=True)
class Objective:
    """An objective on a pair of features.

    Attributes:
        loss: the function of tensors.
        options: what it takes beside tensors.
        projects: whether the student's feature must first have the shape of the teacher's.
        relation: whether it compares the examples of a batch with each other.
        maps: whether it is for feature maps only.
    """

    loss: Callable[..., Tensor]
    options: tuple[str, ...] = ()
    projects: bool = False
    relation: bool = False
    maps: bool = False


FEATURE_OBJECTIVES: dict[str, Objective] = {
    "attention_transfer": Objective(objectives.attention_transfer, ("variant",), maps=True),
    "correlation": Objective(objectives.correlation, ("gamma", "order"), relation=True),
    "hint": Objective(objectives.hint, projects=True),
    "nst": Objective(objectives.nst, ("kernel",), maps=True),
    "pkt": Objective(objectives.pkt, ("variant",), relation=True),
    "rkd_angle": Objective(objectives.rkd_angle, relation=True),
    "rkd_distance": Objective(objectives.rkd_distance, relation=True),
    "similarity": Objective(objectives.similarity, relation=True),
}
"""Every objective that a pair can name. ``tutelage.config.FEATURE_OBJECTIVES`` has their options."""


@dataclass(frozen=True)
class _Pair:
    name: str
    student: str
    teacher: str
    objective: Objective
    options: dict[str, Any]
    tokens: bool


class FeatureMethod(Method):
    r"""Pairs of hidden states beside soft and hard labels: :class:`LogitMethod` plus a weighted sum of objectives.

    Each pair is a term named for its objective and the student's module, as ``hint(stages.1)``. Where an objective
    compares element by element, the student's feature goes through a projector first, which is trained along.
    An objective on relations compares the examples of a micro-batch: for it the split of a batch does matter.

    Args:
        pairs: a list of ``{student: path, teacher: path}``, each with ``objective``, ``weight``, ``projector``,
            ``norm`` and options of the objective where they differ from those below; or ``auto``, which pairs the
            last feature maps of each resolution that both models have.
        temperature: T of the soft labels.
        alpha: weight of the soft labels; the hard ones have 1 - alpha.
        objective: one of :data:`FEATURE_OBJECTIVES`.
        weight: of each pair.
        projector: one of :data:`tutelage.students.PROJECTORS`.
        norm: batch norm in the projector.
        options: of the objective.

    Raises:
        ConfigError: unknown objective, option or value.
    """

    def __init__(
        self,
        pairs: Literal["auto"] | Sequence[Mapping[str, Any]] | None = "auto",
        temperature: float = 4.0,
        alpha: float = 0.9,
        *,
        objective: str = "hint",
        weight: float = 1.0,
        projector: str = "auto",
        norm: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.logit = LogitMethod(temperature, alpha)
        self.weights = dict(self.logit.weights)
        shared = {"objective": objective, "weight": weight, "projector": projector, "norm": norm}
        self.auto = pairs is None or pairs == "auto"
        given: Sequence[Mapping[str, Any]] = [{}] if self.auto else pairs  # type: ignore[assignment]
        if not given:
            raise ConfigError("pairs is empty", remedy="give at least one pair, or auto")
        self.given = []
        for i, pair in enumerate(given):
            own = {k: v for k, v in pair.items() if v is not None}
            inherited = options or {} if own.get("objective", objective) == objective else {}
            plain = {k: v for k, v in own.items() if k != "options"}
            self.given.append({**shared, **inherited, **own.get("options", {}), **plain})
            _check(self.given[-1], f"method.pairs[{i}]", paths=not self.auto)
        self.projectors = nn.ModuleList()
        self.pairs: list[_Pair] = []

    def build(self, student: nn.Module, teacher: nn.Module, example: Batch) -> None:
        """Find the pairs in both models, and make the projectors that lead from one to the other.

        Raises:
            ModelError: unknown path, or features that do not go together.
        """
        given = _matched(self.given[0], student, teacher, example) if self.auto else self.given
        for i, pair in enumerate(given):
            for who, model in (("student", student), ("teacher", teacher)):
                try:
                    find(model, pair[who])
                except ModelError as error:
                    raise ModelError(error.what, where=f"method.pairs[{i}].{who}", remedy=error.remedy) from None
        mine = feature_shapes(student, example, [p["student"] for p in given])
        theirs = feature_shapes(teacher, example, [p["teacher"] for p in given])
        self.pairs, self.projectors, self.weights = [], nn.ModuleList(), dict(self.logit.weights)
        for i, pair in enumerate(given):
            options = {k: v for k, v in pair.items() if k not in _KEYS}
            objective, s, t = FEATURE_OBJECTIVES[pair["objective"]], mine[pair["student"]], theirs[pair["teacher"]]
            try:
                tokens = _tokens(example, s, t)
                if objective.maps and not len(s) == len(t) == 4:
                    raise ModelError(
                        f"{pair['objective']} compares feature maps, and these are {list(s)} and {list(t)}",
                        remedy="tap modules that give [B, C, H, W], or use hint or a relation",
                    )
                self.projectors.append(
                    build_projector(s, t, kind=pair["projector"], norm=pair["norm"])
                    if objective.projects
                    else nn.Identity()
                )
            except (ModelError, ConfigError) as error:
                raise type(error)(error.what, where=f"method.pairs[{i}]", remedy=error.remedy) from None
            name = self._name(pair)
            self.weights[name] = pair["weight"]
            self.pairs.append(_Pair(name, pair["student"], pair["teacher"], objective, options, tokens))
        self.needs = Needs(hidden=tuple(dict.fromkeys(p.teacher for p in self.pairs)))
        self.student_needs = Needs(hidden=tuple(dict.fromkeys(p.student for p in self.pairs)))

    def _name(self, pair: Mapping[str, Any]) -> str:
        name, n = f"{pair['objective']}({pair['student']})", 1
        unique = name
        while unique in self.weights:
            n += 1
            unique = f"{name}#{n}"
        return unique

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Those of the labels, and for each pair the examples (or tokens) that count."""
        return {**self.logit.counts(batch), **{p.name: _counted(batch, p).sum() for p in self.pairs}}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """``kd``, ``ce`` and a term for each pair."""
        assert signal is not None
        terms = self.logit(student, batch, signal)
        for pair, projector in zip(self.pairs, self.projectors, strict=True):
            s, t = student.hidden[pair.student], signal.hidden[pair.teacher]
            if pair.objective.projects:
                s = projector(s, t)
            mask = _counted(batch, pair)
            if pair.tokens and pair.objective.relation:
                s, t = (_mean(x, _positions(batch)) for x in (s, t))
            total = pair.objective.loss(s, t, mask=mask, reduction="sum", **pair.options)
            terms[pair.name] = Term(total, mask.sum())
        return dict(terms)

    def formula(self) -> str:
        """The loss in one line; of ``auto``, the pairs as soon as they are found."""
        names = [f"{self.weights[p.name]:g} * {p.name}" for p in self.pairs]
        if not names:
            names = [f"{p['weight']:g} * {p['objective']}({p.get('student', 'auto')})" for p in self.given]
        return " + ".join([self.logit.formula(), *names])


_KEYS = ("student", "teacher", "objective", "weight", "projector", "norm")


def _check(pair: Mapping[str, Any], where: str, *, paths: bool) -> None:
    """Raise :class:`ConfigError` unless a pair names what there is."""
    name = pair["objective"]
    if name not in FEATURE_OBJECTIVES:
        close = nearest(str(name), list(FEATURE_OBJECTIVES), 1)
        raise ConfigError(
            f"unknown objective {name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""),
            where=where, remedy=f"allowed: {', '.join(FEATURE_OBJECTIVES)}",
        )  # fmt: skip
    missing = [k for k in ("student", "teacher") if paths and not isinstance(pair.get(k), str)]
    if missing:
        raise ConfigError(f"has no path {missing[0]!r}", where=where, remedy="give {student: PATH, teacher: PATH}")
    objective = FEATURE_OBJECTIVES[name]
    if not objective.projects and (pair["projector"] != "auto" or pair["norm"]):
        raise ConfigError(f"{name} uses no projector", where=where, remedy="leave out projector and norm")
    options = {k: v for k, v in pair.items() if k not in _KEYS}
    for key in options:
        if key not in objective.options:
            raise ConfigError(
                f"{name} has no option {key!r}", where=where,
                remedy=f"its options: {', '.join(objective.options) or 'none'}",
            )  # fmt: skip
    try:
        probe = torch.ones(2, 2, 2, 2)
        objective.loss(probe, probe, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name} with {options}: {error}", where=where, remedy="see docs/recipes.md") from None


def _matched(
    settings: Mapping[str, Any], student: nn.Module, teacher: nn.Module, example: Batch
) -> list[dict[str, Any]]:
    """A pair for every resolution of which both models have feature maps."""
    mine, theirs = stages(student, example), stages(teacher, example)
    common = [size for size in mine if size in theirs]
    if not common:
        shown = [", ".join(f"{h}x{w}" for h, w in found) or "none" for found in (mine, theirs)]
        raise ModelError(
            f"no feature maps of one resolution: the student has {shown[0]}, the teacher {shown[1]}",
            where="method.pairs",
            remedy="name the modules: pairs: [{student: PATH, teacher: PATH}]",
        )
    return [{**settings, "student": mine[size], "teacher": theirs[size]} for size in common]


def _tokens(example: Batch, student: Shape, teacher: Shape) -> bool:
    """Whether a pair has one feature for each position of a text, some of which may not count."""
    known = _positions(example)
    found = known.ndim == 2 and len(student) == 3 and tuple(known.shape) == student[:2]
    if found and student[:2] != teacher[:2]:
        raise ModelError(
            f"the student has {student[1]} positions, the teacher {teacher[1]}",
            remedy="pair modules that see the same tokens",
        )
    return found


def _positions(batch: Batch) -> Tensor:
    """Positions that count: of texts with one label each, those that are no padding."""
    counted = batch.counted()
    attention = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
    if counted.ndim == 1 and attention is not None and attention.ndim == 2:
        return attention.bool() & counted.unsqueeze(-1)
    return counted


def _counted(batch: Batch, pair: _Pair) -> Tensor:
    """What a pair's term averages over: tokens ``[B, L]``, or examples ``[B]``."""
    if pair.tokens:
        positions = _positions(batch)
        return positions.any(-1) if pair.objective.relation else positions
    counted = batch.counted()
    return counted if counted.ndim == 1 else counted.flatten(1).any(-1)


def _mean(x: Tensor, positions: Tensor) -> Tensor:
    """``[B, D]`` mean over the positions that count."""
    kept = x.float().masked_fill(~positions.unsqueeze(-1), 0.0)
    return kept.sum(1) / positions.sum(1, keepdim=True).clamp(min=1)
