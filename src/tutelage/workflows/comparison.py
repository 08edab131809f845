"""The heart of every run: the student alone and by a method, most often with a teacher, over seeds."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from torch import Tensor, nn

from tutelage.config import TrainConfig
from tutelage.data import Batch, Batches
from tutelage.engine import (
    Accelerator,
    Outcome,
    RunDirectory,
    Training,
    evaluate,
    evaluate_teacher,
    fit,
    from_main,
    said_at,
)
from tutelage.engine.optim import build_optimizer, build_schedule
from tutelage.engine.rundir import new_folder, write_text
from tutelage.errors import CapabilityError, ConfigError, DataError, Interrupted, NumericsError, TutelageError
from tutelage.methods import Method, SupervisedMethod, Trainee, adapted, built, check_capabilities, check_task
from tutelage.models import label_names, load_weights, save_model
from tutelage.models.files import read_card
from tutelage.students import ReusedHead, feature_shapes
from tutelage.taps import Needs, Observation, observe
from tutelage.teachers import (
    AheadTeacher,
    CachedTeacher,
    Ensemble,
    EnsembleTeacher,
    LiveTeacher,
    MemoryTeacher,
    Signal,
    Teacher,
)
from tutelage.workflows.measure import latencies, parameters, reached
from tutelage.workflows.progress import Terminal
from tutelage.workflows.similarity import Similarities
from tutelage.workflows.statistics import paired, spread
from tutelage.workflows.teachers import EnsemblePlan, Member, ModelTeacher, check_agree, described

MEMORY_BYTES = 2**29
"""Teacher logits of the test split up to this size are kept in memory."""

Arm = Literal["alone", "distilled"]

FIGURES = (
    "accuracy", "f1", "matthews", "spearman", "pearson", "recall", "loss", "agreement", "kl", "ece",
)  # fmt: skip
"""What is measured of every student."""


@dataclass
class Comparison:
    """What to compare.

    Attributes:
        name: of the run.
        teacher: builds the teacher; with weights, unless ``train_teacher``. ``None`` for a method without one.
        student: builds a student's initialisation from a seed; the same seed gives the same one.
        method: builds the method.
        batches: the training data of an arm under a seed.
        config: how students are trained.
        validation: iterated at each evaluation; ``None`` for none.
        test: iterated once for each finished model.
        seeds: each trains its own students.
        baseline: train the student alone too.
        train_teacher: how to train the teacher first, and on what.
        teacher_mode: see :class:`LiveTeacher`.
        ensemble: of which teachers it is made, where there are several; ``teacher`` then builds all as one.
        speed: options of :class:`LiveTeacher` beside the mode, of a single teacher.
        ahead: whether the teacher is asked ahead, here or in a process of its own.
        cache: opens the cache of a teacher's word, given the teacher, its classes and the method; ``None`` for none.
        remember: the training samples, unaugmented, where the teacher's logits may be computed once.
        remember_rows: how many positions these have.
        classes: class names, in the order of the labels.
        student_card: how to build the student again, for its folder.
        teacher_card: the same of the teacher.
        peer: builds what a method asks to be trained beside the student, given that and a seed. Default: a student,
            where the method asks for one of its architecture.
        peer_card: how to build it again, but for what the student's card says too.
        supervised: builds the method that learns from the data alone.
        metric: what models are chosen by, of those that evaluation gives.
        students_of: of a teacher, what builds a student's initialisation from a seed, where that is a part of it.
        head_only: whether only what did not come with a single teacher's weights is trained.
        compared: whether there is nothing but the teacher's word to evaluate by, as of embeddings.
        said: that word on the validation split; :func:`compare` asks for it.
    """

    name: str
    teacher: Callable[[], nn.Module] | None
    student: Callable[[int], nn.Module]
    method: Callable[[], Method]
    batches: Callable[[Arm, int], Batches]
    config: TrainConfig
    test: Iterable[Batch]
    validation: Iterable[Batch] | None = None
    seeds: Sequence[int] = (0,)
    baseline: bool = True
    train_teacher: tuple[TrainConfig, Batches, int] | None = None
    teacher_mode: Literal["eval", "train_bn"] = "eval"
    ensemble: EnsemblePlan | None = None
    speed: Mapping[str, Any] = field(default_factory=dict)
    ahead: Literal["overlap", "process"] | None = None
    cache: Callable[[ModelTeacher, int, Method, Accelerator], CachedTeacher] | None = None
    remember: Iterable[Batch] | None = None
    remember_rows: int = 0
    classes: list[str] | None = None
    student_card: dict[str, Any] = field(default_factory=dict)
    teacher_card: dict[str, Any] = field(default_factory=dict)
    peer: Callable[[Any, int], nn.Module] | None = None
    peer_card: Callable[[Any], dict[str, Any]] = lambda asked: {}
    supervised: Callable[[], Method] = SupervisedMethod
    metric: str = "accuracy"
    students_of: Callable[[nn.Module], Callable[[int], nn.Module]] | None = None
    head_only: bool = False
    compared: bool = False
    said: References | None = None

    def beside(self, teacher: nn.Module | None) -> Comparison:
        """The same, its students cut from this teacher where they are parts of one."""
        if self.students_of is None or teacher is None:
            return self
        return replace(self, student=self.students_of(teacher))


@dataclass
class Context:
    """Where and how a comparison runs."""

    accelerator: Accelerator
    run: RunDirectory
    terminal: Terminal
    should_stop: Callable[[], bool] = lambda: False

    @property
    def device(self) -> torch.device:
        """This process's device."""
        device: torch.device = self.accelerator.device
        return device


def compare(c: Comparison, ctx: Context) -> dict[str, Any]:
    """Run the comparison, or go on with it, and write its summary and student.

    Raises:
        CapabilityError: teacher, student, data and method do not fit; found before any student is trained.
        Interrupted: a stop was asked for; the state is saved.
    """
    if c.teacher is None:
        check_capabilities(c.method(), None)
    untrained = None if c.teacher is None else c.teacher()
    c = c.beside(untrained)
    student = c.student(c.seeds[0])
    classes = check_output(c, ctx.device, student, "student")
    if untrained is not None:
        check_teachers(c, ctx.device, untrained)
    apprentice, method = fitted(c, student, untrained, c.seeds[0])
    ctx.terminal.say(f"loss = {method.formula()}")
    for name, other in method.others(apprentice).items():
        if check_output(c, ctx.device, other, name) != classes:
            raise CapabilityError(
                f"{name} does not score the student's {classes} classes", remedy="set its number of classes"
            )
    extra = projectors(method)
    if method.peers:
        beside = sum(parameters(peer) for peer in method.others(apprentice).values())
        ctx.terminal.say(f"peers: {len(method.peers)}, of {beside:,} parameters, trained along and saved in models/")
    if extra:
        ctx.terminal.say(f"projectors: {extra:,} parameters, trained along and not exported")
    if apprentice is not student:
        ctx.terminal.say(
            f"the student is exported as a {type(apprentice).__name__}: {parameters(apprentice):,} parameters "
            f"where it has {parameters(c.student(c.seeds[0])):,} alone"
        )
    check_optimizer(c, apprentice, method)
    teacher = None if untrained is None else live_teacher(c, ctx, untrained)
    c = c.beside(model_of(teacher))
    student = c.student(c.seeds[0])
    apprentice, method = fitted(c, c.student(c.seeds[0]), model_of(teacher), c.seeds[0])
    check_labels(c, model_of(teacher), student)
    references, teacher_scores = None, None
    if teacher is not None:
        check_separate(teacher.model, apprentice)
        if c.cache is None:
            check_capabilities(method, teacher)
        references, teacher_scores = examined(c, ctx, teacher)
        if c.compared and c.validation is not None:
            c = replace(c, said=References(teacher, c.validation, ctx))
    check_method_runs(c, ctx, apprentice, method, teacher)

    arms: list[Arm] = ["alone", "distilled"] if c.baseline else ["distilled"]
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with taught_by(c, ctx, teacher, method, classes) as asked:
        for seed in c.seeds:
            for arm in arms:
                results[arm].append(train_student(c, ctx, arm, seed, asked, teacher, references, classes))
    return summarise(c, ctx, teacher, apprentice, teacher_scores, results, method)


def model_of(teacher: ModelTeacher | None) -> nn.Module | None:
    """The teacher's model, where there is a teacher."""
    return None if teacher is None else teacher.model


def examined(c: Comparison, ctx: Context, teacher: ModelTeacher) -> tuple[References, dict[str, Any]]:
    """What the teacher says of the test split, and how good it is.

    Raises:
        CapabilityError: it does worse than chance.
    """
    references = References(teacher, c.test, ctx)
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


class References:
    """The teacher's logits for every test batch, to compare students with; iterated once for each model.

    Kept in memory as long as they fit :data:`MEMORY_BYTES`; else the teacher is asked again each time.
    """

    def __init__(self, teacher: Teacher, test: Iterable[Batch], ctx: Context) -> None:
        self.teacher, self.test, self.device = teacher, test, ctx.device
        self.kept: list[Tensor] | None = []
        self.classes = size = 0
        for logits in until_stopped(ctx.terminal.iterate(self._ask(), "teacher on test"), ctx):
            self.classes, size = logits.shape[-1], size + 4 * logits.numel()
            if size > MEMORY_BYTES:
                self.kept = None
                break
            self.kept.append(logits)

    def _ask(self) -> Iterator[Tensor]:
        for batch in self.test:
            yield said_at(self.teacher, batch.to(self.device)).float().cpu()

    def __iter__(self) -> Iterator[Tensor]:
        return self._ask() if self.kept is None else iter(self.kept)


T = TypeVar("T")


def until_stopped(items: Iterable[T], ctx: Context) -> Iterator[T]:
    """``items``, as long as nobody asks for a stop.

    Raises:
        Interrupted: somebody did.
    """
    for item in items:
        if ctx.should_stop():
            raise Interrupted(
                "stopped while the teacher was asked; what was trained is kept", remedy="go on with --resume"
            )
        yield item


def example_of(c: Comparison) -> Batch:
    """Two samples for a dry run."""
    return next(iter(c.test)).rows(0, 2)


def fitted(c: Comparison, student: nn.Module, teacher: nn.Module | None, seed: int) -> tuple[nn.Module, Method]:
    """What is trained of ``student``, and the method, fitted to it and the teacher; both start as the seed says."""
    method, example = c.method(), example_of(c)
    if method.peers:
        method.join(peers(c, method, seed))
    apprentice = adapted(method, student, teacher, example, seed)
    ids = c.batches("distilled", seed).ids if method.needs_ids else None
    return apprentice, built(method, apprentice, teacher, example, seed, ids)


def peers(c: Comparison, method: Method, seed: int) -> list[nn.Module]:
    """What a method asks to be trained beside the student; no two start alike, nor like the student of any seed."""
    made = []
    for i, asked in enumerate(method.peers, 1):
        own = (seed + i * 2_246_822_507) % 2**32  # of a seed's upper half torch's generator on CPUs takes no note
        if c.peer is not None:
            made.append(c.peer(asked, own))
            continue
        if asked is not None:
            raise ConfigError(f"peers: nobody here can build {asked!r}", remedy="give a number of peers")
        made.append(c.student(own))
    return made


def projectors(method: Method) -> int:
    """Parameters that are trained with the student and belong to no model that is kept."""
    return 0 if method.peers else parameters(method)


def taught_on(c: Comparison, method: Method, seed: int) -> Batches:
    """The training data of a method under a seed: all of it, or what has a label where the rest teaches nothing."""
    return c.batches("distilled" if method.unlabelled else "alone", seed)


def train_student(
    c: Comparison,
    ctx: Context,
    arm: Arm,
    seed: int,
    teacher: Teacher | None,
    live: ModelTeacher | None,
    references: References | None,
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
        return model if arm == "alone" else adapted(c.method(), model, model_of(live), example_of(c), seed)

    others = training.method.others(training.student)
    cards = [{**card, **c.peer_card(asked), "arm": arm} for asked in training.method.peers]
    kept = dict(zip(others, cards, strict=True)) if cards else {}
    return train_and_keep(
        training, ctx, rebuilt, c.test, references, card, Others(lambda: beginning(c, arm, seed, live)[1], kept)
    )


def beginning(c: Comparison, arm: Arm, seed: int, live: ModelTeacher | None) -> tuple[nn.Module, Method]:
    """The student of an arm and its method, untrained."""
    if arm == "alone":
        return c.student(seed), c.supervised()
    return fitted(c, c.student(seed), model_of(live), seed)


def training_of(
    c: Comparison,
    ctx: Context,
    arm: Arm,
    seed: int,
    teacher: Teacher | None,
    live: ModelTeacher | None,
    classes: int,
) -> Training:
    """The training of a student; the phases that its method needs before it are done."""
    fresh = partial(beginning, c, arm, seed, live)
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
    ctx: Context,
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
    trainee, batch = Trainee(student, method).to(device).eval(), example.to(device)
    terms = trainee(batch, said(teacher, method, batch))
    torch.stack([term.sum for term in terms.values()]).sum().backward()
    for parameter in trainee.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    trainee.zero_grad(set_to_none=True)


def said(teacher: Teacher | None, method: Method, batch: Batch) -> Signal | None:
    """The teacher's word on a batch, where the method needs any."""
    if method.needs is None:
        return None
    assert teacher is not None
    return teacher.signal(batch, method.needs)


def train_and_keep(
    training: Training,
    ctx: Context,
    rebuild: Callable[[], nn.Module],
    test: Iterable[Batch],
    references: References | None,
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
        if others is not None and training.method.others(training.student):
            found, models = _measured_others(outcome, ctx, rebuild, test, references, others.method())
            result["others"] = found
            for name, card_of in others.cards.items():  # before the result, which says that all is there
                with new_folder(ctx.run.model(f"{training.name}-{name}")) as folder:
                    save_model(models[name], folder, card_of)
        with new_folder(ctx.run.model(training.name)) as folder:
            save_model(result.pop("model"), folder, card)
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
    ctx: Context,
    rebuild: Callable[[], nn.Module],
    test: Iterable[Batch],
    references: References | None,
    method: Method,
) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """What a method's other models score on the test split, by name, and the models with the best weights.

    The best weights are those of the step at which the student was best on validation.
    """
    student = rebuild().to(ctx.device)
    method.to(ctx.device)
    models = method.others(student)
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
    ctx: Context,
    rebuild: Callable[[], nn.Module],
    test: Iterable[Batch],
    references: References | None,
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


# Teacher -------------------------------------------------------------------------------------------


def live_teacher(c: Comparison, ctx: Context, model: nn.Module) -> ModelTeacher:
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


def as_taught(c: Comparison, model: nn.Module, device: torch.device, *, learned: bool = True) -> ModelTeacher:
    """The teacher with its weights, as it runs; unless ``learned``, members' weights that are to be are equal."""
    if c.ensemble is None:
        return LiveTeacher(model, mode=c.teacher_mode, **c.speed).to(device)
    plan = c.ensemble
    if plan.weights == "learned" and not learned:
        plan = replace(plan, weights=None)
    return plan.teacher(model.children(), c.teacher_mode, device, c.validation)


def trained(c: Comparison, ctx: Context, member: Member, model: nn.Module) -> nn.Module:
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
            where="teacher.learn",
            remedy="leave teacher.train out to use it as it is, or set teacher.learn: all",
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in fresh)


def say_ensemble(scores: Mapping[str, Any], ctx: Context) -> None:
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
def taught_by(
    c: Comparison, ctx: Context, teacher: ModelTeacher | None, method: Method, classes: int
) -> Iterator[Teacher | None]:
    """Who is asked in training: the cache where there is one, the teacher's memory where it fits, or itself."""
    if teacher is None or not is_taught(method):
        if c.cache is not None:
            ctx.terminal.say("cache: not opened, for the method asks the teacher for nothing")
        yield teacher
        return
    if c.cache is None:
        known = remembered(c, ctx, teacher, method, classes)
        if c.ahead is None or known is not teacher:
            yield known
            return
        with closing(AheadTeacher(teacher, process=c.ahead == "process")) as ahead:
            yield ahead
        return
    with c.cache(teacher, classes, method, ctx.accelerator) as cached:
        for each in (method, *(phase.method for phase in method.phases())):
            check_capabilities(each, cached)
            if each.needs is not None:
                cached.check(each.needs)
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


def remembered(c: Comparison, ctx: Context, teacher: ModelTeacher, method: Method, classes: int) -> Teacher:
    """The teacher's word from memory, where it never changes and fits; else the teacher itself."""
    if not rememberable(c, ctx, teacher, method, classes):
        return teacher
    return in_memory(c, ctx, teacher, all_needs(method))


def rememberable(c: Comparison, ctx: Context, teacher: ModelTeacher, method: Method, classes: int) -> bool:
    """Whether the teacher's word never changes and fits the memory; the run directory keeps the answer."""
    needs = all_needs(method)
    if c.remember is None or method.needs is None or needs.head or c.teacher_mode != "eval":
        return False
    example = example_of(c)
    if example.labels.ndim > 1 or (needs.hidden and isinstance(example.inputs, dict)):
        return False  # as many rows as a text has tokens
    shapes = feature_shapes(teacher.model, example.rows(0, 1).for_teacher(), needs.hidden)
    row = classes * needs.logits + sum(math.prod(shape) for shape in shapes.values())
    fits = c.remember_rows * row * 4 <= memory_budget(ctx.accelerator.num_processes)
    return from_main(ctx.accelerator, lambda: ctx.run.decided("remembered", fits))


def in_memory(c: Comparison, ctx: Context, teacher: ModelTeacher, needs: Needs) -> MemoryTeacher:
    """The teacher's word on the training data, asked once."""
    assert c.remember is not None

    def shown(batches: Iterable[Batch]) -> Iterator[Batch]:
        return until_stopped(ctx.terminal.iterate(batches, "teacher on training data"), ctx)

    with ctx.accelerator.autocast():
        return MemoryTeacher(teacher, c.remember, ctx.device, shown, needs=needs)


def memory_budget(processes: int) -> int:
    """Bytes that a process may remember: its share of a quarter of what is free now."""
    return int(psutil.virtual_memory().available) // 4 // processes


# Checks that come before step 0 ------------------------------------------------------------------------


def check_teachers(c: Comparison, device: torch.device, teacher: nn.Module) -> None:
    """:func:`check_output` of the teacher, or of each member by its name, and whether it can run as it is to run."""
    assert c.teacher is not None
    single = Member("teacher", c.teacher, c.train_teacher, speed=c.speed)
    members = [single] if c.ensemble is None else c.ensemble.members
    models = list(teacher.children()) if isinstance(teacher, Ensemble) else [teacher]
    for member, model in zip(members, models, strict=True):
        check_output(c, device, model, member.name)
        if any(m.train is not None for m in members):  # before hours of training; a copy, for it is frozen
            LiveTeacher(copy.deepcopy(model), mode=c.teacher_mode, **member.speed)


def check_output(c: Comparison, device: torch.device, model: nn.Module, who: str) -> int:
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
    batch = whole.rows(0, 2).to(device)
    if who.startswith("teacher"):
        batch = batch.for_teacher()
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


def check_optimizer(c: Comparison, student: nn.Module, method: Method) -> None:
    """Raise :class:`ConfigError` when the optimizer or the schedule refuses an option."""
    optimizer = build_optimizer(Trainee(student, method), c.config.optimizer)
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


def check_labels(c: Comparison, teacher: nn.Module | None, student: nn.Module) -> None:
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


def check_taught(scores: dict[str, Any], classes: int, ctx: Context) -> None:
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


def check_method_runs(
    c: Comparison, ctx: Context, student: nn.Module, method: Method, teacher: Teacher | None
) -> None:
    """One forward pass of everything on two samples, in evaluation mode, so that misfits show before step 0."""
    batch = example_of(c).to(ctx.device)
    student.to(ctx.device).eval()
    for each in (method, *(phase.method for phase in method.phases())):
        each.to(ctx.device).eval()
        check_task(each, batch)
        with torch.no_grad():
            signal = said(teacher, each, batch)
            seen = Observation() if each.student_needs is None else observe(student, batch.inputs, each.student_needs)
            each(seen, batch, signal)


# Summary -----------------------------------------------------------------------------------------------


def summarise(
    c: Comparison,
    ctx: Context,
    teacher: ModelTeacher | None,
    student: nn.Module,
    teacher_scores: dict[str, Any] | None,
    results: dict[str, list[dict[str, Any]]],
    method: Method,
) -> dict[str, Any]:
    """The figures of the run, written to ``summary.json``, and the exported student."""
    student.to(ctx.device)
    models = {"student": student} if teacher is None else {"teacher": teacher.model, "student": student}
    example = next(iter(c.test))
    seen = {name: (model, example.for_teacher() if name == "teacher" else example) for name, model in models.items()}
    speed = latencies(seen, ctx.device)
    sizes = {name: parameters(model) for name, model in models.items()}

    def row(found: list[dict[str, Any]]) -> dict[str, Any]:
        keys = [k for k in FIGURES if k in found[0]["best"]]
        others = found[0].get("others", {})
        beside = {
            name: {
                "parameters": others[name]["parameters"],
                **{w: {k: spread([r["others"][name][w][k] for r in found]) for k in keys} for w in ("best", "last")},
            }
            for name in others
        }
        return {
            **({"others": beside} if beside else {}),
            "best": {k: spread([r["best"][k] for r in found]) for k in keys},
            "last": {k: spread([r["last"][k] for r in found]) for k in keys},
            "reliability": found[0]["best"].get("reliability"),
            "per_class": found[0]["best"].get("per_class"),
            "seconds": spread([r["seconds"] for r in found]),
        }

    summary: dict[str, Any] = {
        "name": c.name,
        "formula": method.formula(),
        "taught": is_taught(method),
        "classes": c.classes,
        "metric": c.metric,
        "seeds": list(c.seeds),
        "parameters": sizes,
        "projectors": projectors(method),
        "latency": speed,
        "students": {arm: row(found) for arm, found in results.items()},
        "device": str(ctx.device),
        "processes": ctx.accelerator.num_processes,
    }
    if teacher_scores is not None:
        summary["capacity_ratio"] = sizes["student"] / sizes["teacher"]
        kept = [k for k in (c.metric, *FIGURES) if k in teacher_scores["validation"]]
        on_validation = {k: teacher_scores["validation"][k] for k in kept}
        summary["teacher"] = {**teacher_scores, "validation": on_validation}
    if "alone" in results:
        summary["gain"] = {
            which: paired(
                [r[which][c.metric] for r in results["distilled"]], [r[which][c.metric] for r in results["alone"]]
            )
            for which in ("best", "last")
        }
    key = [(r["validation"] or r["last"])[c.metric] for r in results["distilled"]]
    chosen = results["distilled"][key.index(max(key))] if c.validation is not None else results["distilled"][0]
    summary["exported"] = chosen["training"]
    if ctx.run.writes:
        ctx.run.export(ctx.run.model(chosen["training"]))
        write_text(ctx.run.summary, json.dumps(summary, indent=1) + "\n")
    ctx.accelerator.wait_for_everyone()
    return summary


def exported_student(c: Comparison, ctx: Context, summary: dict[str, Any]) -> nn.Module:
    """The exported student as a plain module, in evaluation mode, on the CPU."""
    folder = Path(ctx.run.path) / "student"
    reused = read_card(folder).get("reused_head")
    model = c.student(c.seeds[0]).cpu()
    if reused is not None:
        model = ReusedHead(model, **reused)
    load_weights(model, folder)
    return model.eval()
