"""How long the run of a recipe takes: each of its parts is done a few times, and multiplied."""

import statistics
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from tutelage.config import Recipe, TrainConfig
from tutelage.data import Batch, Batches, RankSlice
from tutelage.engine.loop import EVALUATIONS
from tutelage.engine.optim import build_optimizer
from tutelage.evaluation import evaluate, evaluate_teacher
from tutelage.experiment.prepare import (
    AsTeacher,
    training_batches,
)
from tutelage.experiment.sample_predictions import generate_continuations, select_rows
from tutelage.experiment.spec import ExperimentSpec, ModelTeacher
from tutelage.experiment.teacher_setup import build_member
from tutelage.methods.base import DistillationModule
from tutelage.methods.step import get_signal
from tutelage.taps import Needs, observe
from tutelage.teachers import Teacher

FEWEST, MOST, ENOUGH = 3, 30, 0.5
"""Steps that are measured: at least and at most so many, until they have taken so many seconds."""

LATENCY_CALLS = 33
"""Forward passes of one sample by which a run measures the latency of a model."""


@dataclass
class TrainingTime:
    """The time of one training.

    Attributes:
        step: seconds of a step.
        steps: number of steps.
        evaluations: number of evaluations on validation data.
        terms: the mean of each term in the last measured step.
    """

    step: float
    steps: int
    evaluations: int
    terms: dict[str, float]

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return self.step * self.steps


def time_training(
    module: DistillationModule, teacher: Teacher | None, batches: Batches, config: TrainConfig, epoch_steps: int
) -> TrainingTime:
    """Do a few optimizer steps of a throw-away module, as a run does them."""
    total = config.steps or (config.epochs or 1) * epoch_steps
    every = config.evaluate_every or max(epoch_steps, -(-total // EVALUATIONS))
    optimizer, device = build_optimizer(module, config.optimizer), next(module.parameters()).device
    module.train()
    method = module.method
    writes = method.generates_batches and getattr(method.options, "rollouts", None) is None
    if writes:
        method.before_training(module.student, 0, total)
    times: list[float] = []
    values: dict[str, float] = {}
    for micros in islice(batches.epoch(0, RankSlice(accumulate=config.accumulate)), MOST):
        start = time.perf_counter()
        for micro in micros:
            batch = micro.to(device)
            values = _backward(module, teacher, method.prepare_batch(module.student, batch) if writes else batch)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        if len(times) >= (2 * FEWEST if writes else FEWEST) and sum(times) >= ENOUGH:
            break
    typical = statistics.mean if writes else statistics.median  # the student writes in some of the steps
    step = typical(times[1:] or times)
    return TrainingTime(step, total, -(-total // every), values)


def _backward(module: DistillationModule, teacher: Teacher | None, batch: Batch) -> dict[str, float]:
    terms = module(batch, get_signal(teacher, module.method, batch))
    means = {name: term.sum / term.count.clamp(min=1) for name, term in terms.items()}
    sum(module.method.weights[name] * mean for name, mean in means.items()).backward()
    return {name: float(mean.detach()) for name, mean in means.items()}


def estimate_seconds(
    recipe: Recipe,
    spec: ExperimentSpec,
    module: DistillationModule,
    distilled: TrainingTime,
    teacher: ModelTeacher | None,
    device: torch.device,
) -> dict[str, float]:
    """Seconds of the parts of a run, by name; ``distilled`` is the measured training of a distilled student."""
    evaluation, seeds, seed = spec.evaluation, len(spec.seeds), spec.seeds[0]
    student, method = module.student, module.method
    train = _with_phases(spec, module, distilled, teacher)
    count = 1 + len(method.auxiliary_models(student))
    if spec.baseline:
        plain = DistillationModule(spec.source.build_student(seed), spec.source.build_baseline_method()).to(device)
        rows = spec.source.training_batches("baseline", seed)
        epoch = spec.source.training_batches("distilled", seed).steps_per_epoch
        train += time_training(plain, None, rows, spec.train, epoch).seconds
        count += 1
    validation, test = (
        _time_batches(lambda batch: evaluate(student, [batch], device), split)
        for split in (evaluation.validation or (), evaluation.test)
    )
    arms = 2 if spec.baseline else 1
    twice = 2 if validation else 1  # the best and the last weights
    parts = {
        "training": seeds * train,
        "evaluation": seeds * (arms * distilled.evaluations * validation + count * twice * test),
        "latency": LATENCY_CALLS * _time_row(student, evaluation.test, device),
        "samples": arms * _time_generation(spec, student, device, theirs=False),
    }
    if teacher is not None:
        outputs = _time_batches(lambda batch: evaluate_teacher(teacher, [batch], device), evaluation.test)
        both = outputs * (1 + (validation / test if evaluation.by_teacher and test else 0))
        parts["evaluation of the teacher"] = both
        parts["samples"] += _time_generation(spec, teacher.model, device, theirs=True)
        parts["training of the teacher"] = sum(
            _time_member(spec, number, device) for number in range(len(spec.teacher.members) if spec.teacher else 0)
        )
    return {name: seconds for name, seconds in parts.items() if seconds}


def _with_phases(
    spec: ExperimentSpec, module: DistillationModule, main: TrainingTime, teacher: ModelTeacher | None
) -> float:
    """Seconds of a distilled training with the phases that its method needs first."""
    seconds, rest = 0.0, 1.0
    for phase in module.method.phases():
        rows = training_batches(spec, phase.method, spec.seeds[0])
        part = DistillationModule(module.student, phase.method)
        for parameter in part.parameters():
            parameter.requires_grad_(True)
        seconds += (
            phase.share * time_training(part, teacher, rows, spec.train, rows.steps_per_epoch).step * main.steps
        )
        rest -= phase.share
    return seconds + rest * main.seconds


def _time_member(spec: ExperimentSpec, number: int, device: torch.device) -> float:
    """Seconds of the training of a teacher's member, with its evaluations; 0 if it has weights."""
    assert spec.teacher is not None
    training = spec.teacher.members[number].training
    if training is None:
        return 0.0
    module = DistillationModule(build_member(spec, number), spec.source.build_baseline_method()).to(device)
    time_of = time_training(module, None, training.batches, training.config, training.batches.steps_per_epoch)
    validation, test = (
        _time_batches(lambda batch: evaluate(module.student, [batch], device), AsTeacher(split, number))
        for split in (spec.evaluation.validation or (), spec.evaluation.test)
    )
    return time_of.seconds + time_of.evaluations * validation + 2 * test


def _time_batches(run: Callable[[Batch], Any], split: Iterable[Batch]) -> float:
    """Seconds of all batches of a split, from a first, a middle and a last one."""
    count = len(split) if isinstance(split, Sized) else sum(1 for _ in split)
    chosen = {0, count // 2, count - 1}
    times: list[float] = []
    for number, batch in enumerate(split):
        if number in chosen:
            if not times:
                run(batch)
            start = time.perf_counter()
            run(batch)
            times.append(time.perf_counter() - start)
    return count * statistics.mean(times) if times else 0.0


def _time_row(model: nn.Module, test: Iterable[Batch], device: torch.device) -> float:
    row = next(iter(test)).rows(0, 1).to(device)
    with torch.no_grad():
        start = time.perf_counter()
        observe(model.eval(), row.inputs, Needs())
        return time.perf_counter() - start


def _time_generation(spec: ExperimentSpec, model: nn.Module, device: torch.device, *, theirs: bool) -> float:
    """Seconds in which a language model continues the texts that a run writes as samples."""
    evaluation = spec.evaluation
    if evaluation.tokenizers is None or not callable(getattr(model, "generate", None)):
        return 0.0
    rows = select_rows(evaluation.test, evaluation.samples.generations)
    if not rows:
        return 0.0
    start = time.perf_counter()
    name = "teacher" if theirs else "student"
    few = {name: (model.eval(), evaluation.tokenizers[int(theirs)])}
    generate_continuations(few, rows[:1], evaluation.samples.max_new_tokens, device)
    return (time.perf_counter() - start) * len(rows)
