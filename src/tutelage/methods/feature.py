"""Learning from a teacher's hidden states, beside its logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

from torch import Tensor, nn

from tutelage.data.batch import Batch, Task
from tutelage.errors import ConfigError, ModelError, TutelageError, suggest
from tutelage.methods.base import Method, Phase, Term
from tutelage.methods.features import (
    FEATURE_LOSSES,
    FeatureContext,
    FeatureLoss,
    FeaturePair,
    PairwiseLoss,
    Where,
    token_positions,
)
from tutelage.methods.logit import LogitMethod
from tutelage.students import feature_shapes, find_embedding_tap, find_preactivations, find_stages
from tutelage.students.projectors import Shape
from tutelage.taps import Needs, Observation, find_module
from tutelage.teachers.signal import Signal

Pairs = Literal["auto"] | Sequence[Mapping[str, Any]] | None


class PairsMethod(Method):
    """Pairs of hidden states and nothing else: what :class:`FeatureMethod` adds to soft and hard labels.

    Args:
        pairs: a list of ``{student: TAP, teacher: TAP}``, each with what of the following it has of its own;
            or ``auto``.
        shared: ``loss``, ``weight``, ``projector``, ``norm`` of each pair.
        options: of the loss.

    Raises:
        ConfigError: unknown loss, option or value.
    """

    def __init__(self, pairs: Pairs, shared: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.auto = pairs is None or pairs == "auto"
        given: Sequence[Mapping[str, Any]] = [{}] if self.auto else pairs  # type: ignore[assignment]
        if not given:
            raise ConfigError("pairs is empty", remedy="give at least one pair, or auto")
        self.given = []
        for i, pair in enumerate(given):
            own = {k: v for k, v in pair.items() if v is not None}
            inherited = options or {} if own.get("loss", shared["loss"]) == shared["loss"] else {}
            plain = {k: v for k, v in own.items() if k != "options"}
            self.given.append({**shared, **inherited, **own.get("options", {}), **plain})
            _check(self.given[-1], f"method.pairs[{i}]", paths=not self.auto)
        self.needs_ids = any(FEATURE_LOSSES[p["loss"]].link.needs_ids for p in self.given)
        self.links = nn.ModuleList()
        self.names: list[str] = []
        self.weights = {}

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the pairs in both models, and make the links that lead from one to the other.

        Raises:
            ModelError: unknown tap, or features that do not go together.
        """
        assert teacher is not None
        given = self.given
        if self.auto:
            where = FEATURE_LOSSES[given[0]["loss"]].where
            found = MATCHES[where](student, teacher, example)
            given = [{**given[0], "student": mine, "teacher": theirs} for mine, theirs in found]
        for i, pair in enumerate(given):
            for who, model in (("student", student), ("teacher", teacher)):
                try:
                    find_module(model, pair[who])
                except ModelError as error:
                    raise ModelError(error.what, where=f"method.pairs[{i}].{who}", remedy=error.remedy) from None
        mine = feature_shapes(student, example, [p["student"] for p in given])
        theirs = feature_shapes(teacher, example.for_teacher(), [p["teacher"] for p in given])
        setting = FeatureContext(student, teacher, example, ids)
        self.links, self.names, self.weights = nn.ModuleList(), [], {}
        for indices in _groups(given):
            first = given[indices[0]]
            entry = FEATURE_LOSSES[first["loss"]]
            options = {k: v for k, v in first.items() if k not in _KEYS}
            if issubclass(entry.link, PairwiseLoss) and entry.link.projects:
                options |= {"projector": first["projector"], "norm": first["norm"]}
            try:
                sites = [_site(example, given[i], mine, theirs) for i in indices]
                self.links.append(entry.link(sites, setting, options))
            except TutelageError as error:
                raise type(error)(error.what, where=f"method.pairs[{indices[0]}]", remedy=error.remedy) from None
            name = self._name(first)
            self.names.append(name)
            weight = first["weight"]
            if weight is None:
                weight = entry.weight(sites[0], options) if callable(entry.weight) else entry.weight
            self.weights[name] = weight
        sites = [site for link in self.links for site in link.sites]  # type: ignore[union-attr]
        self.needs = Needs(logits=False, hidden=tuple(dict.fromkeys(s.teacher for s in sites)))
        self.student_needs = Needs(logits=False, hidden=tuple(dict.fromkeys(s.student for s in sites)))

    def _name(self, pair: Mapping[str, Any]) -> str:
        name, n = f"{pair['loss']}({pair['student']})", 1
        unique = name
        while unique in self.weights:
            n += 1
            unique = f"{name}#{n}"
        return unique

    def _named(self) -> list[tuple[str, FeatureLoss]]:
        return list(zip(self.names, self.links, strict=True))  # type: ignore[arg-type]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """For each link the examples (or tokens) that count."""
        return {name: link.counted(batch).sum() for name, link in self._named()}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """A term for each link."""
        assert signal is not None
        terms = {}
        for name, link in self._named():
            mine = [student.hidden[site.student] for site in link.sites]
            theirs = [signal.hidden[site.teacher] for site in link.sites]
            terms[name] = Term(link(mine, theirs, batch), link.counted(batch).sum())
        return terms

    def phases(self) -> Sequence[Phase]:
        """Those of the links, each under a name of its own."""
        found: list[Phase] = []
        for _, link in self._named():
            for phase in link.phases():
                again = sum(p.name.partition("#")[0] == phase.name for p in found)
                found.append(phase._replace(name=f"{phase.name}#{again + 1}") if again else phase)
        return found

    def after_step(self) -> None:
        """That of the links."""
        for _, link in self._named():
            link.after_step()

    def formula(self) -> str:
        """The loss in one line; of ``auto``, the pairs as soon as they are found."""
        if self.names:
            return " + ".join(f"{self.weights[name]:g} * {name}" for name in self.names)
        shown = [("w" if p["weight"] is None else f"{p['weight']:g}", p["loss"], p) for p in self.given]
        return " + ".join(f"{w} * {name}({p.get('student', 'auto')})" for w, name, p in shown)


class FeatureMethod(Method):
    r"""Pairs of hidden states beside soft and hard labels: :class:`LogitMethod` plus a weighted sum of losses.

    Each pair is a term named for its loss and the student's module, as ``hint(stages.1)``; of ``overhaul`` and
    ``review`` all pairs are one term. Where a loss compares element by element, the student's feature goes
    through a projector first, which is trained along. A loss on relations compares the examples of a
    micro-batch: for it the split of a batch does matter.

    Args:
        pairs: a list of ``{student: TAP, teacher: TAP}``, each with ``loss``, ``weight``, ``projector``,
            ``norm`` and options of the loss where they differ from those below; or ``auto``, which pairs what
            the loss's paper does: the last feature maps of each resolution that both models have (or the last
            alone, or these before their activation), or what goes into the output heads.
        temperature: T of the soft labels.
        alpha: weight of the soft labels.
        hard: weight of the hard ones; default 1 - alpha.
        soft: one of :data:`LOGIT_LOSSES`.
        soft_options: of that.
        task: what labels are.
        loss: one of :data:`FEATURE_LOSSES`.
        weight: of each pair. Default: that of the loss.
        projector: one of :data:`tutelage.students.PROJECTORS`.
        norm: batch norm in the projector.
        options: of the loss.
        stage1_fraction: share of the steps in which the pairs alone are learned, and after which they are dropped:
            the two stages of FitNets. Default 0: both together.

    Raises:
        ConfigError: unknown loss, option or value.
    """

    def __init__(
        self,
        pairs: Pairs = "auto",
        temperature: float | None = None,
        alpha: float = 0.9,
        *,
        hard: float | None = None,
        soft: str | None = None,
        soft_options: Mapping[str, Any] | None = None,
        task: Task = "classes",
        loss: str = "hint",
        weight: float | None = None,
        projector: str = "auto",
        norm: bool = False,
        options: Mapping[str, Any] | None = None,
        stage1_fraction: float = 0.0,
    ) -> None:
        super().__init__()
        self.task = task
        self.logit = LogitMethod(temperature, alpha, hard=hard, soft=soft, soft_options=soft_options, task=task)
        shared = {"loss": loss, "weight": weight, "projector": projector, "norm": norm}
        self.hidden = PairsMethod(pairs, shared, options)
        if not 0 <= stage1_fraction < 1:
            raise ConfigError(f"stage1_fraction={stage1_fraction}", remedy="a share of all steps, from 0 to below 1")
        self.stage1_fraction, self.needs_ids = stage1_fraction, self.hidden.needs_ids
        self.needs, self.takes_sparse = self.logit.needs, self.logit.takes_sparse
        self.weights = dict(self.logit.weights)

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the pairs in both models, and make the links that lead from one to the other.

        Raises:
            ModelError: unknown tap, or features that do not go together.
        """
        self.hidden.build(student, teacher, example, ids)
        shares = {phase.name: phase.share for phase in self.phases()}
        if sum(shares.values()) >= 1:
            raise ConfigError(
                f"what comes first takes {sum(shares.values()):.0%} of the steps "
                f"({', '.join(f'{name} {share:.0%}' for name, share in shares.items())}), and nothing is left",
                where="method", remedy="lower stage1_fraction, or the share of factor_transfer",
            )  # fmt: skip
        if self.stage1_fraction:
            self.hidden.requires_grad_(False)
            return
        assert self.hidden.needs is not None
        assert self.hidden.student_needs is not None
        self.weights = {**self.logit.weights, **self.hidden.weights}
        self.needs = Needs(hidden=self.hidden.needs.hidden, temperature=self.logit.temperature)
        self.student_needs = Needs(hidden=self.hidden.student_needs.hidden)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Those of the labels, and for each pair the examples (or tokens) that count."""
        return self.logit.counts(batch) | ({} if self.stage1_fraction else self.hidden.counts(batch))

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The soft term, ``ce`` and, unless they came first, a term for each pair."""
        terms = self.logit(student, batch, signal)
        return {**terms, **({} if self.stage1_fraction else self.hidden(student, batch, signal))}

    def phases(self) -> Sequence[Phase]:
        """What the links have to learn first, and the hints where they come first."""
        before = list(self.hidden.phases())
        return [*before, Phase("hints", self.stage1_fraction, self.hidden)] if self.stage1_fraction else before

    def after_step(self) -> None:
        """That of the links."""
        self.hidden.after_step()

    def formula(self) -> str:
        """The loss in one line; of ``auto``, the pairs as soon as they are found."""
        if self.stage1_fraction:
            return f"{self.hidden.formula()} for {self.stage1_fraction:.0%} of the steps, then {self.logit.formula()}"
        return f"{self.logit.formula()} + {self.hidden.formula()}"


_KEYS = ("student", "teacher", "loss", "weight", "projector", "norm")


def _groups(given: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Indices of pairs that make one link each: those of a joint loss together."""

    def key(i: int) -> Any:
        joint = FEATURE_LOSSES[given[i]["loss"]].joint
        return given[i]["loss"] if joint else i

    return [list(indices) for _, indices in groupby(range(len(given)), key)]


def _site(
    example: Batch, pair: Mapping[str, Any], mine: Mapping[str, Shape], theirs: Mapping[str, Shape]
) -> FeaturePair:
    s, t = mine[pair["student"]], theirs[pair["teacher"]]
    return FeaturePair(pair["student"], pair["teacher"], s, t, _tokens(example, s, t))


def _check(pair: Mapping[str, Any], where: str, *, paths: bool) -> None:
    """Raise :class:`ConfigError` unless a pair names what there is."""
    name = pair["loss"]
    if name not in FEATURE_LOSSES:
        raise ConfigError(
            f"unknown loss {name!r}" + suggest(str(name), list(FEATURE_LOSSES)),
            where=where, remedy=f"allowed: {', '.join(FEATURE_LOSSES)}",
        )  # fmt: skip
    missing = [k for k in ("student", "teacher") if paths and not isinstance(pair.get(k), str)]
    if missing:
        raise ConfigError(f"has no tap {missing[0]!r}", where=where, remedy="give {student: TAP, teacher: TAP}")
    entry = FEATURE_LOSSES[name]
    projects = issubclass(entry.link, PairwiseLoss) and entry.link.projects
    if not projects and (pair["projector"] != "auto" or pair["norm"]):
        raise ConfigError(f"{name} takes no projector", where=where, remedy="leave out projector and norm")
    options = {k: v for k, v in pair.items() if k not in _KEYS}
    for key in options:
        if key not in entry.options:
            raise ConfigError(
                f"{name} has no option {key!r}", where=where,
                remedy=f"its options: {', '.join(entry.options) or 'none'}",
            )  # fmt: skip
    try:
        entry.link.check(options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name} with {options}: {error}", where=where, remedy="see docs/recipes.md") from None


# What `auto` pairs ------------------------------------------------------------------------------------


def _by_resolution(find_in: Callable[[nn.Module, Batch], dict[tuple[int, int], str]], what: str) -> Any:
    def match(student: nn.Module, teacher: nn.Module, example: Batch) -> list[tuple[str, str]]:
        mine, theirs = find_in(student, example), find_in(teacher, example.for_teacher())
        common = [size for size in mine if size in theirs]
        if not common:
            shown = [", ".join(f"{h}x{w}" for h, w in found) or "none" for found in (mine, theirs)]
            raise ModelError(
                f"no {what} of one resolution: the student has {shown[0]}, the teacher {shown[1]}",
                where="method.pairs",
                remedy="name the modules: pairs: [{student: TAP, teacher: TAP}]",
            )
        return [(mine[size], theirs[size]) for size in common]

    return match


def _last(student: nn.Module, teacher: nn.Module, example: Batch) -> list[tuple[str, str]]:
    """The last feature map of both, whatever its resolution."""
    found = [
        list(find_stages(m, seen).values()) for m, seen in ((student, example), (teacher, example.for_teacher()))
    ]
    if not all(found):
        who = "student" if not found[0] else "teacher"
        raise ModelError(
            f"the {who} has no feature maps", where="method.pairs",
            remedy="name the modules: pairs: [{student: TAP, teacher: TAP}]",
        )  # fmt: skip
    return [(found[0][-1], found[1][-1])]


def _embeddings(student: nn.Module, teacher: nn.Module, example: Batch) -> list[tuple[str, str]]:
    """What goes into the output heads."""
    return [(find_embedding_tap(student), find_embedding_tap(teacher))]


def _named(student: nn.Module, teacher: nn.Module, example: Batch) -> list[tuple[str, str]]:
    raise ModelError(
        "this loss compares what only a name can find", where="method.pairs",
        remedy="name the modules: pairs: [{student: TAP, teacher: TAP}]",
    )  # fmt: skip


MATCHES: dict[Where, Callable[[nn.Module, nn.Module, Batch], list[tuple[str, str]]]] = {
    "activations": _by_resolution(find_preactivations, "feature maps before an activation"),
    "embedding": _embeddings,
    "last": _last,
    "named": _named,
    "stages": _by_resolution(find_stages, "feature maps"),
}
"""What ``auto`` pairs, by the kind of place that a loss compares."""


def _tokens(example: Batch, student: Shape, teacher: Shape) -> bool:
    """Whether a pair has one feature for each position of a text, some of which may not count."""
    known = token_positions(example)
    found = known.ndim == 2 and len(student) == 3 and tuple(known.shape) == student[:2]
    if found and student[:2] != teacher[:2]:
        raise ModelError(
            f"the student has {student[1]} positions, the teacher {teacher[1]}",
            remedy="pair modules that see the same tokens",
        )
    return found
