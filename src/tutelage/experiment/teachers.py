"""What teaches in a comparison: one model or several, as they are built, trained, run and combined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from tutelage.config import InferenceConfig, TeacherInferenceConfig, TrainConfig
from tutelage.data import Batch, Batches
from tutelage.errors import CapabilityError, ConfigError, suggest
from tutelage.evaluation import evaluate_teacher
from tutelage.teachers import Ensemble, EnsembleTeacher, LiveTeacher, fit_ensemble_weights

Trained = tuple[TrainConfig, Batches, int]
"""How a teacher is trained first, on what, and under which seed."""

ModelTeacher = LiveTeacher | EnsembleTeacher
"""A teacher with a model in this process, which methods are fitted to."""


@dataclass(frozen=True)
class Member:
    """A teacher of several.

    Attributes:
        name: of its training and its folder.
        model: builds it; with weights, unless ``train``.
        train: how it is trained first; ``None`` where it has weights.
        card: how to build it again.
        inference: options of :class:`LiveTeacher` beside the mode.
        head_only: whether only what did not come with its weights is trained.
    """

    name: str
    model: Callable[[], nn.Module]
    train: Trained | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    inference: Mapping[str, Any] = field(default_factory=dict)
    head_only: bool = False


@dataclass(frozen=True)
class EnsemblePlan:
    """How teachers become one; :class:`EnsembleTeacher` has the meaning of each."""

    members: Sequence[Member]
    combine: Literal["probabilities", "logits"] = "probabilities"
    weights: Sequence[float] | Literal["learned"] | None = None
    temperature: float = 1.0
    route: Sequence[Sequence[int]] | None = None

    def untrained(self) -> Ensemble:
        """All models as one, before any training."""
        return Ensemble([member.model() for member in self.members], combine=self.combine)

    def teacher(
        self,
        models: Iterable[nn.Module],
        mode: Literal["eval", "train_bn"],
        device: torch.device,
        validation: Iterable[Batch] | None,
    ) -> EnsembleTeacher:
        """The ensemble of these models on ``device``; its weights, where they are to be learned, of ``validation``.

        Raises:
            ConfigError: weights are to be learned of nothing.
        """
        live = [
            LiveTeacher(model, mode=mode, **member.inference).to(device)
            for member, model in zip(self.members, models, strict=True)
        ]
        weights = None if self.weights is None or self.weights == "learned" else list(self.weights)
        if self.weights == "learned":
            if validation is None:
                raise ConfigError(
                    "the weights of the members are to be learned, and there is no validation data",
                    remedy="pass validation=, or weights by hand",
                )
            weights = fit_ensemble_weights(
                live, validation, combine=self.combine, temperature=self.temperature, device=device
            )
        return EnsembleTeacher(
            live, combine=self.combine, weights=weights, temperature=self.temperature, route=self.route
        )


def live_options(*sections: InferenceConfig | None) -> dict[str, Any]:
    """What the last section says, else the one before it, as arguments of :class:`LiveTeacher`."""
    given: dict[str, Any] = {}
    for section in sections:
        given |= section.model_dump(exclude_none=True, include=set(InferenceConfig.model_fields)) if section else {}
        if isinstance(section, TeacherInferenceConfig) and section.sharded:
            given["sharded"] = True
    return given


def prefetch_mode(inference: TeacherInferenceConfig | None) -> Literal["overlap", "process"] | None:
    """Whether teacher outputs are prefetched, in a thread or in a separate process."""
    if inference is None:
        return None
    return "process" if inference.process else "overlap" if inference.overlap else None


def as_it_runs(teacher: ModelTeacher) -> dict[str, Any]:
    """What else than its model decides what a teacher says, as JSON; empty for one model in its own numbers."""
    if isinstance(teacher, LiveTeacher):
        return {} if teacher.dtype is None else {"dtype": teacher.dtype}
    return {
        "combine": teacher.combine,
        "weights": teacher.weights,
        "average_temperature": teacher.temperature,
        "route": teacher.route,
        "members": [as_it_runs(member) for member in teacher.members if isinstance(member, LiveTeacher)],
    }


def described(
    plan: EnsemblePlan, teacher: EnsembleTeacher, splits: Mapping[str, Iterable[Batch]], device: torch.device
) -> dict[str, Any]:
    """What a summary says of an ensemble: how it is combined, and each member on the samples that it teaches."""
    members = []
    for m, member in enumerate(plan.members):
        scores = {
            split: evaluate_teacher(teacher.members[m], _taught(teacher, m, batches), device)
            for split, batches in splits.items()
        }
        members.append(
            {
                "name": member.name,
                "weight": teacher.weights[m],
                "parameters": sum(p.numel() for p in list(teacher.model)[m].parameters()),
                **{split: {k: s[k] for k in ("n", "accuracy", "loss", "ece")} for split, s in scores.items()},
            }
        )
    return {
        "combine": plan.combine,
        "average_temperature": plan.temperature,
        "weights": "learned" if plan.weights == "learned" else "given" if plan.weights is not None else "equal",
        "routed": plan.route is not None,
        "members": members,
    }


def _taught(teacher: EnsembleTeacher, member: int, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The samples that a member teaches."""
    if teacher.route is None:
        yield from batches
        return
    values = torch.tensor([v for v, those in enumerate(teacher.route) if member in those])
    for batch in batches:
        assert batch.route is not None
        rows = torch.isin(batch.route, values.to(batch.route.device)).nonzero().flatten()
        if len(rows):
            yield batch.take(rows)


def routes(asked: Mapping[str, int | list[int]], values: Sequence[str]) -> list[list[int]]:
    """For each value of the column, in order, the members that teach it.

    Raises:
        ConfigError: a value without members, or members of a value that the data does not have.
    """
    missing = [value for value in values if value not in asked]
    if missing:
        raise ConfigError(
            f"no member teaches the images of {', '.join(map(repr, missing[:5]))}",
            where="teacher.route",
            remedy=f"give members for every value of data.route: {', '.join(values[:20])}",
        )
    unknown = next((value for value in asked if value not in values), None)
    if unknown is not None:
        raise ConfigError(
            f"no image has the value {unknown!r}" + suggest(unknown, list(values)),
            where="teacher.route",
            remedy=f"values of data.route: {', '.join(values[:20])}",
        )
    found = [asked[value] for value in values]
    return [[those] if isinstance(those, int) else list(those) for those in found]


def check_agree(labels: Mapping[str, list[str] | None]) -> None:
    """Raise :class:`CapabilityError` where two members of an ensemble have different class names."""
    named = [(who, names) for who, names in labels.items() if names is not None]
    for who, names in named[1:]:
        first, known = named[0]
        if names == known:
            continue
        if len(names) != len(known):
            what = f"{first} knows {len(known)} classes, {who} {len(names)}"
        else:
            i = next(i for i, (a, b) in enumerate(zip(known, names, strict=True)) if a != b)
            what = f"class {i} is {known[i]!r} to {first} and {names[i]!r} to {who}"
        raise CapabilityError(
            what, where="label map", remedy="the members of an ensemble score the same classes in the same order"
        )
