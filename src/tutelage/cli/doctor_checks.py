"""The checks of ``tutelage doctor``."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from tutelage.cli.time_estimate import estimate_seconds, time_training
from tutelage.config import Recipe
from tutelage.data import Data, ImageData, TextData
from tutelage.data.batch import IGNORE
from tutelage.engine.optim import build_optimizer, build_schedule
from tutelage.errors import DataError, TutelageError
from tutelage.evaluation import evaluate_teacher
from tutelage.experiment import prepare
from tutelage.experiment.checks import (
    check_labels,
    check_output,
    check_separate,
    check_tokenizers,
    check_trains,
    compares_tokens,
)
from tutelage.experiment.measure import parameters
from tutelage.experiment.quantised_speed import slow_types
from tutelage.experiment.recipe_source import ONE_VIEW, load_data, recipe_spec
from tutelage.experiment.save_check import check_saves
from tutelage.experiment.spec import ExperimentSpec, ModelTeacher
from tutelage.experiment.teacher_setup import build_live_teacher, open_remote_teacher
from tutelage.methods import Method, check_capabilities
from tutelage.methods.base import DistillationModule
from tutelage.multistage.run import first_stage
from tutelage.progress import Terminal
from tutelage.students import describe_adapters, has_adapters
from tutelage.taps import find_module
from tutelage.teachers import Teacher


@dataclass(frozen=True)
class Finding:
    """The result of one check: ``ok``, a ``note``, or ``bad`` (the run would fail or be worthless)."""

    level: Literal["ok", "note", "bad"]
    topic: str
    text: str
    remedy: str | None = None


class Findings(list[Finding]):
    """The results of the checks of a recipe, in order."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.started = recipe, time.monotonic()

    def add(self, level: Literal["ok", "note", "bad"], topic: str, text: str, remedy: str | None = None) -> None:
        """Append a finding."""
        self.append(Finding(level, topic, text, remedy))

    def add_error(self, topic: str, error: TutelageError) -> None:
        """Append an error, with the file or key that it names."""
        self.recipe.locate(error)
        named = error.where not in (None, "", topic)
        finding = Finding("bad", topic, f"{error.where}: {error.what}" if named else error.what, error.remedy)
        if finding not in self:
            self.append(finding)

    def check(self, topic: str, text: str, call: Callable[[], object]) -> None:
        """Append ``text`` if the call succeeds, else its error; an error in the data gets the topic "data"."""
        try:
            call()
            self.add("ok", topic, text)
        except TutelageError as error:
            self.add_error("data" if isinstance(error, DataError) else topic, error)

    @property
    def has_errors(self) -> bool:
        """Whether some check failed."""
        return any(f.level == "bad" for f in self)


def examine(recipe: Recipe, terminal: Terminal | None = None) -> Findings:
    """Load everything that the recipe names, run a few steps, and report the results.

    Raises:
        TutelageError: something cannot be loaded.
    """
    findings = Findings(recipe)
    with recipe.locating():
        _examine(findings, first_stage(recipe), terminal or Terminal())
    return findings


def _examine(findings: Findings, recipe: Recipe, terminal: Terminal) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_data(recipe, terminal)
    spec = recipe_spec(recipe, data)
    check_data(findings, recipe, data)
    untrained = prepare.build_teacher(spec)
    spec = prepare.bind_teacher(spec, untrained)
    initial = spec.source.build_student(recipe.seeds[0]).to(device)
    teacher = None if untrained is None else build_live_teacher(spec, untrained, device, fit_weights=False)
    check_models(findings, spec, data, teacher, initial, device)
    if findings.has_errors:
        return
    try:
        student, method = prepare.prepare_student_and_method(
            spec, initial, prepare.model_of(teacher), recipe.seeds[0]
        )
        student.to(device)
        method.to(device)
    except TutelageError as error:
        findings.add_error("method", error)
        return
    findings.add("ok", "method", f"loss = {method.formula()}")
    for pair in method.describe_pairs():
        findings.add("ok", "pair", pair)
    if has_adapters(student):
        findings.add("ok", "LoRA", describe_adapters(student))
    saving = partial(check_saves, spec, student, initial, method, prepare.model_of(teacher))
    findings.check("saving", "the trained models can be saved and loaded", saving)
    if spec.teacher is not None and spec.teacher.is_remote:  # a server gets a few requests and no training steps
        classes = check_output(spec, device, student, "student")

        def connect() -> None:
            with open_remote_teacher(spec, terminal, method, classes):
                pass

        findings.check(
            "teacher", "its server tokenises as the student does and returns what the method needs", connect
        )
        return
    check_method(findings, recipe, teacher, student, method)
    for line in slow_types(spec, prepare.model_of(teacher), student, device):
        findings.add("note", "speed", line)
    text = "the student runs in training mode on its smallest batch"
    findings.check("training", text, partial(check_trains, spec, device, student, method))
    if compares_tokens(method):
        findings.check("tokens", "teacher and student read the same tokens", partial(check_tokenizers, spec, method))
    if teacher is None or recipe.teacher is None:
        findings.add("ok", "teacher", "the recipe has no teacher, and the method needs none")
    else:
        check_capacity(findings, parameters(student), parameters(teacher.model))
        if all(member.train is None for member in recipe.teacher.each):
            check_teacher_quality(findings, spec, teacher, device, len(data.classes) or None)
        else:
            findings.add("ok", "teacher", "has no weights yet: the run trains it first, then compares it with chance")
    if not findings.has_errors:
        try:
            check_steps(findings, recipe, spec, data, DistillationModule(student, method), teacher, device)
        except TutelageError as error:
            findings.add_error("one batch", error)


def check_data(findings: Findings, recipe: Recipe, data: Data) -> None:
    """Check sizes, class balance and batch statistics."""
    labels = data.train.labels[data.train.labels != IGNORE]
    things = _samples_of(data)
    sizes = (
        f"{len(data.train)} training {things} ({len(labels)} labelled), "
        f"{len(data.validation)} validation, {len(data.test)} test"
    )
    findings.add("ok", "data", f"{sizes}; {data.summary()}")
    if data.task == "classes":
        counts = torch.bincount(labels, minlength=len(data.classes))
        low, high = int(counts.min()), int(counts.max())
        if high > 3 * max(low, 1):
            text = f"classes have {low} to {high} labelled {things}"
            findings.add("note", "balance", text, "read the per-class accuracy")
        else:
            findings.add("ok", "balance", f"{low} to {high} labelled {things} per class")
    try:
        x = data.train.fetch(torch.arange(min(len(data.train), 256))).check_finite().inputs
    except TutelageError as error:
        findings.add_error("batch", error)
        return
    if isinstance(data, TextData):
        check_texts(findings, data)
    else:
        check_images(findings, data, x)
    if recipe.train.batch_size > len(data.train):
        text = f"{recipe.train.batch_size} is more than all {len(data.train)} {things}"
        findings.add("note", "batch size", text, "lower train.batch_size: an epoch is a single step")


def _samples_of(data: Data) -> str:
    return "texts" if isinstance(data, TextData) else "images"


def check_texts(findings: Findings, data: TextData) -> None:
    """Check how long the texts are, and how many are truncated."""
    lengths = data.train.lengths
    full = float((lengths >= data.max_length).float().mean())
    median = float(lengths.float().median())
    text = f"{median:.0f} tokens (median); {full:.0%} have {data.max_length}, the maximum, or were truncated to it"
    if full > 0.5 and not data.settings["pack"]:
        findings.add("note", "length", text, "raise data.max_length")
    else:
        findings.add("ok", "length", text)
    for who, prompts in zip(("student", "teacher"), data.prompts, strict=True):
        if any(prompts):
            findings.add("ok", "prompts", f"the {who}'s prompt before each text: {', '.join(map(repr, prompts))}")


def check_images(findings: Findings, data: ImageData, x: Any) -> None:
    """Check that the splits share no image, and that images are normalised."""
    is_folder = data.name == "imagefolder"  # ids of other sources count the images of each split
    overlap = len(set(data.train.ids.tolist()) & set(data.test.ids.tolist())) if is_folder else 0
    if overlap:
        findings.add("bad", "splits", f"{overlap} images are in training and test", "separate them")
    assert isinstance(x, torch.Tensor)
    mean, std = float(x.mean()), float(x.std())
    text = f"mean {mean:.2f}, standard deviation {std:.2f}, range {float(x.min()):.2f} to {float(x.max()):.2f}"
    if abs(mean) > 1 or not 0.3 < std < 3:
        findings.add("note", "batch", f"{text}; expected about 0 and 1", "check data.mean and data.std")
    else:
        findings.add("ok", "batch", text)
    for line in data.notes:
        findings.add("note" if "but the recipe" in line else "ok", "images", line)


def check_models(
    findings: Findings,
    spec: ExperimentSpec,
    data: Data,
    teacher: ModelTeacher | None,
    student: nn.Module,
    device: torch.device,
) -> None:
    """Check the label maps, and run every model on a batch."""
    text = f"{len(data.classes)} classes, the same for data, teacher and student"
    findings.check("label map", text, lambda: check_labels(spec, prepare.model_of(teacher), student))
    models = [] if teacher is None else [("teacher", teacher.model, 0)]
    if spec.teacher is not None and spec.teacher.ensemble is not None and teacher is not None:
        members = zip(spec.teacher.members, teacher.model.children(), strict=True)
        models = [(member.name, one, number) for number, (member, one) in enumerate(members)]
    text = f"its input fits the {_samples_of(data)}" + (
        f"; it has {len(data.classes)} classes" if data.classes else ""
    )
    for who, model, number in [*models, ("student", student, None)]:
        findings.check(who, text, partial(check_output, spec, device, model, who, number))


def check_method(
    findings: Findings, recipe: Recipe, teacher: ModelTeacher | None, student: nn.Module, method: Method
) -> None:
    """Check that teacher, student and method fit each other."""
    if teacher is not None:
        model = teacher.model
        findings.check("separation", "teacher and student share no weight", lambda: check_separate(model, student))
    findings.check(
        "capabilities",
        f"the teacher gives what {recipe.method.kind} needs"
        if prepare.needs_teacher(method)
        else "the method needs no teacher",
        lambda: check_capabilities(method, teacher),
    )
    if recipe.data.views == 1:
        findings.add("note", "views", ONE_VIEW)
    for topic, owner, needs in (
        ("teacher tap", prepare.model_of(teacher), method.needs), ("student tap", student, method.student_needs),
    ):  # fmt: skip
        if owner is not None and needs:
            for path in needs.hidden:
                findings.check(topic, path, partial(find_module, owner, path))


def check_capacity(findings: Findings, student: int, teacher: int) -> None:
    """Report the ratio of the parameter counts."""
    r = student / teacher
    text = f"r = student / teacher parameters = {student:,} / {teacher:,} = {r:.4f}: "
    if r >= 1:
        remedy = "choose a smaller student: this one needs as much computation as its teacher"
        findings.add("note", "capacity", text + "the student is not smaller", remedy)
    elif r >= 0.01:
        advice = "above 0.1, where distillation usually works well"
        advice = advice if r > 0.1 else "between 0.01 and 0.1, where it depends on the task"
        findings.add("ok", "capacity", text + advice)
    else:
        remedy = "try a larger student, or an assistant of a size in between as its teacher"
        findings.add("note", "capacity", text + "below 0.01, where a capacity gap is common", remedy)


def check_teacher_quality(
    findings: Findings, spec: ExperimentSpec, teacher: Teacher, device: torch.device, classes: int | None
) -> None:
    """Evaluate the teacher on validation; compare a classifier with chance."""
    evaluation, metric = spec.evaluation, spec.evaluation.metric
    split = evaluation.validation if evaluation.validation is not None else evaluation.test
    scores = evaluate_teacher(teacher, split, device)
    text = f"validation {metric} {scores[metric]:.1%}, loss {scores['loss']:.3f}"
    if "ece" in scores:
        text += f", ECE {scores['ece']:.3f}"
    if classes is not None and "ece" in scores and scores["accuracy"] <= 1 / classes:
        text += f": not better than chance, {1 / classes:.1%}"
        findings.add("bad", "teacher", text, "check the checkpoint, the label order and data.mean / data.std")
    else:
        findings.add("ok", "teacher", text)


def check_steps(
    findings: Findings,
    recipe: Recipe,
    spec: ExperimentSpec,
    data: Data,
    module: DistillationModule,
    teacher: ModelTeacher | None,
    device: torch.device,
) -> None:
    """Do the parts of a run on a throw-away student; check the terms, report time and memory."""
    method, seed = module.method, recipe.seeds[0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    optimizer = build_optimizer(module, recipe.train.optimizer)
    epoch = spec.source.training_batches("distilled", seed).steps_per_epoch
    training = time_training(module, teacher, prepare.training_batches(spec, method, seed), recipe.train, epoch)
    build_schedule(optimizer, recipe.train.schedule, training.steps, epoch)
    terms = ", ".join(f"{k} {v:.3g}" for k, v in training.terms.items())
    if all(abs(v) < float("inf") for v in training.terms.values()):
        findings.add("ok", "one batch", f"terms: {terms}")
    else:
        findings.add("bad", "one batch", f"a term is not finite: {terms}", "check the data")
    parts = estimate_seconds(recipe, spec, module, training, teacher, device)
    parts["start"] = time.monotonic() - findings.started
    listed = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in parts.items() if seconds >= 1)
    text = f"about {_duration(sum(parts.values()))} on this machine" + (f": {listed}" if listed else "")
    steps = f"{training.steps} steps x {len(recipe.seeds)} seeds x {2 if recipe.baseline else 1} students"
    findings.add("ok", "time", f"{text} ({steps}; {1000 * training.step:.1f} ms per distillation step)")
    findings.add("ok", "memory", _memory(module, optimizer, teacher, data, device))


def _memory(
    module: DistillationModule,
    optimizer: torch.optim.Optimizer,
    teacher: ModelTeacher | None,
    data: Data,
    device: torch.device,
) -> str:
    def size(tensors: Iterable[torch.Tensor]) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    total = 2 * size(module.parameters())
    total += size(v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))
    total += 0 if teacher is None else size(teacher.model.parameters())
    text = f"{total / 2**20:.1f} MiB of weights, gradients and optimizer state"
    if device.type == "cuda":
        text += f", {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB at the peak"
    if isinstance(data, ImageData):
        images = size(s.pixels for s in (data.train, data.validation, data.test) if s.pixels is not None)
        text += f"; {images / 2**20:.1f} MiB of images"
    return text


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
