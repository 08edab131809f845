"""``tutelage doctor``: what will go wrong, before it does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tutelage.config import Recipe
from tutelage.data import Batch, Data, ImageData, TextData
from tutelage.data.batch import IGNORE
from tutelage.engine.optim import build_optimizer, build_schedule
from tutelage.errors import DataError, TutelageError
from tutelage.evaluation import evaluate_teacher
from tutelage.experiment.checks import check_labels, check_output, check_separate
from tutelage.experiment.measure import parameters
from tutelage.experiment.run import ONE_VIEW, comparison, load_data
from tutelage.experiment.spec import ExperimentSpec, model_of, prepare_student_and_method, taught_on
from tutelage.experiment.teacher_setup import as_taught, is_taught, open_remote_teacher
from tutelage.experiment.teachers import ModelTeacher
from tutelage.experiment.trainer import get_signal
from tutelage.methods import check_capabilities
from tutelage.methods.base import DistillationModule
from tutelage.multistage.workflows import first_stage
from tutelage.progress import Terminal
from tutelage.taps import find_module
from tutelage.teachers import Teacher


@dataclass(frozen=True)
class Finding:
    """One thing looked at: ``ok``, worth a ``note``, or ``bad`` (the run would fail or be worthless)."""

    level: Literal["ok", "note", "bad"]
    topic: str
    text: str
    remedy: str | None = None


def _bad(topic: str, error: TutelageError) -> Finding:
    """What was raised, with the file or key that it names, unless that is the topic."""
    named = error.where not in (None, "", topic)
    return Finding("bad", topic, f"{error.where}: {error.what}" if named else error.what, error.remedy)


def examine(recipe: Recipe, terminal: Terminal | None = None) -> list[Finding]:
    """Load everything that the recipe names, run one batch, and say what was found.

    Raises:
        TutelageError: something cannot even be loaded; the message is the finding.
    """
    terminal, recipe = terminal or Terminal(), first_stage(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_data(recipe, terminal)
    c = comparison(recipe, data)
    found = look_at_data(recipe, data)
    untrained = None if c.teacher is None else c.teacher()
    c = c.beside(untrained)
    student = c.student(recipe.seeds[0]).to(device)
    teacher = None if untrained is None else as_taught(c, untrained, device, learned=False)

    def passes(topic: str, text: str, check: object) -> None:
        try:
            check()  # type: ignore[operator]
            found.append(Finding("ok", topic, text))
        except TutelageError as error:  # a broken image is the data's fault, whichever model met it
            finding = _bad("data" if isinstance(error, DataError) else topic, error)
            if finding not in found:
                found.append(finding)

    passes(
        "label map",
        f"{len(data.classes)} classes, the same everywhere",
        lambda: check_labels(c, model_of(teacher), student),
    )
    teachers = {} if teacher is None else {"teacher": teacher.model}
    if c.ensemble is not None and teacher is not None:
        teachers = {m.name: x for m, x in zip(c.ensemble.members, list(teacher.model.children()), strict=True)}
    for who, model in {**teachers, "student": student}.items():
        passes(
            who,
            f"takes the {things_of(data)}" + (f" and scores {len(data.classes)} classes" if data.classes else ""),
            lambda who=who, model=model: check_output(c, device, model, who),
        )
    if any(f.level == "bad" for f in found):
        return found
    try:
        student, method = prepare_student_and_method(c, student, model_of(teacher), recipe.seeds[0])
        student.to(device)
        method.to(device)
    except TutelageError as error:
        return [*found, Finding("bad", "method", str(error).partition("\n")[0], error.remedy)]
    found.append(Finding("ok", "method", f"loss = {method.formula()}"))
    if c.remote_teacher is not None:  # it is asked for a little, and not trained with
        classes = check_output(c, device, student, "student")

        def answers() -> None:
            with open_remote_teacher(c, terminal, method, classes):
                pass

        passes("teacher", "its server cuts texts as the student does, and gives what the method needs", answers)
        return found
    if teacher is not None:
        passes("separation", "teacher and student share no weight", lambda: check_separate(teacher.model, student))
    passes(
        "capabilities",
        f"the teacher gives what {recipe.method.kind} needs" if is_taught(method) else "the method asks no teacher",
        lambda: check_capabilities(method, teacher),
    )
    if recipe.data.views == 1:
        found.append(Finding("note", "views", ONE_VIEW))
    taught = model_of(teacher)
    if taught is not None:
        for path in method.needs.hidden if method.needs else ():
            passes("teacher tap", path, lambda path=path, model=taught: find_module(model, path))
    for path in method.student_needs.hidden if method.student_needs else ():
        passes("student tap", path, lambda path=path: find_module(student, path))
    if teacher is not None and recipe.teacher is not None:
        found.append(capacity(parameters(student), parameters(teacher.model)))
    if teacher is None or recipe.teacher is None:
        found.append(Finding("ok", "teacher", "there is none, and none is needed"))
    elif all(member.train is None for member in recipe.teacher.each):
        found.append(teacher_quality(c, teacher, device, len(data.classes) or None))
    else:
        found.append(
            Finding("ok", "teacher", "has no weights yet: the run trains it first, then checks it against chance")
        )
    if any(f.level == "bad" for f in found):
        return found
    try:
        found += one_step(recipe, c, data, DistillationModule(student, method), teacher, device)
    except TutelageError as error:
        found.append(_bad("one batch", error))
    return found


def things_of(data: Data) -> str:
    """What samples are called."""
    return "texts" if isinstance(data, TextData) else "images"


def look_at_data(recipe: Recipe, data: Data) -> list[Finding]:
    """Sizes, balance and batch statistics."""
    labels = data.train.labels[data.train.labels != IGNORE]
    counts = torch.bincount(labels, minlength=len(data.classes))
    things = things_of(data)
    sizes = (
        f"{len(data.train)} training {things} ({len(labels)} labelled), "
        f"{len(data.validation)} validation, {len(data.test)} test"
    )
    found = [Finding("ok", "data", f"{sizes}; {data.summary()}")]
    if data.task == "classes":
        found.append(balance(counts, things))
    rows = torch.arange(min(len(data.train), 256))
    try:
        x = data.train.fetch(rows).check_finite().inputs
    except TutelageError as error:
        return [*found, Finding("bad", "batch", str(error), error.remedy)]
    found += look_at_texts(data) if isinstance(data, TextData) else look_at_images(data, x)
    if recipe.train.batch_size > len(data.train):
        found.append(
            Finding("note", "batch size", f"{recipe.train.batch_size} is more than all {len(data.train)} {things}",
                    "lower train.batch_size: an epoch is a single step")
        )  # fmt: skip
    return found


def balance(counts: torch.Tensor, things: str) -> Finding:
    """How many of each class have a label."""
    low, high = int(counts.min()), int(counts.max())
    if high > 3 * max(low, 1):
        return Finding(
            "note", "balance", f"classes have {low} to {high} labelled {things}", "read per-class accuracy"
        )
    return Finding("ok", "balance", f"{low} to {high} labelled {things} a class")


def look_at_texts(data: TextData) -> list[Finding]:
    """How long they are, and how many lose their ends."""
    lengths = data.train.lengths
    full = float((lengths >= data.max_length).float().mean())
    middle = float(lengths.float().median())
    text = f"{middle:.0f} tokens in the middle, {full:.0%} have all {data.max_length} or lost more"
    cut = full > 0.5 and not data.settings["pack"]
    return [Finding("note", "length", text, "raise data.max_length") if cut else Finding("ok", "length", text)]


def look_at_images(data: ImageData, x: Any) -> list[Finding]:
    """Whether splits are apart, and images are normalised."""
    found: list[Finding] = []
    overlap = len(set(data.train.ids.tolist()) & set(data.test.ids.tolist())) if data.train.open is not None else 0
    if overlap:
        found.append(Finding("bad", "splits", f"{overlap} images are in training and test", "separate them"))
    assert isinstance(x, torch.Tensor)
    mean, std = float(x.mean()), float(x.std())
    text = f"mean {mean:.2f}, standard deviation {std:.2f}, range {float(x.min()):.2f} to {float(x.max()):.2f}"
    odd = abs(mean) > 1 or not 0.3 < std < 3
    found.append(
        Finding("note", "batch", f"{text}; expected about 0 and 1", "check data.mean and data.std") if odd
        else Finding("ok", "batch", text)
    )  # fmt: skip
    return found


def capacity(student: int, teacher: int) -> Finding:
    """The capacity ratio, with the advice that goes with it."""
    r = student / teacher
    text = f"r = student / teacher parameters = {student:,} / {teacher:,} = {r:.4f}"
    if r >= 1:
        return Finding(
            "note", "capacity", f"{text}: the student is not smaller", "it will cost as much as its teacher"
        )
    if r > 0.1:
        return Finding("ok", "capacity", f"{text}: above 0.1, where distillation is said to work well")
    if r >= 0.01:
        return Finding("ok", "capacity", f"{text}: between 0.01 and 0.1, where it depends on the task")
    return Finding(
        "note", "capacity", f"{text}: below 0.01, where a capacity gap is said to show",
        "try a larger student, or an assistant of a size in between as its teacher",
    )  # fmt: skip


def teacher_quality(c: ExperimentSpec, teacher: Teacher, device: torch.device, classes: int | None) -> Finding:
    """How good the teacher is on validation; of classes, against chance."""
    scores = evaluate_teacher(teacher, c.validation if c.validation is not None else c.test, device)
    text = f"validation {c.metric} {scores[c.metric]:.1%}, loss {scores['loss']:.3f}"
    if "ece" in scores:
        text += f", ECE {scores['ece']:.3f}"
    if classes is not None and "ece" in scores and scores["accuracy"] <= 1 / classes:
        return Finding("bad", "teacher", f"{text}: not better than chance, {1 / classes:.1%}",
                       "check the checkpoint, the label order and data.mean / data.std")  # fmt: skip
    return Finding("ok", "teacher", text)


def one_step(
    recipe: Recipe,
    c: ExperimentSpec,
    data: Data,
    module: DistillationModule,
    teacher: ModelTeacher | None,
    device: torch.device,
) -> list[Finding]:
    """Three optimizer steps on a throw-away student: finite terms, time and memory."""
    from tutelage.data import RankSlice

    config = recipe.train
    batches = taught_on(c, module.method, recipe.seeds[0])
    optimizer = build_optimizer(module, config.optimizer)
    epoch = c.batches("distilled", recipe.seeds[0]).steps_per_epoch
    total = config.steps or (config.epochs or 1) * epoch
    build_schedule(optimizer, config.schedule, total, epoch)
    module.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    values: dict[str, float] = {}
    for step, micros in enumerate(batches.epoch(0, RankSlice(accumulate=config.accumulate))):
        start = time.perf_counter()
        for micro in micros:
            values = _step(module, teacher, micro.to(device))
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        if step == 2:
            break
    shown = ", ".join(f"{k} {v:.3g}" for k, v in values.items())
    finite = all(abs(v) < float("inf") for v in values.values())
    found = [
        Finding("ok", "one batch", f"terms: {shown}") if finite
        else Finding("bad", "one batch", f"a term is not finite: {shown}", "check the data")
    ]  # fmt: skip
    arms = 2 if recipe.baseline else 1
    seconds = min(times) * total * len(recipe.seeds) * arms
    parts = f"{total} steps x {len(recipe.seeds)} seeds x {arms} students at {1000 * min(times):.1f} ms"
    aside = "" if teacher is None else ", teacher's training aside"
    found.append(Finding("ok", "time", f"at most about {_duration(seconds)} on this machine for {parts}{aside}"))
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    state = sum(
        v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)
    )
    held = 2 * weights + state
    if teacher is not None:
        held += sum(p.numel() * p.element_size() for p in teacher.model.parameters())
    peak = f", {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB at the peak" if device.type == "cuda" else ""
    beside = ""
    if isinstance(data, ImageData):
        images = sum(s.pixels.numel() for s in (data.train, data.validation, data.test) if s.pixels is not None)
        beside = f"; {images / 2**20:.1f} MiB of images"
    found.append(
        Finding("ok", "memory", f"{held / 2**20:.1f} MiB of weights, gradients and optimizer state{peak}{beside}")
    )
    return found


def _step(module: DistillationModule, teacher: Teacher | None, batch: Batch) -> dict[str, float]:
    terms = module(batch, get_signal(teacher, module.method, batch))
    means = {name: term.sum / term.count.clamp(min=1) for name, term in terms.items()}
    sum(module.method.weights[name] * mean for name, mean in means.items()).backward()
    return {name: float(mean.detach()) for name, mean in means.items()}


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
