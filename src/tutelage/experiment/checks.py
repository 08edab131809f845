"""What is checked of a comparison before anything is trained."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from tutelage.engine import Accelerator, slow_bf16
from tutelage.engine.optim import build_optimizer, build_schedule
from tutelage.errors import CapabilityError, ConfigError, DataError, NumericsError, TutelageError
from tutelage.experiment.spec import ExperimentSpec, RunContext, example_of
from tutelage.experiment.teachers import Member, check_agree
from tutelage.experiment.trainer import get_signal
from tutelage.methods import DistillationModule, Method, check_task
from tutelage.models import label_names
from tutelage.progress import Terminal
from tutelage.taps import Needs, Observation, observe
from tutelage.teachers import Ensemble, LiveTeacher, Teacher


def check_teachers(c: ExperimentSpec, device: torch.device, teacher: nn.Module) -> None:
    """:func:`check_output` of the teacher, or of each member by its name, and whether it can run as it is to run."""
    assert c.teacher is not None
    single = Member("teacher", c.teacher, c.train_teacher, inference=c.inference)
    members = [single] if c.ensemble is None else c.ensemble.members
    models = list(teacher.children()) if isinstance(teacher, Ensemble) else [teacher]
    if c.inference.get("sharded"):  # whole in main memory alone
        device = torch.device("cpu")
    for member, model in zip(members, models, strict=True):
        check_output(c, device, model, member.name)
        if any(m.train is not None for m in members):  # before hours of training; a copy, for it is frozen
            LiveTeacher(copy.deepcopy(model), mode=c.teacher_mode, **member.inference)


def check_output(c: ExperimentSpec, device: torch.device, model: nn.Module, who: str) -> int:
    """Run ``model`` on two samples, so that a misfit with the data shows before anything is trained.

    Returns:
        How many classes it scores.

    Raises:
        DataError: there is nothing to evaluate on.
        CapabilityError: the model cannot take the inputs, or scores another number of classes.
        NumericsError: its logits are not finite.
    """
    whole = next(iter(c.test), None)
    if whole is None:
        raise DataError("the evaluation data yields no batches", remedy="check its data set and drop_last")
    if who.startswith("teacher"):
        whole = whole.for_teacher()
    batch = whole.rows(0, 2).to(device)
    inputs = batch.inputs if isinstance(batch.inputs, dict) else {"inputs": batch.inputs}
    model.to(device).eval()
    try:
        with torch.no_grad():
            logits = observe(model, batch.inputs, Needs()).logits
    except (TutelageError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
        raise CapabilityError(
            f"the {who}, a {type(model).__name__}, does not take the data, {shapes}: {error}",
            remedy="fit the model to the data or the data to the model: size, channels, names of the inputs",
        ) from error
    assert logits is not None
    classes = logits.shape[-1]
    if batch.labels.shape != logits.shape[:-1] or (batch.targets is not None and batch.targets.shape != logits.shape):
        raise CapabilityError(
            f"the {who}'s logits are {tuple(logits.shape)} where the labels are {tuple(batch.labels.shape)}",
            remedy="labels are class indices, one for each row of logits (or each token)",
        )
    if c.classes and classes != len(c.classes):
        raise CapabilityError(
            f"the {who} scores {classes} classes, the data has {len(c.classes)}", remedy="set its number of classes"
        )
    if batch.task == "classes" and whole.labels.numel() and int(whole.labels.max()) >= classes:
        raise CapabilityError(
            f"the data has a label {int(whole.labels.max())}, the {who} scores classes 0 to {classes - 1}",
            remedy="set its number of classes",
        )
    if not bool(torch.isfinite(logits).all()):
        raise NumericsError(f"the {who}'s logits are NaN or infinite", remedy="check its weights and its inputs")
    return int(classes)


def check_written(c: ExperimentSpec, method: Method) -> None:
    """Raise :class:`CapabilityError` where the student writes what the teacher is to have been asked before."""
    for given, where in ((c.cache, "teacher.cache"), (c.prefetch, "teacher.inference.overlap")):
        if method.generates_batches and given is not None:
            raise CapabilityError(
                f"{type(method).__name__} asks the teacher about what the student has just written, "
                "which nobody knows ahead",
                where=where,
                remedy="leave it out, or learn from the data alone, with kind: token",
            )


def check_optimizer(c: ExperimentSpec, student: nn.Module, method: Method) -> None:
    """Raise :class:`ConfigError` when the optimizer or the schedule refuses an option."""
    optimizer = build_optimizer(DistillationModule(student, method), c.config.optimizer)
    schedule = build_schedule(optimizer, c.config.schedule, 1, 1)
    try:
        optimizer.step()  # nothing has a gradient, so nothing moves
        schedule.step()
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"train.schedule: {c.config.schedule.kind} with {c.config.schedule.options}: {error}",
            remedy="see docs/recipes.md for the values it takes",
        ) from None


def check_separate(teacher: nn.Module, student: nn.Module) -> None:
    """Raise :class:`CapabilityError` when teacher and student share a weight."""
    theirs = {id(p) for p in teacher.parameters()}
    shared = [n for n, p in student.named_parameters() if id(p) in theirs]
    if shared:
        raise CapabilityError(
            f"teacher and student share {len(shared)} parameters, {shared[0]} among them; "
            "training the student would change the teacher",
            remedy="give the student its own: copy.deepcopy(model)",
        )


def check_labels(c: ExperimentSpec, teacher: nn.Module | None, student: nn.Module) -> None:
    """Raise :class:`CapabilityError` when class names differ between data, teacher or its members, and student."""
    carried = {}
    if teacher is not None:
        carried["teacher"] = c.teacher_card.get("loaded_classes") or label_names(teacher)
    if c.ensemble is not None and isinstance(teacher, Ensemble):
        carried = {
            member.name: member.card.get("loaded_classes") or label_names(model)
            for member, model in zip(c.ensemble.members, teacher, strict=True)
        }
        check_agree(carried)
    if not c.classes:
        return
    carried["student"] = label_names(student)
    for who, names in carried.items():
        if names is None or names == c.classes:
            continue
        if len(names) != len(c.classes):
            what = f"the {who} knows {len(names)} classes, the data {len(c.classes)}"
        else:
            i = next(i for i, (a, b) in enumerate(zip(names, c.classes, strict=True)) if a != b)
            what = f"class {i} is {names[i]!r} to the {who} and {c.classes[i]!r} in the data"
        same = sorted(names) == sorted(c.classes)
        raise CapabilityError(
            what,
            where="label map",
            remedy="the classes are the same in another order: set data.classes to the teacher's order"
            if same
            else f"use a {who} for these classes",
        )


def check_taught(scores: dict[str, Any], classes: int, ctx: RunContext) -> None:
    """Raise :class:`CapabilityError` when the teacher does worse than chance; warn when hardly better."""
    n, accuracy, chance = scores["n"], scores["accuracy"], 1.0 / classes
    if n == 0:
        return
    noise = 3 * math.sqrt(chance * (1 - chance) / n)
    shown = f"the teacher's accuracy on the evaluation data is {accuracy:.1%}, chance is {chance:.1%}"
    if accuracy < chance and n * chance >= 3:  # below, chance itself would often get none right
        raise CapabilityError(
            shown,
            remedy="a student can only learn its mistakes: check the checkpoint, the label order and the "
            "preprocessing (data.mean, data.std, data.size)",
        )
    if accuracy < chance + noise:
        ctx.terminal.say(f"warning: {shown} ({n} samples); it has hardly anything to teach")


def warn_of_precision(accelerator: Accelerator, terminal: Terminal) -> None:
    """Say where bf16 makes a run slower, and not faster."""
    if slow_bf16(accelerator):
        terminal.say(
            "warning: this CPU has no instructions for bf16, in which a step can take ten times as long; set "
            "train.precision to auto or no"
        )


def check_method_runs(
    c: ExperimentSpec, ctx: RunContext, student: nn.Module, method: Method, teacher: Teacher | None
) -> None:
    """One forward pass of everything on two samples, in evaluation mode, so that misfits show before step 0."""
    batch = example_of(c).to(ctx.device)
    student.to(ctx.device).eval()
    for each in (method, *(phase.method for phase in method.phases())):
        each.to(ctx.device).eval()
        check_task(each, batch)
        with torch.no_grad():
            signal = get_signal(teacher, each, batch)
            seen = Observation() if each.student_needs is None else observe(student, batch.inputs, each.student_needs)
            each(seen, batch, signal)
            each.check_generation(student, batch)
