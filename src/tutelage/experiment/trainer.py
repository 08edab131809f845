"""Training a student of a comparison, or finding it trained, and measuring it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.data import Batch
from tutelage.engine import Outcome, Training, fit, from_main
from tutelage.evaluation import evaluate
from tutelage.experiment.measure import reached
from tutelage.experiment.similarity import Similarities
from tutelage.experiment.spec import (
    FIGURES,
    Arm,
    ExperimentSpec,
    RunContext,
    TeacherReferences,
    example_of,
    initial_student,
    model_of,
    taught_on,
)
from tutelage.experiment.teachers import ModelTeacher
from tutelage.files import atomic_folder
from tutelage.methods import DistillationModule, Method, needs_of, prepare_student
from tutelage.models import save_model
from tutelage.students import ReusedHead, to_float_model
from tutelage.teachers import Signal, Teacher


def train_student(
    c: ExperimentSpec,
    ctx: RunContext,
    arm: Arm,
    seed: int,
    teacher: Teacher | None,
    live: ModelTeacher | None,
    references: TeacherReferences | None,
    classes: int,
) -> dict[str, Any]:
    """Train one student, or find it trained, and return its result."""
    name = f"{arm}-seed{seed}"
    found = ctx.run.result(name)
    if found is not None:
        return found
    training = training_of(c, ctx, arm, seed, teacher, live, classes)
    card = {**c.student_card, "arm": arm}
    if isinstance(training.student, ReusedHead):
        card["reused_head"] = training.student.card

    def rebuilt() -> nn.Module:
        model = c.student(seed)
        return model if arm == "baseline" else prepare_student(c.method(), model, model_of(live), example_of(c), seed)

    others = training.method.auxiliary_models(training.student)
    cards = [{**card, **c.peer_card(asked), "arm": arm} for asked in training.method.peers]
    kept = dict(zip(others, cards, strict=True)) if cards else {}
    return train_and_keep(
        training, ctx, rebuilt, c.test, references, card, Others(lambda: initial_student(c, arm, seed, live)[1], kept)
    )


def training_of(
    c: ExperimentSpec,
    ctx: RunContext,
    arm: Arm,
    seed: int,
    teacher: Teacher | None,
    live: ModelTeacher | None,
    classes: int,
) -> Training:
    """The training of a student; the phases that its method needs before it are done."""
    fresh = partial(initial_student, c, arm, seed, live)
    student, method = fresh()
    training = Training(
        name=f"{arm}-seed{seed}",
        student=student,
        method=method,
        batches=taught_on(c, method, seed),
        config=c.config,
        run=ctx.run,
        teacher=teacher if arm == "distilled" else None,
        validation=c.validation,
        seed=seed,
        should_stop=ctx.should_stop,
        watcher=ctx.terminal,
        epoch_steps=c.batches("distilled", seed).steps_per_epoch,
        classes=classes,
        metric=c.metric,
        validation_references=c.said,
    )
    if method.phases():
        return after_phases(training, ctx, fresh, live, example_of(c))
    return training


@dataclass(frozen=True)
class Others:
    """What a method trains beside the student that gives logits too.

    Attributes:
        method: builds the method again, untrained.
        cards: how to build those again that are to be saved, by name.
    """

    method: Callable[[], Method]
    cards: Mapping[str, dict[str, Any]]


def after_phases(
    training: Training,
    ctx: RunContext,
    fresh: Callable[[], tuple[nn.Module, Method]],
    live: ModelTeacher | None,
    example: Batch,
) -> Training:
    """Train what the method says comes first, or find it trained, and return the training that goes on from there.

    A phase has its share of the steps, the teacher, the data and the optimizer of the training itself; there is no
    validation, for its loss says nothing of the student's accuracy.
    """
    total = training.steps
    left, name = total, training.name
    learned: list[dict[str, Tensor]] = []
    for i in range(len(training.method.phases())):
        phase = training.method.phases()[i]
        steps = max(round(phase.share * total), 1)
        left -= steps
        keep_reached(training.student, phase.method, live, example, ctx.device)
        config = training.config.model_copy(update={"epochs": None, "steps": steps, "early_stop": None})
        first = replace(
            training, name=f"{name}-{phase.name}", method=phase.method, config=config, validation=None,
            epoch_steps=training.epoch_length,
        )  # fmt: skip
        try:
            outcome = fit(first, ctx.accelerator)
        finally:
            ctx.terminal.finished()
        student, method = fresh()  # whole again, where the trained ones were sharded or compiled
        weights, of_method = from_main(ctx.accelerator, lambda o=outcome: (o.last, o.method))  # type: ignore[misc]
        learned.append(of_method)
        student.load_state_dict(weights)
        for earlier, state in zip(method.phases(), learned, strict=False):
            earlier.method.load_state_dict(state)
        training = replace(training, student=student, method=method)
    config = training.config.model_copy(update={"epochs": None, "steps": max(left, 1)})
    return replace(training, config=config)


def keep_reached(
    student: nn.Module, method: Method, teacher: Teacher | None, example: Batch, device: torch.device
) -> None:
    """Freeze what of student and method gets no gradient from the method, by one pass in evaluation mode."""
    method.requires_grad_(True)
    module, batch = DistillationModule(student, method).to(device).eval(), example.to(device)
    terms = module(batch, get_signal(teacher, method, batch))
    torch.stack([term.sum for term in terms.values()]).sum().backward()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    module.zero_grad(set_to_none=True)


def get_signal(teacher: Teacher | None, method: Method, batch: Batch) -> Signal | None:
    """The teacher's word on a batch, where the method needs any."""
    needs = needs_of(method, teacher)
    if needs is None:
        return None
    assert teacher is not None
    return teacher.signal(batch, needs)


def train_and_keep(
    training: Training,
    ctx: RunContext,
    rebuild: Callable[[], nn.Module],
    test: Iterable[Batch],
    references: TeacherReferences | None,
    card: dict[str, Any],
    others: Others | None = None,
) -> dict[str, Any]:
    """Fit, read the test split once for the best and once for the last weights, and write the model's folder.

    The main process measures and writes; it alone has whole weights where they are sharded.
    """
    try:
        outcome = fit(training, ctx.accelerator)
    finally:
        ctx.terminal.finished()
    if ctx.accelerator.is_main_process:
        result = _measured(training, outcome, ctx, rebuild, test, references)
        if others is not None and training.method.auxiliary_models(training.student):
            found, models = _measured_others(outcome, ctx, rebuild, test, references, others.method())
            result["others"] = found
            for name, card_of in others.cards.items():  # before the result, which says that all is there
                with atomic_folder(ctx.run.model(f"{training.name}-{name}")) as folder:
                    save_model(models[name], folder, card_of)
        with atomic_folder(ctx.run.model(training.name)) as folder:
            save_model(to_float_model(result.pop("model")), folder, card)
            (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        ctx.terminal.say(
            f"{training.name}: test {result['best'][training.metric]:.2%} "
            f"(last epoch {result['last'][training.metric]:.2%}), {result['seconds']:.0f} s"
        )
        for name, scores in result.get("others", {}).items():
            ctx.terminal.say(f"{training.name}-{name}: test {scores['best']['accuracy']:.2%}")
    ctx.accelerator.wait_for_everyone()
    finished = ctx.run.result(training.name)
    assert finished is not None
    return finished


def _measured_others(
    outcome: Outcome,
    ctx: RunContext,
    rebuild: Callable[[], nn.Module],
    test: Iterable[Batch],
    references: TeacherReferences | None,
    method: Method,
) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """What a method's other models score on the test split, by name, and the models with the best weights.

    The best weights are those of the step at which the student was best on validation.
    """
    student = rebuild().to(ctx.device)
    method.to(ctx.device)
    models = method.auxiliary_models(student)
    example = next(iter(test)).rows(0, 2).to(ctx.device)
    found: dict[str, Any] = {name: {"parameters": reached(model, example)} for name, model in models.items()}
    for which, weights, of_method in (
        ("last", outcome.last, outcome.method), ("best", outcome.best, outcome.best_method),
    ):  # fmt: skip
        student.load_state_dict(weights)
        method.load_state_dict(of_method)
        for name, model in models.items():
            scores = evaluate(model, test, ctx.device, references)
            found[name][which] = {k: scores[k] for k in FIGURES if k in scores}
    return found, models


def _measured(
    training: Training,
    outcome: Outcome,
    ctx: RunContext,
    rebuild: Callable[[], nn.Module],
    test: Iterable[Batch],
    references: TeacherReferences | None,
) -> dict[str, Any]:
    """The result of a training, and under ``model`` the module that holds the best weights."""
    model = rebuild().to(ctx.device)
    model.load_state_dict(outcome.last)
    alike = Similarities()
    last = evaluate(model, test, ctx.device, references, watch=alike.add)
    best = last
    if any(not torch.equal(outcome.best[k], outcome.last[k]) for k in outcome.last):
        model.load_state_dict(outcome.best)
        alike = Similarities()
        best = evaluate(model, test, ctx.device, references, watch=alike.add)
    if references is not None:  # the teacher's own is taken once it is finished
        alike.keep(ctx.run, training.name)
    at = outcome.progress
    score = at.best
    return {
        "training": training.name,
        "seed": training.seed,
        "steps": at.step,
        "stopped_early": at.stopped_early,
        "seconds": round(at.seconds, 2),
        "validation": None
        if score is None
        else {training.metric: score[0], "loss": -score[1], "step": int(score[2])},
        "best": best,
        "last": last,
        "model": model,
    }
