"""The teacher of a comparison: trained where it has no weights, examined, and asked in training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import nn

from tutelage.data import Batch
from tutelage.engine import Training, from_main
from tutelage.errors import ConfigError
from tutelage.evaluation import evaluate_teacher
from tutelage.experiment.checks import check_taught
from tutelage.experiment.similarity import Similarities
from tutelage.experiment.spec import ExperimentSpec, RunContext, TeacherReferences, example_of, until_stopped
from tutelage.experiment.teachers import Member, ModelTeacher, described
from tutelage.experiment.trainer import train_and_keep
from tutelage.methods import Method, check_capabilities, needs_of
from tutelage.models import load_weights
from tutelage.progress import Terminal
from tutelage.students import feature_shapes
from tutelage.taps import Needs
from tutelage.teachers import (
    Ensemble,
    EnsembleTeacher,
    LiveTeacher,
    MemoryTeacher,
    PrefetchingTeacher,
    RemoteTeacher,
    Teacher,
)


def live_teacher(c: ExperimentSpec, ctx: RunContext, model: nn.Module) -> ModelTeacher:
    """The teacher, trained first where it has no weights, frozen, on this process's device."""
    if c.ensemble is None:
        assert c.teacher is not None
        model = trained(
            c, ctx, Member("teacher", c.teacher, c.train_teacher, c.teacher_card, head_only=c.head_only), model
        )
    else:
        each = zip(c.ensemble.members, model.children(), strict=True)
        model = Ensemble([trained(c, ctx, member, one) for member, one in each])
    return as_taught(c, model, ctx.device)


def as_taught(c: ExperimentSpec, model: nn.Module, device: torch.device, *, learned: bool = True) -> ModelTeacher:
    """The teacher with its weights, as it runs; unless ``learned``, members' weights that are to be are equal."""
    if c.ensemble is None:
        return LiveTeacher(model, mode=c.teacher_mode, **c.inference).to(device)
    plan = c.ensemble
    if plan.weights == "learned" and not learned:
        plan = replace(plan, weights=None)
    return plan.teacher(model.children(), c.teacher_mode, device, c.validation)


def trained(c: ExperimentSpec, ctx: RunContext, member: Member, model: nn.Module) -> nn.Module:
    """``model``, which ``member`` built, once it has weights."""
    if member.train is None:
        return model
    config, batches, seed = member.train
    if ctx.run.result(member.name) is None:
        training = Training(
            member.name, model, c.supervised(), batches, config, ctx.run,
            validation=None if c.validation is None else AsTaught(c.validation), seed=seed, metric=c.metric,
            should_stop=ctx.should_stop, watcher=ctx.terminal,
        )  # fmt: skip
        if member.head_only:
            keep_body(model)
        train_and_keep(training, ctx, member.model, AsTaught(c.test), None, dict(member.card))
        model = member.model()
    load_weights(model, ctx.run.model(member.name))
    return model


def examined(
    c: ExperimentSpec, ctx: RunContext, teacher: ModelTeacher
) -> tuple[TeacherReferences | None, dict[str, Any]]:
    """What the teacher says of the test split, where it reads what the student does, and how good it is.

    Raises:
        CapabilityError: it does worse than chance.
    """
    if example_of(c).teacher_labels is not None:  # other tokens than the student's: each is measured on its own
        splits = {"validation": c.validation if c.validation is not None else c.test, "test": c.test}
        alone = {name: evaluate_teacher(teacher, AsTaught(split), ctx.device) for name, split in splits.items()}
        return None, alone["test"] | {"validation": alone["validation"]}
    references = TeacherReferences(teacher, c.test, ctx)
    on_validation = evaluate_teacher(teacher, c.validation if c.validation is not None else c.test, ctx.device)
    if "ece" in on_validation:
        check_taught(on_validation, references.classes, ctx)
    alike = Similarities()
    teacher_scores = evaluate_teacher(teacher, c.test, ctx.device, references, watch=alike.add)
    alike.keep(ctx.run, "teacher")
    teacher_scores["validation"] = on_validation
    if c.ensemble is not None and isinstance(teacher, EnsembleTeacher):
        splits = {"test": c.test} | ({} if c.validation is None else {"validation": c.validation})
        teacher_scores["ensemble"] = described(c.ensemble, teacher, splits, ctx.device)
        say_ensemble(teacher_scores, ctx)
    return references, teacher_scores


@dataclass(frozen=True)
class AsTaught:
    """Batches with what the teacher sees in the place of what the student sees."""

    batches: Iterable[Batch]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield batch.for_teacher()


def keep_body(model: nn.Module) -> None:
    """Freeze what came with a model's weights; only what is new learns.

    Raises:
        ConfigError: nothing is new.
    """
    fresh = set(getattr(model, "fresh", ()))
    new = [name for name, _ in model.named_parameters() if name in fresh]
    if not new:
        raise ConfigError(
            "all of the teacher came with its weights, and no new head is there to be trained",
            where="teacher.trainable",
            remedy="leave teacher.train out to use it as it is, or set teacher.trainable: all",
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in fresh)


def say_ensemble(scores: Mapping[str, Any], ctx: RunContext) -> None:
    """Each member's accuracy, weight and the ensemble's accuracy."""
    found = scores["ensemble"]
    what = {"learned": "learned weight", "given": "weight", "equal": "weight"}[found["weights"]]
    for member in found["members"]:
        own = " of its images" if found["routed"] else ""
        ctx.terminal.say(
            f"{member['name']}: test {member['test']['accuracy']:.2%}{own}, {what} {member['weight']:.3f}"
        )
    ctx.terminal.say(f"ensemble, mean of {found['combine']}: test {scores['accuracy']:.2%}")


@contextmanager
def open_remote_teacher(
    c: ExperimentSpec, terminal: Terminal, method: Method, classes: int
) -> Iterator[RemoteTeacher | None]:
    """The teacher behind a server, where there is one and it is asked for anything."""
    if c.remote_teacher is None or not is_taught(method):
        yield None
        return
    with c.remote_teacher(classes) as teacher:
        check_capabilities(method, teacher)
        terminal.say(f"teacher: {teacher.model} at {teacher.url}, {teacher.k} tokens each")
        yield teacher


@contextmanager
def taught_by(
    c: ExperimentSpec, ctx: RunContext, teacher: ModelTeacher | RemoteTeacher | None, method: Method, classes: int
) -> Iterator[Teacher | None]:
    """Who is asked in training: the cache where there is one, the teacher's memory where it fits, or itself."""
    if teacher is None or not is_taught(method):
        if c.cache is not None:
            ctx.terminal.say("cache: not opened, for the method asks the teacher for nothing")
        yield teacher
        return
    if c.cache is None:
        known = remembered(c, ctx, teacher, method, classes)
        if c.prefetch is None or known is not teacher:
            yield known
            return
        with closing(PrefetchingTeacher(teacher, process=c.prefetch == "process")) as prefetching:
            yield prefetching
        return
    with c.cache(teacher, classes, method, ctx.accelerator) as cached:
        for each in (method, *(phase.method for phase in method.phases())):
            check_capabilities(each, cached)
            asked = needs_of(each, cached)
            if asked is not None:
                cached.check(asked)
        ctx.terminal.say(f"cache: {cached.folder}, {len(cached.reader):,} rows known")
        yield cached


def is_taught(method: Method) -> bool:
    """Whether a method, or a phase of it, asks the teacher for anything."""
    return any(m.needs is not None for m in (method, *(phase.method for phase in method.phases())))


def all_needs(method: Method) -> Needs:
    """What a method and its phases need of the teacher, together."""
    wanted = [m.needs for m in (method, *(phase.method for phase in method.phases())) if m.needs is not None]
    return Needs(
        logits=any(n.logits for n in wanted),
        hidden=tuple(dict.fromkeys(tap for n in wanted for tap in n.hidden)),
        head=any(n.head for n in wanted),
        temperature=next((n.temperature for n in wanted if n.temperature is not None), None),
    )


def remembered(
    c: ExperimentSpec, ctx: RunContext, teacher: ModelTeacher | RemoteTeacher, method: Method, classes: int
) -> Teacher:
    """The teacher's word from memory, where it never changes and fits; else the teacher itself."""
    if isinstance(teacher, RemoteTeacher) or not rememberable(c, ctx, teacher, method, classes):
        return teacher
    return in_memory(c, ctx, teacher, all_needs(method))


def rememberable(c: ExperimentSpec, ctx: RunContext, teacher: ModelTeacher, method: Method, classes: int) -> bool:
    """Whether the teacher's word never changes and fits the memory; the run directory keeps the answer."""
    needs = all_needs(method)
    if c.remember is None or method.needs is None or needs.head or c.teacher_mode != "eval":
        return False
    if isinstance(teacher, LiveTeacher) and teacher.sharded:
        return False
    example = example_of(c)
    if example.labels.ndim > 1 or (needs.hidden and isinstance(example.inputs, dict)):
        return False  # as many rows as a text has tokens
    shapes = feature_shapes(teacher.model, example.rows(0, 1).for_teacher(), needs.hidden)
    row = classes * needs.logits + sum(math.prod(shape) for shape in shapes.values())
    fits = c.remember_rows * row * 4 <= memory_budget(ctx.accelerator.num_processes)
    return from_main(ctx.accelerator, lambda: ctx.run.decided("remembered", fits))


def in_memory(c: ExperimentSpec, ctx: RunContext, teacher: ModelTeacher, needs: Needs) -> MemoryTeacher:
    """The teacher's word on the training data, asked once."""
    assert c.remember is not None

    def shown(batches: Iterable[Batch]) -> Iterator[Batch]:
        return until_stopped(ctx.terminal.iterate(batches, "teacher on training data"), ctx)

    with ctx.accelerator.autocast():
        return MemoryTeacher(teacher, c.remember, ctx.device, shown, needs=needs)


def memory_budget(processes: int) -> int:
    """Bytes that a process may remember: its share of a quarter of what is free now."""
    return int(psutil.virtual_memory().available) // 4 // processes
