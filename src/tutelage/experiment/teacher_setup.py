"""The teacher or ensemble of an experiment: trains it if it has no weights, evaluates it, provides its outputs."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn

from tutelage.config import InferenceConfig, TeacherInferenceConfig
from tutelage.data import Batch
from tutelage.engine import Training, broadcast_from_main
from tutelage.errors import ConfigError, suggest
from tutelage.evaluation import TeacherOutput, count_classes, evaluate_teacher, get_teacher_output
from tutelage.experiment.checks import check_better_than_chance
from tutelage.experiment.measure import Similarities
from tutelage.experiment.prepare import AsTeacher, all_methods, all_needs, example_of, needs_teacher, until_stopped
from tutelage.experiment.spec import FIGURES, EnsembleSpec, ExperimentSpec, ModelTeacher, RunContext, TeacherSpec
from tutelage.experiment.trainer import train_and_save
from tutelage.methods import Method, check_capabilities, needs_of
from tutelage.models import load_weights
from tutelage.progress import Terminal
from tutelage.students import feature_shapes, scale_outputs, to_float_model
from tutelage.taps import Needs
from tutelage.teachers import (
    Ensemble,
    EnsembleTeacher,
    LiveTeacher,
    MemoryTeacher,
    PrefetchingTeacher,
    RemoteTeacher,
    Teacher,
    fit_ensemble_weights,
)

MEMORY_BYTES = 2**29
"""Teacher outputs on the test split are kept in memory up to this size."""


class ReferenceOutputs:
    """The teacher outputs for every batch of a split, to compare students with; iterated once for each model.

    Outputs of up to :data:`MEMORY_BYTES` stay in memory; larger ones are computed again in each iteration. Those of a
    sharded teacher always stay in memory, because a single process cannot compute them.
    """

    def __init__(self, teacher: Teacher, batches: Iterable[Batch], ctx: RunContext) -> None:
        self.teacher, self.batches, self.device = teacher, batches, ctx.device
        self.stored: list[TeacherOutput] | None = []
        self.classes = size = 0
        for output in until_stopped(ctx.terminal.iterate(self._compute(), "teacher on test"), ctx):
            tensor = output if isinstance(output, Tensor) else output.inputs  # a head's weights are the teacher's own
            self.classes, size = count_classes(output), size + 4 * tensor.numel()
            if size > MEMORY_BYTES and not getattr(teacher, "sharded", False):
                self.stored = None
                break
            self.stored.append(output)

    def _compute(self) -> Iterator[TeacherOutput]:
        for batch in self.batches:
            output = get_teacher_output(self.teacher, batch.to(self.device))
            yield output.float().cpu() if isinstance(output, Tensor) else output._replace(inputs=output.inputs.cpu())

    def __iter__(self) -> Iterator[TeacherOutput]:
        return self._compute() if self.stored is None else iter(self.stored)


def train_teacher(spec: ExperimentSpec, ctx: RunContext, model: nn.Module) -> ModelTeacher:
    """The teacher as it runs, on this process's device; members without weights are trained first."""
    teacher = spec.teacher
    assert teacher is not None
    if teacher.ensemble is None:
        model = _train_member(spec, ctx, 0, model)
    else:
        model = Ensemble([_train_member(spec, ctx, i, one) for i, one in enumerate(model.children())])
    return build_live_teacher(spec, model, ctx.device)


def _train_member(spec: ExperimentSpec, ctx: RunContext, number: int, model: nn.Module) -> nn.Module:
    """``model``, that of the teacher's member ``number``, with weights."""
    assert spec.teacher is not None
    member = spec.teacher.members[number]
    if member.training is None:
        return model
    if ctx.run.result(member.name) is None:
        training = member_training(spec, ctx, number, model)

        def rebuild() -> tuple[nn.Module, Method]:
            return build_member(spec, number), spec.source.build_baseline_method()

        train_and_save(training, ctx, rebuild, AsTeacher(spec.evaluation.test, number), None, dict(member.card), {})
        model = spec.source.build_teacher(number)
    load_weights(to_float_model(model), ctx.run.model(member.name))
    return model


def build_member(spec: ExperimentSpec, number: int) -> nn.Module:
    """The untrained model of a teacher's member, as it is trained."""
    return scale_outputs(spec.source.build_teacher(number), spec.source.target_scale)


def member_training(spec: ExperimentSpec, ctx: RunContext, number: int, model: nn.Module) -> Training:
    """The training of a teacher's member; with ``head_only`` the pretrained parameters of ``model`` are frozen."""
    assert spec.teacher is not None
    member, validation = spec.teacher.members[number], spec.evaluation.validation
    assert member.training is not None
    if member.head_only:
        _freeze_pretrained(model)
    model = scale_outputs(model, spec.source.target_scale)
    return Training(
        member.name, model, spec.source.build_baseline_method(), member.training.batches, member.training.config,
        ctx.run, validation=None if validation is None else AsTeacher(validation, number), seed=member.training.seed,
        metric=spec.evaluation.metric, should_stop=ctx.should_stop, callback=ctx.terminal,
    )  # fmt: skip


def _freeze_pretrained(model: nn.Module) -> None:
    fresh = set(getattr(model, "fresh", ()))
    if not any(name in fresh for name, _ in model.named_parameters()):
        raise ConfigError(
            "all parameters of the teacher are in its checkpoint; there is no new head to train",
            where="teacher.trainable",
            remedy="leave teacher.train out to use it as it is, or set teacher.trainable: all",
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in fresh)


def evaluate_reference(
    spec: ExperimentSpec, ctx: RunContext, teacher: ModelTeacher
) -> tuple[ReferenceOutputs | None, dict[str, Any]]:
    """The teacher outputs on the test split, and the teacher's figures.

    The outputs are ``None`` if the teacher has another tokenizer than the student: their logits cannot be compared.
    """
    evaluation = spec.evaluation
    test = evaluation.test
    validation = test if evaluation.validation is None else evaluation.validation
    if example_of(spec).teacher_labels is not None:
        on_validation = evaluate_teacher(teacher, AsTeacher(validation), ctx.device)
        return None, evaluate_teacher(teacher, AsTeacher(test), ctx.device) | {"validation": on_validation}
    outputs = ReferenceOutputs(teacher, test, ctx)
    on_validation = evaluate_teacher(teacher, validation, ctx.device)
    if "ece" in on_validation:
        check_better_than_chance(on_validation, outputs.classes, ctx)
    similarities = Similarities()
    scores = evaluate_teacher(teacher, test, ctx.device, outputs, watch=similarities.add)
    similarities.write(ctx.run, "teacher")
    scores["validation"] = on_validation
    if isinstance(teacher, EnsembleTeacher):
        assert spec.teacher is not None
        splits = {"test": test} | ({} if evaluation.validation is None else {"validation": evaluation.validation})
        scores["ensemble"] = describe_ensemble(spec.teacher, teacher, splits, ctx.device)
        ensemble = scores["ensemble"]
        what = "learned weight" if ensemble["weights"] == "learned" else "weight"
        images = " of its images" if ensemble["routed"] else ""
        for member in ensemble["members"]:
            figure = f"test {evaluation.metric} {member['test'][evaluation.metric]:.4g}"
            ctx.terminal.say(f"{member['name']}: {figure}{images}, {what} {member['weight']:.3f}")
        figure = f"test {evaluation.metric} {scores[evaluation.metric]:.4g}"
        ctx.terminal.say(f"ensemble, mean of {ensemble['combine']}: {figure}")
    return outputs, scores


@contextmanager
def open_remote_teacher(
    spec: ExperimentSpec, terminal: Terminal, method: Method, classes: int
) -> Iterator[RemoteTeacher | None]:
    """The teacher behind a server, if there is one and the method uses it."""
    if spec.teacher is None or not spec.teacher.is_remote or not needs_teacher(method):
        yield None
        return
    with spec.source.connect_teacher(classes) as teacher:
        check_capabilities(method, teacher)
        terminal.say(f"teacher: {teacher.model} at {teacher.url}, {teacher.k} tokens each")
        yield teacher


@contextmanager
def open_training_teacher(
    spec: ExperimentSpec, ctx: RunContext, teacher: ModelTeacher | RemoteTeacher | None, method: Method, classes: int
) -> Iterator[Teacher | None]:
    """What gives the teacher outputs in training: the cache, a copy in memory if it fits, or the teacher itself."""
    cache = None if spec.teacher is None else spec.teacher.cache
    if teacher is None or not needs_teacher(method):
        if cache is not None:
            ctx.terminal.say("cache: not opened, because the method uses no teacher outputs")
        yield teacher
        return
    if cache is None:
        assert spec.teacher is not None
        if not isinstance(teacher, RemoteTeacher) and fits_memory(spec, ctx, teacher, method, classes):
            yield store_in_memory(spec, ctx, teacher, all_needs(method))
        elif spec.teacher.prefetch is None:
            yield teacher
        else:
            with closing(PrefetchingTeacher(teacher, process=spec.teacher.prefetch == "process")) as prefetching:
                yield prefetching
        return
    with spec.source.open_cache(teacher, classes, method, ctx) as cached:
        for each in all_methods(method):
            check_capabilities(each, cached)
            needs = needs_of(each, cached)
            if needs is not None:
                cached.check(needs)
        ctx.terminal.say(f"cache: {cached.folder}, {len(cached.reader):,} rows known")
        yield cached


def fits_memory(spec: ExperimentSpec, ctx: RunContext, teacher: ModelTeacher, method: Method, classes: int) -> bool:
    """Whether the teacher outputs never change and fit in memory; a resumed run keeps the decision."""
    needs = all_needs(method)
    if spec.unaugmented is None or method.needs is None or needs.head:
        return False
    if (spec.teacher is not None and spec.teacher.mode != "eval") or getattr(teacher, "sharded", False):
        return False
    example = example_of(spec)
    if example.labels.ndim > 1 or (needs.hidden and isinstance(example.inputs, dict)):
        return False  # there is a row for every token, which is too much
    shapes = feature_shapes(teacher.model, example.rows(0, 1).for_teacher(), needs.hidden)
    row = classes * needs.logits + sum(math.prod(shape) for shape in shapes.values())
    budget = int(psutil.virtual_memory().available) // 4 // ctx.accelerator.num_processes
    fits = spec.training_rows * row * 4 <= budget
    return broadcast_from_main(ctx.accelerator, lambda: ctx.run.keep_decision("remembered", fits))


def store_in_memory(spec: ExperimentSpec, ctx: RunContext, teacher: ModelTeacher, needs: Needs) -> MemoryTeacher:
    """The teacher outputs on the training data, computed once."""
    assert spec.unaugmented is not None

    def watch(batches: Iterable[Batch]) -> Iterator[Batch]:
        return until_stopped(ctx.terminal.iterate(batches, "teacher on training data"), ctx)

    with ctx.accelerator.autocast():
        return MemoryTeacher(teacher, spec.unaugmented, ctx.device, watch, needs=needs)


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
                **{split: {k: s[k] for k in ("n", *FIGURES) if k in s} for split, s in scores.items()},
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
    if teacher.route is None:
        for batch in batches:
            yield batch.for_member(member)
        return
    values = torch.tensor([v for v, members in enumerate(teacher.route) if member in members])
    for batch in batches:
        assert batch.route is not None
        rows = torch.isin(batch.route, values.to(batch.route.device)).nonzero().flatten()
        if len(rows):
            yield batch.take(rows).for_member(member)


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
