"""``tutelage run``: from a recipe to a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutelage.config import (
    TAUGHT_ONLY,
    UNLABELLED,
    LowRankConfig,
    MemberConfig,
    MethodOptions,
    ModelConfig,
    Recipe,
    TeacherConfig,
    dump_recipe,
)
from tutelage.data import Data, ImageData, PlannedBatches, SequentialBatches, TextData, load_images
from tutelage.data.batch import IGNORE, LABELS
from tutelage.engine import Accelerator, from_main, make_accelerator, tracking
from tutelage.errors import ConfigError, RunDirectoryError
from tutelage.evaluation.harness import harness
from tutelage.experiment.caching import open_cache
from tutelage.experiment.checks import warn_of_precision
from tutelage.experiment.compare import compare
from tutelage.experiment.open_run import choose_run_directory, open_run_directory
from tutelage.experiment.sample_predictions import pictured, worded
from tutelage.experiment.spec import Arm, ExperimentSpec, RunContext
from tutelage.experiment.teachers import EnsemblePlan, Member, live_options, prefetch_mode, routes
from tutelage.experiment.texts import as_the_teacher_reads, facts, load_text_data, students_of, with_tokenizer
from tutelage.methods import METHODS, MaskedMethod, Method, SequenceMethod, SupervisedMethod
from tutelage.models import MODEL_CARD, ModelSpec, build, load_weights
from tutelage.models.files import read_card
from tutelage.progress import Terminal
from tutelage.signals import stopping
from tutelage.students import add_fake_quantisers, add_lora
from tutelage.teachers import RemoteTeacher

ONE_VIEW = (
    "data.views: 1 shows every image in one augmented view again and again; distillation gains from many views that "
    "the teacher sees too (Beyer et al., 2022): set data.views to 10 or more"
)


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and its summary."""

    path: Path
    summary: dict[str, Any]


def run_recipe(
    recipe: Recipe, *, out: str | Path | None = None, resume: bool = False, terminal: Terminal | None = None
) -> RunResult:
    """Train the teacher if it has no weights, the baseline student and the distilled student, and compare.

    Args:
        recipe: what to run.
        out: the run directory. Default: the first free of ``runs/NAME``, ``runs/NAME-2`` ...
        resume: go on with the run in that directory.
        terminal: where progress is shown.

    Raises:
        TutelageError: one of its subclasses, with the remedy.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """
    if recipe.workflow is not None:
        raise ConfigError(f"workflow {recipe.workflow.kind!r} is not a single run", remedy="tutelage.api.run runs it")
    path, accelerator, terminal = prepared(recipe, out, resume, terminal)
    return run_data(recipe, None, path, resume=resume, terminal=terminal, accelerator=accelerator)


def prepared(
    recipe: Recipe, out: str | Path | None, resume: bool, terminal: Terminal | None
) -> tuple[Path, Accelerator, Terminal]:
    """The folder of a run, the same for all processes; this process's accelerator; and where it shows progress."""
    accelerator = make_accelerator(recipe.train.precision, list(recipe.train.trackers))
    path = from_main(accelerator, lambda: choose_run_directory(out, recipe.name, resume))
    terminal = terminal or Terminal()
    terminal.speaks = terminal.speaks and accelerator.is_main_process
    terminal.live = terminal.live and accelerator.is_main_process
    warn_of_precision(accelerator, terminal)
    return path, accelerator, terminal


def run_data(
    recipe: Recipe,
    data: Data | None,
    path: Path,
    *,
    resume: bool,
    terminal: Terminal,
    accelerator: Accelerator | None = None,
) -> RunResult:
    """:func:`run_recipe` in a folder, on data that somebody read already, or ``None``."""
    accelerator = accelerator or make_accelerator(recipe.train.precision, list(recipe.train.trackers))
    with open_run_directory(path, dump_recipe(recipe), resume=resume, main=accelerator.is_main_process) as run:
        if run.summary.exists():
            terminal.say(f"{path} is finished; showing what it found")
            return RunResult(path, read_summary(run.summary))
        many = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
        terminal.say(f"run directory: {path}{many}")
        data = data or load_data(recipe, terminal)
        tracked = tracking(accelerator, path / "trackers", {"recipe": dump_recipe(recipe)})
        with stopping(terminal.say) as should_stop, tracked:
            summary = compare(comparison(recipe, data), RunContext(accelerator, run, terminal, should_stop))
    return RunResult(path, summary)


def read_summary(path: Path) -> dict[str, Any]:
    """What a finished run or workflow found.

    Raises:
        RunDirectoryError: the file is damaged.
    """
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirectoryError(
            f"is damaged: {error}", where=str(path), remedy="delete this file; --resume then writes it again"
        ) from None
    return summary


def load_data(recipe: Recipe, terminal: Terminal) -> Data:
    """The data of a recipe."""
    return LOADERS[recipe.data.kind](recipe, terminal)


def _load_images(recipe: Recipe, terminal: Terminal) -> ImageData:
    fields = recipe.data.model_dump(exclude={"kind", "workers", "views"})
    if recipe.data.views == 1:
        terminal.say(f"note: {ONE_VIEW}")
    augment = None if recipe.teacher is None else recipe.teacher.augment
    return load_images(**fields, teacher_augment=augment, progress=terminal.iterate)


LOADERS: dict[str, Callable[[Recipe, Terminal], Data]] = {"images": _load_images, "texts": load_text_data}
"""By the kind of data."""


def comparison(recipe: Recipe, data: Data) -> ExperimentSpec:
    """The comparison that a recipe asks for on its data."""
    labelled: Any = data.train
    if data.task not in UNLABELLED:
        labelled = replace(data.train, mix_augments=()).select((data.train.labels != IGNORE).nonzero().flatten())
    sets = {"baseline": labelled, "distilled": data.train}
    size, workers = recipe.train.batch_size, recipe.data.workers

    def batches(arm: Arm, seed: int) -> PlannedBatches:
        return PlannedBatches(sets[arm], size, seed, workers, recipe.data.views)

    aside = decoding(recipe, data)
    facts = facts_of(data)
    initial: dict[str, Any]
    if recipe.student.model == "teacher":
        assert isinstance(data, TextData)
        initial = {
            "student": partial(cut_untrained, recipe, data),
            "students_of": partial(students_of, recipe.student, data),
            "student_card": facts,
        }
    else:
        spec = model_spec(recipe.student, data)
        initial = {
            "student": partial(build_model, recipe.student, spec, data),
            "student_card": {"spec": spec.to_dict(), **facts},
        }
    if recipe.student.lora is not None:
        initial = changed(partial(with_adapters, recipe.student.lora), initial)
    if recipe.student.qat is not None:
        initial = changed(lambda model, seed: add_fake_quantisers(model), initial)
    return ExperimentSpec(
        name=recipe.name,
        method=method_factory(recipe),
        batches=batches,
        config=recipe.train,
        validation=SequentialBatches(data.validation, workers=aside),
        test=SequentialBatches(data.test, workers=aside),
        seeds=recipe.seeds,
        baseline=recipe.baseline,
        remember=None if data.train.is_augmented else SequentialBatches(data.train, workers=aside),
        remember_rows=len(data.train),
        classes=data.classes,
        supervised=supervised(data),
        metric=str(recipe.data.metric),
        compared=data.task in TAUGHT_ONLY,
        peer=partial(build_peer, recipe, data),
        peer_card=lambda asked: {"spec": model_spec(peer_config(recipe, asked), data).to_dict()},
        samples=recipe.samples,
        show=worded(data.tokenizer) if isinstance(data, TextData) else pictured(data.test.mean, data.test.std),
        tokenizers=writers(data),
        harness=None if recipe.evaluate is None else harness(recipe.evaluate, getattr(data, "tokenizer", None)),
        **initial,
        **of_teacher(recipe, data, facts),
    )


def writers(data: Data) -> tuple[Any, Any] | None:
    """The tokenizers of student and teacher, where they write texts."""
    if not isinstance(data, TextData) or data.task != "causal":
        return None
    return data.tokenizer, as_the_teacher_reads(data).tokenizer


def changed(change: Callable[[nn.Module, int], nn.Module], initial: dict[str, Any]) -> dict[str, Any]:
    """The same students, each as ``change`` makes it of a student and its seed."""

    def made(student: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
        return lambda seed: change(student(seed), seed)

    found = {**initial, "student": made(initial["student"])}
    if "students_of" in initial:
        found["students_of"] = lambda teacher: made(initial["students_of"](teacher))
    return found


def with_adapters(config: LowRankConfig, model: nn.Module, seed: int) -> nn.Module:
    """The same student, of which low-rank adapters learn alone."""
    return add_lora(model, **config.model_dump(), seed=seed)


def decoding(recipe: Recipe, data: Data) -> int:
    """Processes that fetch what is evaluated: none for images that are in memory."""
    return recipe.data.workers if isinstance(data, TextData) or data.test.pixels is None else 0


def facts_of(data: Data) -> dict[str, Any]:
    """What the folder of a model says of it."""
    if isinstance(data, TextData):
        return facts(data)
    return {"classes": data.classes, "preprocessing": data.preprocessing(), "kind": "image-classifier"}


def supervised(data: Data) -> Callable[[], Method]:
    """Learns from the data alone."""
    return SUPERVISED.get(data.task) or partial(SupervisedMethod, task=LABELS[data.task])


SUPERVISED: dict[str, Callable[[], Method]] = {"mlm": MaskedMethod, "causal": SequenceMethod}
"""What learns from the data alone, where scores are of a vocabulary."""


def cut_untrained(recipe: Recipe, data: TextData, seed: int) -> nn.Module:
    """A student cut from its teacher as that is before any training."""
    member = teacher_member(recipe, recipe.required_teacher, 0, data, facts_of(data))
    return students_of(recipe.student, data, member.model())(seed)


def peer_config(recipe: Recipe, asked: ModelConfig | None) -> ModelConfig:
    """The model that a method asks for beside the student; of the student's architecture where it says no other."""
    return recipe.student if asked is None else asked


def build_peer(recipe: Recipe, data: Data, asked: ModelConfig | None, seed: int) -> nn.Module:
    """Its initialisation."""
    config = peer_config(recipe, asked)
    return build_model(config, model_spec(config, data), data, seed, where="method.peers")


def of_teacher(recipe: Recipe, data: Data, facts: dict[str, Any]) -> dict[str, Any]:
    """What of a comparison is about its teacher."""
    t = recipe.teacher
    if t is None:
        return {"teacher": None}
    if t.endpoint is not None:
        cache = None if t.cache is None else partial(open_cache, recipe, data)
        return {"teacher": None, "remote_teacher": partial(build_remote_teacher, recipe, data), "cache": cache}
    members = [teacher_member(recipe, t, i, data, facts) for i in range(len(t.each))]
    shared = {
        "teacher_mode": t.mode,
        "prefetch": prefetch_mode(t.inference),
        "cache": None if t.cache is None else partial(open_cache, recipe, data),
    }
    if t.members is None:
        only = members[0]
        single = {"teacher": only.model, "train_teacher": only.train, "teacher_card": dict(only.card)}
        return {**shared, **single, "inference": only.inference, "head_only": only.head_only}
    route = None if t.route is None else routes(t.route, data.route_names)
    plan = EnsemblePlan(members, t.combine or "probabilities", t.weights, t.average_temperature or 1.0, route)
    return {**shared, "teacher": plan.untrained, "ensemble": plan}


def build_remote_teacher(recipe: Recipe, data: Data, classes: int) -> RemoteTeacher:
    """The teacher behind a server, once it has answered; ``classes`` is the student's vocabulary."""
    endpoint = recipe.required_teacher.endpoint
    assert endpoint is not None
    assert isinstance(data, TextData)
    options = endpoint.model_dump(exclude={"kind"})
    return RemoteTeacher(
        **options, server=endpoint.kind, classes=classes, tokenizer=data.tokenizer, longest=data.max_length
    )


def teacher_member(recipe: Recipe, teacher: TeacherConfig, number: int, data: Data, facts: dict[str, Any]) -> Member:
    """A teacher of the recipe; each has a seed of its own, so that two of the same kind differ."""
    config, many = teacher.each[number], teacher.members is not None
    name = f"teacher-{number}" if many else "teacher"
    seed = recipe.seeds[0] + number if config.seed is None else config.seed
    where = f"teacher.members.{number}" if many else "teacher"
    spec = model_spec(config, data)
    train = None
    if config.train is not None:
        batches = PlannedBatches(data.for_teacher, config.train.batch_size, seed, recipe.data.workers)
        train = (config.train, batches, seed)
    read = as_the_teacher_reads(data) if isinstance(data, TextData) else data
    return Member(
        name,
        partial(build_model, config, spec, read, seed, where),
        train,
        {"spec": spec.to_dict(), "loaded_classes": card_classes(config), **facts},
        live_options(teacher.inference, config.inference),
        (config.trainable or ("head" if data.task == "mlm" else "all")) == "head",
    )


def method_factory(recipe: Recipe) -> Callable[[], Method]:
    """Builds the recipe's method."""
    kind, task = METHODS[recipe.method.kind], LABELS[recipe.data.task]
    if kind.Options is not MethodOptions:
        return lambda: kind(recipe.method, task=task)
    return lambda: kind(**recipe.method.model_dump(exclude={"kind"}), task=task)


def model_spec(config: ModelConfig, data: Data) -> ModelSpec:
    """The recipe's model, for the data."""
    return ModelSpec(config.model, config.options, **data.spec)


def card_classes(config: MemberConfig) -> list[str] | None:
    """The class names in the card beside a checkpoint, where there is one."""
    if config.checkpoint is None:
        return None
    path = Path(config.checkpoint)
    folder = path if path.is_dir() else path.parent
    if not (folder / MODEL_CARD).exists():
        return None
    names: list[str] | None = read_card(folder).get("classes")
    return names


def build_model(config: ModelConfig, spec: ModelSpec, data: Data, seed: int, where: str = "student") -> nn.Module:
    """A model as its section says, with its checkpoint's weights where it has one; the same seed gives the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(spec, data.classes, where=f"{where}.model")
    if config.checkpoint is not None:
        load_weights(model, Path(config.checkpoint))
    return with_tokenizer(model, data) if isinstance(data, TextData) else model
