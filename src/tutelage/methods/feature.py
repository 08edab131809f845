"""Learning from a teacher's hidden states and logits."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from tutelage.config import FEATURE_LOSSES, SOFT_OF_TASK, FeatureOptions, ResolvedPair
from tutelage.data.batch import Batch, Task
from tutelage.errors import ConfigError, ModelError, TutelageError
from tutelage.methods import features
from tutelage.methods.base import Method, Phase, Term
from tutelage.methods.features import FeatureContext, FeatureLoss, FeaturePair, token_positions
from tutelage.methods.logit import LogitMethod
from tutelage.students import (
    feature_shapes,
    find_channels_last,
    find_embedding_tap,
    find_preactivations,
    find_stages,
    find_token_stage,
    to_channels_first,
)
from tutelage.students.projectors import Shape
from tutelage.taps import Needs, Observation, find_module
from tutelage.teachers.signal import Signal


def feature_loss(name: str) -> type[FeatureLoss]:
    """The class of an entry of ``FEATURE_LOSSES``."""
    kind: type[FeatureLoss] = getattr(features, FEATURE_LOSSES[name].module)
    return kind


class PairsMethod(Method):
    """Pairs of hidden states, without the labels of :class:`FeatureMethod`, of which it is a part."""

    Options = FeatureOptions
    options: FeatureOptions

    def __init__(self, options: FeatureOptions | None = None, /, **keywords: Any) -> None:
        super().__init__(options, **keywords)
        self.settings = self.options.resolved_pairs()
        self.needs_ids = any(feature_loss(pair.loss).needs_ids for pair in self.settings)
        self.losses = nn.ModuleList()
        self.names: list[str] = []
        self.weights = {}

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the pairs in both models, and build their losses.

        Raises:
            ModelError: unknown tap, or features that do not go together.
        """
        assert teacher is not None
        settings = self.settings
        if self.options.pairs is None:
            (auto,) = settings
            matches = MATCHES[FEATURE_LOSSES[auto.loss].pairs](student, teacher, example)
            settings = [auto._replace(student=s, teacher=t) for s, t in matches]
        for i, pair in enumerate(settings):
            for who, model, tap in (("student", student, pair.student), ("teacher", teacher, pair.teacher)):
                try:
                    find_module(model, tap)
                except ModelError as error:
                    remedy = f"{error.remedy}; `tutelage taps RECIPE` lists all taps"
                    raise ModelError(error.what, where=f"method.pairs.{i}.{who}", remedy=remedy) from None
        sides = [_Side(student, example, settings, 0), _Side(teacher, example.for_teacher(), settings, 1)]
        context = FeatureContext(student, teacher, example, ids)
        self.losses, self.names, self.weights = nn.ModuleList(), [], {}
        for indices in _groups(settings):
            first = settings[indices[0]]
            try:
                pairs = []
                for i in indices:
                    (s, mine), (t, theirs) = (side.read(settings[i]) for side in sides)
                    pairs.append(FeaturePair(*settings[i][:2], s, t, _tokens(example, s, t), (mine, theirs)))
                self.losses.append(feature_loss(first.loss)(first, pairs, context))
            except TutelageError as error:
                error.where = "method.loss" if self.options.pairs is None else f"method.pairs.{indices[0]}"
                raise
            name, weight = f"{first.loss}({first.student})", first.weight
            again = sum(before.partition("#")[0] == name for before in self.names)
            name = f"{name}#{again + 1}" if again else name
            self.names.append(name)
            if weight is None:
                default = FEATURE_LOSSES[first.loss].weight
                s, t = pairs[0].student_shape, pairs[0].teacher_shape
                weight = default(s, t, first.options) if callable(default) else default
            self.weights[name] = weight
        taps = [pair for loss in self.losses for pair in loss.pairs]  # type: ignore[union-attr]
        self.compares_tokens = any(pair.tokens for pair in taps)
        self.needs = Needs(logits=False, hidden=tuple(dict.fromkeys(pair.teacher for pair in taps)))
        self.student_needs = Needs(logits=False, hidden=tuple(dict.fromkeys(pair.student for pair in taps)))

    def _named_losses(self) -> list[tuple[str, FeatureLoss]]:
        return list(zip(self.names, self.losses, strict=True))  # type: ignore[arg-type]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """For each loss the examples (or tokens) that count."""
        return {name: loss.counted(batch).sum() for name, loss in self._named_losses()}

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """A term for each loss."""
        terms = {}
        for name, loss in self._named_losses():
            mine = [to_channels_first(student.hidden[pair.student], pair.channels_last[0]) for pair in loss.pairs]
            theirs = [to_channels_first(signal.hidden[pair.teacher], pair.channels_last[1]) for pair in loss.pairs]
            terms[name] = Term(loss(mine, theirs, batch), loss.counted(batch).sum())
        return terms

    def describe_pairs(self) -> list[str]:
        """Each pair with the loss that compares it."""
        named = self._named_losses()
        return [f"{name.partition('(')[0]}: {pair.describe()}" for name, loss in named for pair in loss.pairs]

    def phases(self) -> Sequence[Phase]:
        """Those of the losses, each under its own name."""
        phases: list[Phase] = []
        for _, loss in self._named_losses():
            for phase in loss.phases():
                again = sum(p.name.partition("#")[0] == phase.name for p in phases)
                phases.append(phase._replace(name=f"{phase.name}#{again + 1}") if again else phase)
        return phases

    def after_step(self) -> None:
        """That of the losses."""
        for _, loss in self._named_losses():
            loss.after_step()

    def formula(self) -> str:
        """The loss in one line; ``auto`` stands for pairs that are not found yet."""
        if self.names:
            return " + ".join(f"{self.weights[name]:g} * {name}" for name in self.names)
        weights = ["w" if pair.weight is None else f"{pair.weight:g}" for pair in self.settings]
        return " + ".join(
            f"{weight} * {pair.loss}({pair.student or 'auto'})"
            for weight, pair in zip(weights, self.settings, strict=True)
        )


class FeatureMethod(Method):
    r"""Pairs of hidden states, soft labels and hard labels: :class:`LogitMethod` plus a weighted sum of losses.

    Each pair is a term named for its loss and the student's module, as ``hint(stages.1)``; the pairs of ``overhaul``
    and of ``review`` are one term. If a loss compares element by element, a projector is trained that gives the
    student's feature the teacher's shape. A relation compares the examples of a micro-batch: its size matters.

    Raises:
        ConfigError: a loss on logits that is not for the task.
    """

    Options = FeatureOptions
    options: FeatureOptions

    def __init__(self, options: FeatureOptions | None = None, /, *, task: Task = "classes", **keywords: Any) -> None:
        if options is None and task in SOFT_OF_TASK:
            keywords.setdefault("soft", SOFT_OF_TASK[task])
        super().__init__(options, task=task, **keywords)
        self.logit = LogitMethod(self.options.logit_options(), task=task)
        self.hidden = PairsMethod(self.options)
        self.stage1_fraction, self.needs_ids = self.options.stage1_fraction, self.hidden.needs_ids
        self.needs, self.takes_sparse = self.logit.needs, self.logit.takes_sparse
        self.weights = dict(self.logit.weights)

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the pairs in both models, and build their losses.

        Raises:
            ModelError: unknown tap, or features that do not go together.
        """
        self.hidden.build(student, teacher, example, ids)
        self.compares_tokens = self.hidden.compares_tokens
        shares = {phase.name: phase.share for phase in self.phases()}
        if sum(shares.values()) >= 1:
            raise ConfigError(
                f"the phases before the method take {sum(shares.values()):.0%} of the steps "
                f"({', '.join(f'{name} {share:.0%}' for name, share in shares.items())}), and none are left",
                where="method", remedy="lower stage1_fraction, or the share of factor_transfer",
            )  # fmt: skip
        if self.stage1_fraction:
            self.hidden.requires_grad_(False)
            return
        assert self.hidden.needs is not None
        assert self.hidden.student_needs is not None
        self.weights = {**self.logit.weights, **self.hidden.weights}
        self.needs = Needs(hidden=self.hidden.needs.hidden, temperature=self.options.temperature)
        self.student_needs = Needs(hidden=self.hidden.student_needs.hidden)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Those of the labels, and for each pair the examples (or tokens) that count."""
        return self.logit.counts(batch) | ({} if self.stage1_fraction else self.hidden.counts(batch))

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """The soft term, ``ce`` and, unless they have their own stage, a term for each pair."""
        terms = self.logit(student, batch, signal)
        return {**terms, **({} if self.stage1_fraction else self.hidden(student, batch, signal))}

    def describe_pairs(self) -> list[str]:
        """Those of the hidden states."""
        return self.hidden.describe_pairs()

    def phases(self) -> Sequence[Phase]:
        """The phases of the losses, and stage 1."""
        before = list(self.hidden.phases())
        return [*before, Phase("hints", self.stage1_fraction, self.hidden)] if self.stage1_fraction else before

    def after_step(self) -> None:
        """That of the losses."""
        self.hidden.after_step()

    def formula(self) -> str:
        """The loss in one line."""
        if self.stage1_fraction:
            return f"{self.hidden.formula()} for {self.stage1_fraction:.0%} of the steps, then {self.logit.formula()}"
        return f"{self.logit.formula()} + {self.hidden.formula()}"


def _groups(settings: Sequence[ResolvedPair]) -> list[list[int]]:
    """Indices of the pairs that make one loss each: those of a joint loss together."""
    keys = [pair.loss if FEATURE_LOSSES[pair.loss].joint else i for i, pair in enumerate(settings)]
    return [list(indices) for _, indices in groupby(range(len(settings)), keys.__getitem__)]


class _Side:
    """The features of one model at its taps: 0 is the student, 1 the teacher."""

    def __init__(self, model: nn.Module, example: Batch, settings: Sequence[ResolvedPair], which: int) -> None:
        given = {(pair.student, pair.teacher)[which]: pair.channels[which] for pair in settings}
        self.shapes = feature_shapes(model, example, [*given])
        unknown = [tap for tap, channels in given.items() if channels is None]
        self.last = {tap: channels == "last" for tap, channels in given.items()}
        self.last |= find_channels_last(model, example, unknown)
        self.which = which

    def read(self, pair: ResolvedPair) -> tuple[Shape, bool]:
        """The shape of a feature, with the channels first, and whether they are last in the model."""
        tap = (pair.student, pair.teacher)[self.which]
        shape, last = self.shapes[tap], self.last[tap] and len(self.shapes[tap]) == 4
        return ((shape[0], shape[3], shape[1], shape[2]) if last else shape), last


FindMaps = Callable[[nn.Module, Batch], dict[tuple[int, int], str]]
Match = list[tuple[str, str]]
"""Taps of student and teacher."""


def _maps(find_in: FindMaps, student: nn.Module, teacher: nn.Module, example: Batch) -> tuple[list[Any], Match]:
    """The feature maps of both models; or, of two that give a feature for each patch, a pair of the last."""
    models = {"student": (student, example), "teacher": (teacher, example.for_teacher())}
    maps = {who: find_in(*of_model) for who, of_model in models.items()}
    if all(maps.values()):
        return [*maps.values()], []
    tokens = {who: None if maps[who] else find_token_stage(*models[who]) for who in models}
    for who in models:
        if not maps[who] and tokens[who] is None:
            losses = ", ".join(name for name, spec in FEATURE_LOSSES.items() if spec.pairs == "embedding")
            remedy = f"use a loss on the inputs of the output heads ({losses}), or kind: logit"
            raise ModelError(f"the {who} has no feature maps", where="method.loss", remedy=remedy)
    shapes = {who: feature_shapes(*models[who], [tap])[tap] for who, tap in tokens.items() if tap is not None}
    if len(shapes) == 2 and len({shape[1] for shape in shapes.values()}) == 1:
        return [], [(str(tokens["student"]), str(tokens["teacher"]))]
    kinds = [f"the {who} gives {f'{shapes[who][1]} tokens' if who in shapes else 'feature maps'}" for who in models]
    raise _no_pairs(f"no features of one kind: {', '.join(kinds)}")


def _by_resolution(find_in: FindMaps, what: str) -> Any:
    def match(student: nn.Module, teacher: nn.Module, example: Batch) -> Match:
        maps, pairs = _maps(find_in, student, teacher, example)
        if pairs:
            return pairs
        mine, theirs = maps
        common = [size for size in mine if size in theirs]
        if not common:
            sizes = [", ".join(f"{h}x{w}" for h, w in taps) for taps in (mine, theirs)]
            raise _no_pairs(f"no {what} of one resolution: the student has {sizes[0]}, the teacher {sizes[1]}")
        return [(mine[size], theirs[size]) for size in common]

    return match


def _last(student: nn.Module, teacher: nn.Module, example: Batch) -> Match:
    """The last feature map of both, whatever its resolution."""
    maps, pairs = _maps(_any_stages, student, teacher, example)
    return pairs or [(list(maps[0].values())[-1], list(maps[1].values())[-1])]


_any_stages: FindMaps = partial(find_stages, any_layout=True)


def _embeddings(student: nn.Module, teacher: nn.Module, example: Batch) -> list[tuple[str, str]]:
    """The inputs of the output heads."""
    return [(find_embedding_tap(student), find_embedding_tap(teacher))]


def _named(student: nn.Module, teacher: nn.Module, example: Batch) -> list[tuple[str, str]]:
    raise _no_pairs("this loss has no automatic pairs")


def _no_pairs(what: str) -> ModelError:
    return ModelError(what, where="method.pairs", remedy="name modules: pairs: [{student: TAP, teacher: TAP}]")


MATCHES: dict[str, Callable[[nn.Module, nn.Module, Batch], list[tuple[str, str]]]] = {
    "activations": _by_resolution(find_preactivations, "feature maps before an activation"),
    "embedding": _embeddings,
    "last": _last,
    "named": _named,
    "stages": _by_resolution(_any_stages, "feature maps"),
}
"""The pairs of ``auto``, by :attr:`tutelage.config.FeatureLossSpec.pairs`."""


def _tokens(example: Batch, student: Shape, teacher: Shape) -> bool:
    """Whether a pair has one feature for each position of a text, some of which may not count."""
    positions = token_positions(example)
    matches = positions.ndim == 2 and len(student) == 3 and tuple(positions.shape) == student[:2]
    if matches and student[:2] != teacher[:2]:
        raise ModelError(
            f"the student has {student[1]} positions, the teacher {teacher[1]}",
            remedy="pair modules that see the same tokens",
        )
    return matches
