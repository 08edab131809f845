"""Checks of an experiment before training."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from tutelage.data import Batch, Batches, PlannedBatches
from tutelage.data.loader import current_rank
from tutelage.data.texts import TextSet
from tutelage.engine import Accelerator, is_bf16_slow
from tutelage.engine.optim import build_optimizer, build_schedule
from tutelage.errors import CapabilityError, ConfigError, DataError, NumericsError, TutelageError, first_line
from tutelage.experiment.prepare import all_methods, example_of
from tutelage.experiment.spec import Arm, ExperimentSpec, RunContext
from tutelage.methods import DistillationModule, Method, check_task
from tutelage.methods.step import get_signal
from tutelage.models import label_names
from tutelage.progress import Terminal
from tutelage.taps import Needs, Observation, observe
from tutelage.teachers import Ensemble, LiveTeacher, Teacher


def check_evaluation_labels(spec: ExperimentSpec) -> None:
    """Raise :class:`DataError` if the evaluation data has no label, so that there is nothing to measure by."""
    evaluation = spec.evaluation
    for name, batches in (("evaluation", evaluation.test), ("validation", evaluation.validation)):
        first = None if batches is None else next(iter(batches), None)
        if batches is None or first is None or evaluation.by_teacher or first.task in ("embedding", "ranking"):
            continue
        if not any(bool(batch.labelled().any()) for batch in itertools.chain([first], batches)):
            raise DataError(
                f"the {name} data has no labels: every label is -100",
                remedy="give labelled samples; accuracy, loss and gain are measured by them",
            )


def check_teachers(spec: ExperimentSpec, device: torch.device, model: nn.Module) -> None:
    """:func:`check_output` of the teacher or of each member, and whether it can run with its options."""
    teacher = spec.teacher
    assert teacher is not None
    models = list(model.children()) if isinstance(model, Ensemble) else [model]
    for number, (member, one) in enumerate(zip(teacher.members, models, strict=True)):
        # A sharded model is in one piece in main memory only.
        place = torch.device("cpu") if member.inference.get("sharded") else device
        check_output(spec, place, one, member.name, number)
        if member.training is not None:
            example, first = example_of(spec).for_member(number).for_teacher().to(place), member.training
            check_training_mode(one, example, member.name, first.batches, first.config.accumulate)
        if teacher.is_trained_first:  # before hours of training; a copy, because LiveTeacher freezes its model
            LiveTeacher(copy.deepcopy(one), mode=teacher.mode, **member.inference)


def check_output(
    spec: ExperimentSpec, device: torch.device, model: nn.Module, who: str, number: int | None = None
) -> int:
    """Run ``model`` on two samples, so that a misfit with the data shows before training.

    ``number`` is that of the teacher's member; ``None``: the model reads the student's inputs.
    """
    full = next(iter(spec.evaluation.test), None)
    if full is None:
        raise DataError("the evaluation data yields no batches", remedy="check its data set and drop_last")
    if number is not None:
        full = full.for_member(number).for_teacher()
    tasks = getattr(model, "tasks", (full.task,))
    if full.task not in tasks:
        raise CapabilityError(
            f"the {who}, a {type(model).__name__}, supports {' and '.join(tasks)}, but the labels are {full.task}",
            remedy="give a function that returns the scores",
        )
    batch = full.rows(0, 2).to(device)
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
            remedy="make model and data agree in image size, channels and input names",
        ) from error
    assert logits is not None
    check_no_new_weights(spec, model, who, batch, logits)
    classes = logits.shape[-1]
    if batch.labels.shape != logits.shape[:-1] or (batch.targets is not None and batch.targets.shape != logits.shape):
        if logits.ndim > 2 and batch.labels.shape == (len(logits), *logits.shape[2:]):
            raise CapabilityError(
                f"the scores of the {who} {tuple(logits.shape)} have the classes on axis 1",
                remedy="pass class_axis=1 to tutelage.distill; in a recipe, use a model with them on the last axis",
            )
        raise CapabilityError(
            f"the shapes do not match: logits of the {who} {tuple(logits.shape)}, labels {tuple(batch.labels.shape)}",
            remedy="labels are class indices, one for each row of logits (or each token)",
        )
    names = spec.evaluation.classes
    if names and classes != len(names):
        raise CapabilityError(
            f"the {who} scores {classes} classes, the data has {len(names)}", remedy="set its number of classes"
        )
    if batch.task == "classes" and full.labels.numel() and int(full.labels.max()) >= classes:
        raise CapabilityError(
            f"the data has a label {int(full.labels.max())}, the {who} scores classes 0 to {classes - 1}",
            remedy="set its number of classes",
        )
    impossible = logits.isneginf()  # a class that a model excludes, such as a token that it never writes
    if bool((~logits.isfinite() & (~impossible | impossible.all(-1, keepdim=True))).any()):
        raise NumericsError(f"the {who}'s logits are NaN or infinite", remedy="check its weights and its inputs")
    return int(classes)


def smallest_batch(batches: Batches, accumulate: int) -> int:
    """The rows of the smallest micro-batch of an epoch, as far as a loader tells; at most 2."""
    if isinstance(batches, PlannedBatches):
        sizes = [len(rows) for rows in batches.split_steps(torch.arange(len(batches.data)))]
    else:
        loader = getattr(batches, "loader", None)
        rows, size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
        if not isinstance(size, int) or not hasattr(rows, "__len__"):
            return 2
        rest = 0 if getattr(loader, "drop_last", False) else len(rows) % size  # type: ignore[arg-type]
        sizes = [size, *([rest] if rest else [])]
    parts = current_rank().world * accumulate
    return max(1, min(2, *(size // parts for size in sizes)))


def check_training_mode(model: nn.Module, example: Batch, who: str, batches: Batches, accumulate: int) -> None:
    """Raise :class:`CapabilityError` if ``model`` cannot run in training mode on its smallest batch.

    Batch norm needs two values for each channel, and some models have layers that only training uses. Buffers and
    random states are restored.
    """
    batch = example.take(torch.arange(smallest_batch(batches, accumulate)) % len(example))
    count, device = len(batch), batch.labels.device
    buffers = {name: x.detach().clone() for name, x in model.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            observe(model.train(), batch.inputs, Needs())
    except (TutelageError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        one = count == 1
        raise CapabilityError(
            f"the {who}, a {type(model).__name__}, cannot train on a batch of {count} sample{'' if one else 's'}: "
            f"{first_line(error)}",
            remedy="choose train.batch_size and train.accumulate so that no batch has a single sample"
            if one
            else "use larger images (data.size) or another model",
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, x in model.named_buffers():
                if name in buffers and buffers[name].shape == x.shape:
                    x.copy_(buffers[name])


def check_trains(spec: ExperimentSpec, device: torch.device, student: nn.Module, method: Method) -> None:
    """:func:`check_training_mode` of the student and of the models that are trained with it."""
    example, accumulate = example_of(spec).to(device), spec.train.accumulate
    arms: tuple[Arm, ...] = ("baseline", "distilled") if spec.baseline else ("distilled",)
    every = {arm: spec.source.training_batches(arm, spec.seeds[0]) for arm in arms}
    for batches in every.values():
        check_training_mode(student.to(device), example, "student", batches, accumulate)
    for name, model in method.auxiliary_models(student).items():
        check_training_mode(model.to(device), example, name, every["distilled"], accumulate)


def check_no_new_weights(
    spec: ExperimentSpec, model: nn.Module, who: str, batch: Batch, logits: torch.Tensor
) -> None:
    """Raise :class:`CapabilityError` if ``logits`` depend on weights of an untrained teacher that no file contains.

    New weights that do not change the logits, such as a pooling layer that the task does not use, are allowed.
    """
    members = () if spec.teacher is None else spec.teacher.members
    member = next((one for one in members if one.name == who), None)
    fresh = set(getattr(model, "fresh", ()))
    new = {name: p for name, p in model.named_parameters() if name in fresh}
    if member is None or member.training is not None or not new:
        return
    before = [p.detach().clone() for p in new.values()]
    with torch.no_grad():
        for p in new.values():
            p.add_(torch.arange(1, p.numel() + 1, device=p.device).view(p.shape) / p.numel())
        changed = observe(model, batch.inputs, Needs()).logits
        for p, value in zip(new.values(), before, strict=True):
            p.copy_(value)
    if changed is not None and torch.equal(changed, logits):
        return
    names = list(new)
    shape = f" for {logits.shape[-1]} classes" if spec.evaluation.classes else ""
    raise CapabilityError(
        f"the weights of the {who} contain no {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}{shape}; "
        "these would be random",
        where="teacher.model",
        remedy="use a model that was trained for this task and these classes, or train it first: "
        "teacher.train={epochs: 3}, with teacher.trainable=head for the new weights alone",
    )


def check_generates(spec: ExperimentSpec, method: Method) -> None:
    """Raise :class:`CapabilityError` when outputs are cached or prefetched for texts that the student generates."""
    teacher = spec.teacher
    if teacher is None or not method.generates_batches:
        return
    for option, where in ((teacher.cache, "teacher.cache"), (teacher.prefetch, "teacher.inference.overlap")):
        if option is not None:
            raise CapabilityError(
                f"{type(method).__name__} trains on texts that the student generates during training; "
                "their teacher outputs cannot be computed ahead",
                where=where,
                remedy="leave it out, or train on the data, with kind: token",
            )


def compares_tokens(method: Method) -> bool:
    """Whether a method, or one of its phases, compares teacher and student token by token."""
    return any(each.compares_tokens for each in all_methods(method))


def check_tokenizers(spec: ExperimentSpec, method: Method) -> None:
    """Raise :class:`CapabilityError` when a method compares tokens, and teacher and student read different ones."""
    if compares_tokens(method) and not spec.source.reads_same_tokens(spec.evaluation.test):
        raise CapabilityError(
            f"{type(method).__name__} compares token by token, and the tokenizers of teacher and student cut the "
            "texts at different places",
            where="method",
            remedy="give the student the teacher's tokenizer (data.tokenizer), or use kind: logit or patient",
        )


def check_optimizer(spec: ExperimentSpec, student: nn.Module, method: Method) -> None:
    """Raise :class:`ConfigError` when the optimizer or the schedule refuses an option."""
    config = spec.train.schedule
    optimizer = build_optimizer(DistillationModule(student, method), spec.train.optimizer)
    schedule = build_schedule(optimizer, config, 1, 1)
    try:
        optimizer.step()  # nothing has a gradient, so nothing moves
        schedule.step()
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"train.schedule: {config.kind} with {config.options}: {error}",
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


def check_labels(spec: ExperimentSpec, teacher: nn.Module | None, student: nn.Module) -> None:
    """Raise :class:`CapabilityError` when class names differ between data, teacher or its members, and student."""
    known: dict[str, list[str] | None] = {}
    if teacher is not None:
        assert spec.teacher is not None
        models = list(teacher) if isinstance(teacher, Ensemble) else [teacher]
        for member, model in zip(spec.teacher.members, models, strict=True):
            known[member.name] = member.card.get("loaded_classes") or label_names(model)
    named = [(who, names) for who, names in known.items() if names is not None]
    for who, names in named[1:]:
        first, others = named[0]
        if names != others:
            raise CapabilityError(
                _first_difference(first, others, who, names),
                where="label map",
                remedy="the members of an ensemble score the same classes in the same order",
            )
    classes = spec.evaluation.classes
    if not classes:
        return
    for who, own in [*known.items(), ("student", label_names(student))]:
        if own is not None and own != classes:
            raise CapabilityError(
                _first_difference(f"the {who}", own, "the data", classes),
                where="label map",
                remedy="the classes are the same in another order: set data.classes to the teacher's order"
                if sorted(own) == sorted(classes)
                else f"use a {who} for these classes",
            )


def _first_difference(who: str, names: list[str], other: str, others: list[str]) -> str:
    if len(names) != len(others):
        return f"{who} has {len(names)} classes, {other} has {len(others)}"
    i = next(i for i, (a, b) in enumerate(zip(names, others, strict=True)) if a != b)
    return f"class {i} is {names[i]!r} in {who} and {others[i]!r} in {other}"


def check_better_than_chance(scores: dict[str, Any], classes: int, ctx: RunContext) -> None:
    """Raise :class:`CapabilityError` when the teacher is worse than chance; warn when it is hardly better."""
    n, accuracy, chance = scores["n"], scores["accuracy"], 1.0 / classes
    if n == 0:
        return
    noise = 3 * math.sqrt(chance * (1 - chance) / n)
    text = f"the teacher's accuracy on the evaluation data is {accuracy:.1%}, chance is {chance:.1%}"
    if accuracy < chance and n * chance >= 3:  # with fewer samples, chance itself often gets none right
        raise CapabilityError(
            text,
            remedy="a student can only learn its mistakes: check the checkpoint, the label order and the "
            "preprocessing (data.mean, data.std, data.size)",
        )
    if accuracy < chance + noise:
        ctx.terminal.say(f"warning: {text} ({n} samples); the student can learn little from this teacher")


def warn_of_precision(accelerator: Accelerator, terminal: Terminal) -> None:
    """Warn when bf16 makes a run slower instead of faster."""
    if is_bf16_slow(accelerator):
        terminal.say(
            "warning: this CPU has no bf16 instructions, and a step can take ten times as long; set "
            "train.precision to auto or no"
        )


def check_method_runs(
    spec: ExperimentSpec, ctx: RunContext, student: nn.Module, method: Method, teacher: Teacher | None
) -> None:
    """Run one forward pass on two samples, in evaluation mode, so that misfits show before the first step."""
    batch = example_of(spec).to(ctx.device)
    student.to(ctx.device).eval()
    dense = set[str]()
    rows = getattr(spec.source.training_batches("distilled", spec.seeds[0]), "data", None)
    longest_prompt = _longest_prompt(rows) if isinstance(rows, TextSet) and rows.task == "causal" else None
    for each in all_methods(method):
        each.to(ctx.device).eval()
        check_task(each, batch)
        with torch.no_grad():
            signal = get_signal(teacher, each, batch)
            seen = Observation() if each.student_needs is None else observe(student, batch.inputs, each.student_needs)
            theirs = None if signal is None else signal.head
            for who, head in (("teacher", theirs), ("student", seen.head)):
                if head is not None and head.is_dense:
                    dense.add(who)
            each(seen, batch, signal)
            each.check_generation(student, batch, longest_prompt)
    for who in sorted(dense):
        ctx.terminal.say(
            f"note: the {who}'s logits are not just its output layer, scale and soft cap; they are computed for all "
            "tokens at once, which takes more memory"
        )


def _longest_prompt(rows: TextSet) -> int:
    """Most tokens before the last tokens of a text that are learned; a quarter of a text that is all learned."""
    tokens = rows.tokens[0]
    begins = ~tokens.special & np.r_[False, tokens.special[:-1]]
    begins[tokens.offsets[:-1][tokens.lengths > 0]] = False
    last = np.maximum.accumulate(np.r_[0, np.flatnonzero(begins)])[np.r_[0, np.cumsum(begins)][tokens.offsets[1:]]]
    prompts = last - tokens.offsets[:-1]
    prompts = np.where(prompts > 1, prompts, np.maximum(tokens.lengths // 4, 1))
    return int(prompts[rows.rows.numpy()].max(initial=0))
