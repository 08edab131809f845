"""Teachers of several models: how they are combined and described; and the options of live teachers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tutelage.config import InferenceConfig, TeacherInferenceConfig
from tutelage.data import Batch
from tutelage.errors import ConfigError, suggest
from tutelage.evaluation import evaluate_teacher
from tutelage.experiment.spec import EnsembleSpec, ExperimentSpec, ModelTeacher, TeacherSpec
from tutelage.teachers import EnsembleTeacher, LiveTeacher, fit_ensemble_weights


def build_live_teacher(
    spec: ExperimentSpec, model: nn.Module, device: torch.device, *, fit_weights: bool = True
) -> ModelTeacher:
    """The teacher as it runs, frozen, on ``device``.

    Args:
        fit_weights: fit an ensemble's ``learned`` weights on the validation split; else the members weigh the same.
    """
    teacher = spec.teacher
    assert teacher is not None
    ensemble = teacher.ensemble
    models = [model] if ensemble is None else model.children()
    live = [
        LiveTeacher(one, mode=teacher.mode, **member.inference).to(device)
        for member, one in zip(teacher.members, models, strict=True)
    ]
    if ensemble is None:
        return live[0]
    weights = None if ensemble.weights is None or ensemble.weights == "learned" else list(ensemble.weights)
    if ensemble.weights == "learned" and fit_weights:
        if spec.evaluation.validation is None:
            raise ConfigError(
                "the members' weights are to be learned, and there is no validation data",
                remedy="pass validation=, or give the weights",
            )
        weights = fit_ensemble_weights(
            live,
            spec.evaluation.validation,
            combine=ensemble.combine,
            temperature=ensemble.temperature,
            device=device,
        )
    return EnsembleTeacher(
        live, combine=ensemble.combine, weights=weights, temperature=ensemble.temperature, route=ensemble.route
    )


def live_options(*sections: InferenceConfig | None) -> dict[str, Any]:
    """Arguments of :class:`LiveTeacher`; a key of a later section replaces that of an earlier one."""
    options: dict[str, Any] = {}
    for section in sections:
        options |= section.model_dump(exclude_none=True, include=set(InferenceConfig.model_fields)) if section else {}
        if isinstance(section, TeacherInferenceConfig) and section.sharded:
            options["sharded"] = True
    return options


def prefetch_mode(inference: TeacherInferenceConfig | None) -> Literal["overlap", "process"] | None:
    """Whether teacher outputs are prefetched, in a thread or in a separate process."""
    if inference is None:
        return None
    return "process" if inference.process else "overlap" if inference.overlap else None


def inference_facts(teacher: ModelTeacher) -> dict[str, Any]:
    """What decides the teacher outputs apart from the model, as JSON; empty for a single float32 model."""
    if isinstance(teacher, LiveTeacher):
        return {} if teacher.dtype is None else {"dtype": teacher.dtype}
    return {
        "combine": teacher.combine,
        "weights": teacher.weights,
        "average_temperature": teacher.temperature,
        "route": teacher.route,
        "members": [inference_facts(member) for member in teacher.members if isinstance(member, LiveTeacher)],
    }


def describe_ensemble(
    spec: TeacherSpec, teacher: EnsembleTeacher, splits: Mapping[str, Iterable[Batch]], device: torch.device
) -> dict[str, Any]:
    """The ensemble's entry in a summary: its options, and each member's figures on the samples routed to it."""
    ensemble = spec.ensemble or EnsembleSpec()
    members = []
    for m, member in enumerate(spec.members):
        scores = {
            split: evaluate_teacher(teacher.members[m], _routed_to(teacher, m, batches), device)
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
        "combine": ensemble.combine,
        "average_temperature": ensemble.temperature,
        "weights": "learned"
        if ensemble.weights == "learned"
        else "given"
        if ensemble.weights is not None
        else "equal",
        "routed": ensemble.route is not None,
        "members": members,
    }


def _routed_to(teacher: EnsembleTeacher, member: int, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The samples that are routed to a member."""
    if teacher.route is None:
        yield from batches
        return
    values = torch.tensor([v for v, members in enumerate(teacher.route) if member in members])
    for batch in batches:
        assert batch.route is not None
        rows = torch.isin(batch.route, values.to(batch.route.device)).nonzero().flatten()
        if len(rows):
            yield batch.take(rows)


def resolve_routes(route: Mapping[str, int | list[int]], values: Sequence[str]) -> list[list[int]]:
    """The members for each value of the ``data.route`` column, in the order of ``values``."""
    missing = [value for value in values if value not in route]
    if missing:
        raise ConfigError(
            f"no member teaches the images of {', '.join(map(repr, missing[:5]))}",
            where="teacher.route",
            remedy=f"give members for every value of data.route: {', '.join(values[:20])}",
        )
    unknown = next((value for value in route if value not in values), None)
    if unknown is not None:
        raise ConfigError(
            f"no image has the value {unknown!r}" + suggest(unknown, list(values)),
            where="teacher.route",
            remedy=f"values of data.route: {', '.join(values[:20])}",
        )
    members = [route[value] for value in values]
    return [[those] if isinstance(those, int) else list(those) for those in members]


def checkpoint_path(stage: Path, training: str) -> str:
    """The folder of a finished training's model, for a recipe's ``checkpoint``."""
    return str(stage / "models" / training)


def with_trained_weights(teacher: Mapping[str, Any], stage: Path) -> dict[str, Any]:
    """The section ``teacher`` with checkpoints in place of the training that ``stage`` has done."""

    def trained(one: Mapping[str, Any], name: str) -> dict[str, Any]:
        if one.get("train") is None:
            return dict(one)
        rest = {k: v for k, v in one.items() if k not in ("train", "trained", "trainable")}
        return {**rest, "checkpoint": checkpoint_path(stage, name)}

    if teacher.get("members") is None:
        return trained(teacher, "teacher")
    members = [trained(member, f"teacher-{i}") for i, member in enumerate(teacher["members"])]
    return {**teacher, "members": members}
