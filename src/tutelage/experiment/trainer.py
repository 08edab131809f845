"""Trains one model of an experiment, measures it and writes its folder; a finished one is read back."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.data import Batch
from tutelage.engine import Outcome, Training, broadcast_from_main, fit
from tutelage.evaluation import TeacherOutput, evaluate
from tutelage.experiment.measure import Similarities, reached_parameters
from tutelage.experiment.prepare import example_of, initial_student, training_batches
from tutelage.experiment.spec import FIGURES, Arm, ExperimentSpec, ModelTeacher, RunContext
from tutelage.files import atomic_folder
from tutelage.methods import DistillationModule, Method
from tutelage.methods.step import get_signal
from tutelage.models import save_model
from tutelage.students import ReusedHead, to_float_model
from tutelage.teachers import Teacher

Rebuild = Callable[[], tuple[nn.Module, Method]]
"""Builds a training's model and method once more, untrained."""


@dataclass(frozen=True)
class TrainingTeacher:
    """What students are trained with and compared to.

    Attributes:
        live: the teacher's model; ``None`` if it is not in this process.
        signals: gives the teacher outputs in training: the teacher itself, its cache, or a copy in memory.
        on_validation: those on the validation split, if the data has no labels to evaluate by.
    """

    live: ModelTeacher | None = None
    signals: Teacher | None = None
    on_test: Iterable[TeacherOutput] | None = None
    on_validation: Iterable[TeacherOutput] | None = None


def train_student(
    spec: ExperimentSpec, ctx: RunContext, arm: Arm, seed: int, teacher: TrainingTeacher, classes: int
) -> dict[str, Any]:
    """Train one student, or read it back if it is trained, and return its result."""
    if (finished := ctx.run.result(f"{arm}-seed{seed}")) is not None:
        return finished
    training = student_training(spec, ctx, arm, seed, teacher, classes)
    card = {**spec.student_card, "arm": arm}
    if isinstance(training.student, ReusedHead):
        card["reused_head"] = training.student.card
    method = training.method
    peer_cards = [{**card, **spec.source.peer_card(options), "arm": arm} for options in method.peers]
    cards = dict(zip(method.auxiliary_models(training.student), peer_cards, strict=True)) if peer_cards else {}
    rebuild = partial(initial_student, spec, arm, seed, teacher.live)
    return train_and_save(training, ctx, rebuild, spec.evaluation.test, teacher.on_test, card, cards)


def student_training(
    spec: ExperimentSpec, ctx: RunContext, arm: Arm, seed: int, teacher: TrainingTeacher, classes: int
) -> Training:
    """The training of a student; the phases that its method needs before it are trained here."""
    rebuild = partial(initial_student, spec, arm, seed, teacher.live)
    student, method = rebuild()
    training = Training(
        name=f"{arm}-seed{seed}",
        student=student,
        method=method,
        batches=training_batches(spec, method, seed),
        config=spec.train,
        run=ctx.run,
        teacher=teacher.signals if arm == "distilled" else None,
        validation=spec.evaluation.validation,
        seed=seed,
        should_stop=ctx.should_stop,
        callback=ctx.terminal,
        epoch_steps=spec.source.training_batches("distilled", seed).steps_per_epoch,
        classes=classes,
        metric=spec.evaluation.metric,
        validation_outputs=teacher.on_validation,
    )
    if method.phases():
        return _after_phases(training, ctx, rebuild, teacher.live, example_of(spec))
    return training


def _after_phases(
    training: Training, ctx: RunContext, rebuild: Rebuild, live: ModelTeacher | None, example: Batch
) -> Training:
    """Train the method's phases, or read them back, and return the training that continues from there.

    A phase has its share of the steps, and the teacher, data and optimizer of the training. It has no validation:
    its loss does not measure the student's accuracy.
    """
    total = training.steps
    remaining = total
    phase_states: list[dict[str, Tensor]] = []
    for i in range(len(training.method.phases())):
        phase = training.method.phases()[i]
        steps = max(round(phase.share * total), 1)
        remaining -= steps
        _freeze_unreached(training.student, phase.method, live, example, ctx.device)
        config = training.config.model_copy(update={"epochs": None, "steps": steps, "early_stop": None})
        phase_training = replace(
            training, name=f"{training.name}-{phase.name}", method=phase.method, config=config, validation=None,
            epoch_steps=training.epoch_length,
        )  # fmt: skip
        outcome = fit_with_progress(phase_training, ctx)
        student, method = rebuild()  # the trained ones may be sharded or compiled
        weights, method_state = broadcast_from_main(ctx.accelerator, lambda o=outcome: (o.last, o.method))  # type: ignore[misc]
        phase_states.append(method_state)
        student.load_state_dict(weights)
        for earlier, state in zip(method.phases(), phase_states, strict=False):
            earlier.method.load_state_dict(state)
        training = replace(training, student=student, method=method)
    config = training.config.model_copy(update={"epochs": None, "steps": max(remaining, 1)})
    return replace(training, config=config)


def fit_with_progress(training: Training, ctx: RunContext) -> Outcome:
    """Train, and close the progress display at the end."""
    try:
        return fit(training, ctx.accelerator)
    finally:
        ctx.terminal.on_end()


def _freeze_unreached(
    student: nn.Module, method: Method, teacher: Teacher | None, example: Batch, device: torch.device
) -> None:
    """Freeze the parameters of student and method that the method's loss gives no gradient."""
    method.requires_grad_(True)
    module, batch = DistillationModule(student, method).to(device).eval(), example.to(device)
    terms = module(batch, get_signal(teacher, method, batch))
    torch.stack([term.sum for term in terms.values()]).sum().backward()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    module.zero_grad(set_to_none=True)


def train_and_save(
    training: Training,
    ctx: RunContext,
    rebuild: Rebuild,
    test: Iterable[Batch],
    outputs: Iterable[TeacherOutput] | None,
    card: dict[str, Any],
    peer_cards: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """Train, measure the best and the last weights on the test split, and write the model's folder.

    The main process measures and writes; only it has all weights of a sharded model. ``peer_cards`` are the entries
    of ``model.json`` of the models that are trained along and saved too, by name.
    """
    outcome = fit_with_progress(training, ctx)
    if ctx.accelerator.is_main_process:
        measure = partial(evaluate, batches=test, device=ctx.device, teacher=outputs)
        model = rebuild()[0].to(ctx.device)
        best, last, similarities = _measure(model, outcome, measure)
        if outputs is not None:  # the teacher's own are written when the teacher is evaluated
            similarities.write(ctx.run, training.name)
        result = _result(training, outcome) | {"best": best, "last": last}
        if training.method.auxiliary_models(training.student):
            example = next(iter(test)).rows(0, 2).to(ctx.device)
            result["others"], others = _measure_others(outcome, *rebuild(), example, measure)
            for name, peer_card in peer_cards.items():  # before the result, which marks the training as finished
                with atomic_folder(ctx.run.model(f"{training.name}-{name}")) as folder:
                    save_model(others[name], folder, peer_card)
        with atomic_folder(ctx.run.model(training.name)) as folder:
            save_model(to_float_model(model), folder, card)
            (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        ctx.terminal.say(
            f"{training.name}: test {figure(best[training.metric], training.metric)} "
            f"(last epoch {figure(last[training.metric], training.metric)}), {result['seconds']:.0f} s"
        )
        for name, scores in result.get("others", {}).items():
            ctx.terminal.say(f"{training.name}-{name}: test {scores['best']['accuracy']:.2%}")
    ctx.accelerator.wait_for_everyone()
    finished = ctx.run.result(training.name)
    assert finished is not None
    return finished


def figure(value: float, metric: str) -> str:
    """A metric as text; a correlation, from -1 to 1, is no percentage."""
    return f"{value:.4f}" if metric in ("spearman", "pearson", "matthews") else f"{value:.2%}"


def _measure(
    model: nn.Module, outcome: Outcome, measure: Callable[..., dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any], Similarities]:
    """The figures of the best and the last weights, and the similarities of the best; ``model`` holds the best."""
    similarities = Similarities()
    model.load_state_dict(outcome.last)
    last = best = measure(model, watch=similarities.add)
    if any(not torch.equal(outcome.best[k], outcome.last[k]) for k in outcome.last):
        similarities = Similarities()
        model.load_state_dict(outcome.best)
        best = measure(model, watch=similarities.add)
    return best, last, similarities


def _result(training: Training, outcome: Outcome) -> dict[str, Any]:
    progress, validation = outcome.progress, None
    if progress.best is not None:
        score, negative_loss, step = progress.best
        validation = {training.metric: score, "loss": -negative_loss, "step": int(step)}
    return {
        "training": training.name, "seed": training.seed, "steps": progress.step,
        "stopped_early": progress.stopped_early, "seconds": round(progress.seconds, 2), "validation": validation,
    }  # fmt: skip


def _measure_others(
    outcome: Outcome, student: nn.Module, method: Method, example: Batch, measure: Callable[..., dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """The figures of a method's other models (peers, exits) by name, and these models with the best weights.

    The best weights are those of the step at which the student was best on validation.
    """
    device = example.labels.device
    models = method.to(device).auxiliary_models(student.to(device))
    figures: dict[str, Any] = {
        name: {"parameters": reached_parameters(model, example)} for name, model in models.items()
    }
    for which, weights, method_state in (
        ("last", outcome.last, outcome.method), ("best", outcome.best, outcome.best_method),
    ):  # fmt: skip
        student.load_state_dict(weights)
        method.load_state_dict(method_state)
        for name, model in models.items():
            scores = measure(model)
            figures[name][which] = {k: scores[k] for k in FIGURES if k in scores}
    return figures, models
