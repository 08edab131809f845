"""``tutelage.distill``: the experiment on the caller's own modules and loaders."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml
from pydantic import BaseModel, ValidationError
from torch import nn

from tutelage.config import (
    CacheConfig,
    EnsembleConfig,
    OptimizerConfig,
    ScheduleConfig,
    TeacherInferenceConfig,
    TrainConfig,
)
from tutelage.config.messages import must_be
from tutelage.config.teachers import cache_section
from tutelage.data import Batch, SequentialBatches, as_batch, name_positions
from tutelage.data.batch import Task
from tutelage.data.own_loaders import length_of
from tutelage.engine import broadcast_from_main, build_accelerator, open_trackers
from tutelage.errors import CapabilityError, ConfigError, DataError, ModelError, shorten
from tutelage.experiment.checks import warn_of_precision
from tutelage.experiment.compare import compare
from tutelage.experiment.measure import class_name, fingerprint
from tutelage.experiment.module_source import ModuleSource, call_student
from tutelage.experiment.own_data import check_like_evaluation, is_labelled, read_loaders
from tutelage.experiment.run import choose_run_directory, open_run_directory
from tutelage.experiment.spec import EnsembleSpec, EvaluationSpec, ExperimentSpec, MemberSpec, RunContext, TeacherSpec
from tutelage.experiment.summary import load_student
from tutelage.experiment.teacher_setup import live_options, prefetch_mode
from tutelage.interrupts import catch_interrupts
from tutelage.methods import LogitMethod, Method
from tutelage.progress import Terminal
from tutelage.students import prepare_outputs, split_inputs
from tutelage.taps import copy_model, reader_of
from tutelage.teachers import EnsembleTeacher, FunctionModel, LiveTeacher, as_model


@dataclass(frozen=True)
class DistillResult:
    """The result of :func:`distill`.

    Attributes:
        student: the distilled student, of its original class, in evaluation mode.
        summary: every figure, as in ``summary.json``.
        path: the run directory.
    """

    student: nn.Module
    summary: dict[str, Any]
    path: Path


def distill(
    teacher: Any,
    student: nn.Module | Callable[[], nn.Module],
    train_loader: Any,
    *,
    eval_data: Any,
    validation: Any = None,
    method: Method | None = None,
    task: Task | None = None,
    epochs: int = 10,
    optimizer: OptimizerConfig | dict[str, Any] | str = "adamw",
    lr: float | None = None,
    schedule: ScheduleConfig | dict[str, Any] | str = "cosine",
    train: dict[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    baseline: bool = True,
    classes: list[str] | None = None,
    outputs: str | int | None = None,
    teacher_mode: Literal["eval", "train_bn"] = "eval",
    ensemble: dict[str, Any] | None = None,
    inference: dict[str, Any] | None = None,
    cache: bool | str | Path | dict[str, Any] = False,
    to_batch: Callable[[Any], Batch] = as_batch,
    batch: Sequence[str] | None = None,
    class_axis: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    verbose: bool = True,
) -> DistillResult:
    """Distil ``teacher`` into ``student`` and measure whether it helped.

    Args:
        teacher: a trained module, or a list of modules as an ensemble; it comes back frozen, in
            evaluation mode, with the same weights. Also a function of
            the inputs, a program of ``torch.export``, an ``onnxruntime.InferenceSession``, a fitted estimator
            (:func:`tutelage.teachers.from_estimator`), or :class:`tutelage.teachers.StoredProbabilities`. ``None``
            for a ``method`` that needs none.
        student: a module, whose weights every seed starts from, or a function that makes one, called under each
            seed. The caller's module itself is not trained; take ``result.student``.
        train_loader: yields ``(inputs, labels)``, Hugging Face mappings, or what ``to_batch`` understands; see
            :func:`tutelage.data.as_batch`. A data set of torch or Hugging Face is read in batches of
            ``train={"batch_size": ...}``. A loader without a length needs ``train={"steps": ...}``.
        eval_data: a loader or data set for the final figures; read once for each model.
        validation: a loader to select the best epoch on. Default: none, and the last epoch is kept.
        method: default :class:`LogitMethod` at T = 4, alpha = 0.9.
        task: the kind of labels: ``classes``, ``multi-label`` or ``regression``. Default: that of ``method``, else
            ``classes``.
        epochs: passes over ``train_loader``; each batch it yields is one optimizer step.
        optimizer: name, or mapping with ``kind``, ``lr`` and the optimizer's options.
        lr: learning rate, where ``optimizer`` does not give one. Default 1e-3.
        schedule: name, or mapping with ``kind``, ``warmup`` and the schedule's options.
        train: further keys of a recipe's ``train``: ``clip``, ``precision``, ``ema``, ``accumulate`` ...
        seeds: each trains its own students; from two on, the gain gets an interval.
        baseline: train the baseline student too, with the same budget. It doubles the cost and shows the gain.
        classes: class names.
        outputs: the key, attribute or position of the scores in the models' outputs, if it is not ``logits``, the
            first item of a tuple, or the output itself.
        teacher_mode: see :class:`tutelage.teachers.LiveTeacher`.
        ensemble: of several teachers: ``combine``, ``weights`` and ``average_temperature`` of a recipe's ``teacher``,
            and ``route``, for each value of ``batch.route`` a list of members, which ``to_batch`` has to set.
        inference: keys of a recipe's ``teacher.inference``: ``dtype``, ``compile``, ``batch_size``, ``overlap`` ...
        cache: keep the teacher outputs on disk, so that they are computed once for each training sample, in this run
            and in later ones: a folder; keys of a recipe's ``teacher.cache``, such as ``path``, ``keep`` and
            ``dtype``; or ``True``, for a folder in ``runs/cache``. The loader's batches need sample ids, as by
            :class:`tutelage.data.IndexedDataset`, and a sample must look the same each time. The loader is read once
            more, to check that the cache belongs to its data.
        to_batch: makes a :class:`tutelage.data.Batch` of what the loaders yield; for causal language models
            :func:`tutelage.data.causal_batch`.
        batch: names of the positions of the loaders' tuples, as in ``("x", "length", "y")``; see
            :func:`tutelage.data.name_positions`. Default: ``(inputs, labels)``, or these and sample ids.
        class_axis: the axis of the classes in the scores of teacher and student, where each row has several labels.
            Default: the one that leaves the shape of the labels, such as 1 for ``[B, C, H, W]``.
        out: the run directory. Default: the first free of ``runs/distill``, ``runs/distill-2`` ...
        resume: continue the run in that directory.
        verbose: show progress.

    Raises:
        TutelageError: one of its subclasses, with the remedy; misfits are raised before any training.
    """
    config = _train_config(optimizer, lr, schedule, epochs, train, validation)
    teacher = [as_model(t) for t in teacher] if isinstance(teacher, (list, tuple)) else teacher and as_model(teacher)
    loaders, notes = read_loaders(
        config.batch_size, train_loader=train_loader, eval_data=eval_data, validation=validation
    )
    train_loader, eval_data, validation = loaders
    _check_arguments(teacher, student, method, seeds)
    method = method if method is not None else LogitMethod(task=task or "classes")
    own_batch = partial(as_batch, task=_check_task(task, method))
    to_batch = own_batch if to_batch is as_batch else to_batch
    teachers = [] if teacher is None else [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    to_batch = _named(batch, to_batch, lambda: call_student(student, seeds[0]), teachers, notes)
    _check_evaluation(eval_data, validation, to_batch)
    labelled = is_labelled(train_loader, to_batch, to_batch is own_batch, method)
    example = next(iter(SequentialBatches(eval_data, to_batch=to_batch)))
    to_batch = split_inputs(to_batch, example, call_student(student, seeds[0]), teachers[0] if teachers else None)
    teacher_spec = _teacher_spec(teacher, teacher_mode, ensemble, inference, cache, method.task)
    example = next(iter(SequentialBatches(eval_data, to_batch=to_batch))).rows(0, 2)
    check_like_evaluation(train_loader, to_batch, example)
    if hasattr(student, "_orig_mod") and not config.compile:
        notes.append("the student is trained without torch.compile; train={'compile': True} compiles it")
    if not labelled and baseline:
        baseline, notes = False, [*notes, "no baseline: the training data has no labels"]
    source = ModuleSource(
        [prepare_outputs(one, example.for_teacher(), outputs, class_axis) for one in teachers],
        copy_model(student) if isinstance(student, nn.Module) else student, copy.deepcopy(method),
        train_loader, to_batch, example, None if teacher_spec is None else teacher_spec.cache, config, outputs,
        class_axis,
    )  # fmt: skip
    spec = ExperimentSpec(
        name="distill",
        source=source,
        train=config,
        evaluation=_evaluation(eval_data, validation, to_batch, method.task, classes),
        teacher=teacher_spec,
        seeds=seeds,
        baseline=baseline,
        student_card={"spec": None, "class": _class_of(student), "classes": classes},
    )
    first = source.build_student(seeds[0])
    notes += [] if class_axis is not None else _axis_note(first)
    prints = [fingerprint(one) for one in teachers]
    models = {
        "teacher": prints if isinstance(teacher, Sequence) else prints[0] if prints else None,
        "student": fingerprint(first),
    }
    options = {"teacher_mode": teacher_mode, "ensemble": ensemble, "inference": inference, "classes": classes}
    described = _describe(models, source, seeds, baseline, options)
    text = yaml.safe_dump(described, sort_keys=False)
    return _run(spec, text, out, resume, verbose, notes)


def _describe(
    models: dict[str, Any], source: ModuleSource, seeds: Sequence[int], baseline: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """What a run directory says of the call; a resumed run must be of the same."""
    return {
        **models,
        "method": {"class": type(source.method).__name__, "formula": source.method.formula()},
        "train": source.train.model_dump(mode="json", exclude_none=True),
        "seeds": list(seeds),
        "baseline": baseline,
        **{key: given for key, given in options.items() if given},
        **({"cache": source.cache.model_dump(mode="json", exclude_none=True)} if source.cache is not None else {}),
        "classes": options["classes"],
        "batches": length_of(source.train_loader),
    }


def _run(
    spec: ExperimentSpec, text: str, out: str | Path | None, resume: bool, verbose: bool, notes: Sequence[str]
) -> DistillResult:
    """Run the experiment that ``text`` describes, in its run directory."""
    accelerator = build_accelerator(spec.train.precision, list(spec.train.trackers))
    path = broadcast_from_main(accelerator, lambda: choose_run_directory(out, spec.name, resume))
    terminal = Terminal(speaks=verbose and accelerator.is_main_process)
    warn_of_precision(accelerator, terminal)
    for note in notes:
        terminal.say(note)
    tracked = open_trackers(accelerator, path / "trackers", {"distill": text})
    with (
        open_run_directory(path, text, resume=resume, main=accelerator.is_main_process) as run,
        catch_interrupts(terminal.say) as stop,
        tracked,
    ):
        summary = compare(spec, RunContext(accelerator, run, terminal, stop))
        return DistillResult(load_student(spec, run.path / "student"), summary, path)


def _named(
    names: Sequence[str] | None, to_batch: Callable[[Any], Batch], build_student: Callable[[], nn.Module],
    teachers: Sequence[nn.Module], notes: list[str],
) -> Callable[[Any], Batch]:  # fmt: skip
    if names is None:
        return to_batch
    named = name_positions(names, to_batch, build_student(), teachers)
    notes += named.notes()
    return named


def _axis_note(student: nn.Module) -> list[str]:
    axis = reader_of(student).class_axis
    return [] if axis == -1 else [f"the scores have the classes on axis {axis} (class_axis={axis})"]


def _train_config(
    optimizer: Any, lr: float | None, schedule: Any, epochs: int, train: dict[str, Any] | None, validation: Any
) -> TrainConfig:
    optimizer = {"kind": optimizer} if isinstance(optimizer, str) else optimizer
    if isinstance(optimizer, dict) and lr is not None:
        optimizer = {**optimizer, "lr": lr}
    schedule = {"kind": schedule} if isinstance(schedule, str) else schedule
    budget = {} if train is not None and "steps" in train else {"epochs": epochs}
    config = _validate(TrainConfig, {**budget, "optimizer": optimizer, "schedule": schedule, **(train or {})})
    if config.early_stop is not None and validation is None:
        raise ConfigError(
            f"distill(train={{'early_stop': {config.early_stop}}}): early stopping needs validation data",
            remedy="pass validation=, a loader that is neither trained nor tested on",
        )
    return config


def _teacher_spec(
    teacher: nn.Module | Sequence[nn.Module] | None,
    mode: Literal["eval", "train_bn"],
    ensemble: dict[str, Any] | None,
    inference: dict[str, Any] | None,
    cache: Any,
    task: Task,
) -> TeacherSpec | None:
    options, prefetch = dict[str, Any](), None
    if inference:
        section = _validate(TeacherInferenceConfig, inference, "inference")
        options, prefetch = live_options(section), prefetch_mode(section)
    teachers = [] if teacher is None else [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    cache_config = _cache_config(cache, mode, "sharded" if options.get("sharded") else prefetch, teachers)
    if teacher is None:
        if ensemble or inference:
            raise ConfigError(
                f"distill(teacher=None, {'ensemble' if ensemble else 'inference'}=...) needs a teacher",
                remedy="leave the argument out, or give a teacher",
            )
        return None
    if isinstance(teacher, nn.Module):
        if ensemble:
            raise ConfigError(
                f"distill(ensemble={shorten(ensemble)}) needs several teachers, and there is one",
                remedy="give a list of modules as teacher",
            )
        return TeacherSpec((MemberSpec("teacher", inference=options),), mode, None, prefetch, cache_config)
    if options.get("sharded"):
        raise ConfigError(
            "distill(inference={'sharded': True}): an ensemble cannot be sharded", remedy="leave out 'sharded'"
        )
    members = tuple(MemberSpec(f"teacher-{i}", inference=options) for i in range(len(teacher)))
    return TeacherSpec(members, mode, _ensemble_spec(teacher, dict(ensemble or {}), task), prefetch, cache_config)


def _ensemble_spec(teachers: Sequence[nn.Module], options: dict[str, Any], task: Task) -> EnsembleSpec:
    """How the teachers are combined, checked before anything runs."""
    route = options.pop("route", None)
    config = _validate(EnsembleConfig, options, "ensemble")
    if config.combine == "probabilities" and task != "classes":
        raise ConfigError(
            f"distill(ensemble={{'combine': 'probabilities'}}): the labels are {task}, and the scores of an ensemble "
            "are no distribution over classes",
            remedy="use combine: logits, which is the mean of the members' scores",
        )
    spec = EnsembleSpec(
        config.combine or ("probabilities" if task == "classes" else "logits"),
        config.weights,
        config.average_temperature or 1.0,
        route,
    )
    if config.weights == "learned" and route is not None:
        raise ConfigError(
            "distill(ensemble=...): weights can be learned only for members that teach all samples",
            remedy="leave route out, or give weights",
        )
    weights = None if isinstance(config.weights, str) else config.weights
    EnsembleTeacher([LiveTeacher(t) for t in teachers], combine=spec.combine, weights=weights, route=route)
    return spec


def _cache_config(given: Any, mode: str, parallel: str | None, teachers: Sequence[nn.Module]) -> CacheConfig | None:
    """The ``cache`` section; raises :class:`ConfigError` when other arguments exclude a cache."""
    section = cache_section(str(given) if isinstance(given, Path) else given)
    if section is None:
        return None
    config = _validate(CacheConfig, section, "cache")
    unknown = next((t for t in teachers if isinstance(t, FunctionModel) and t.digest is None), None)
    if unknown is not None:
        raise ConfigError(
            f"distill(cache={shorten(given)}): the teacher is a {unknown.name}, and a cache cannot know "
            "when it changes",
            remedy="give tutelage.teachers.FunctionModel(function, digest=...) with a text that names the function's "
            "version, or leave cache out",
        )
    if mode != "eval":
        raise ConfigError(
            f"distill(cache={shorten(given)}, teacher_mode={mode!r}): in train_bn mode a sample's outputs "
            "depend on its batch, so they cannot be cached",
            remedy="use teacher_mode='eval', or leave cache out",
        )
    if parallel is not None:
        raise ConfigError(
            f"distill(cache={shorten(given)}, inference=...): outputs that are read from disk are neither prefetched "
            "nor computed by all processes at once",
            remedy="leave overlap, process and sharded out of inference, or leave out the cache",
        )
    return config


METRICS: dict[Task, str] = {"multi-label": "f1", "regression": "spearman", "embedding": "spearman"}


def _evaluation(
    test: Any, validation: Any, to_batch: Callable[[Any], Batch], task: Task, classes: list[str] | None
) -> EvaluationSpec:
    return EvaluationSpec(
        test=SequentialBatches(test, to_batch=to_batch),
        validation=None if validation is None else SequentialBatches(validation, to_batch=to_batch),
        metric=METRICS.get(task, "accuracy"),
        classes=classes,
    )


def _class_of(student: Any) -> str:
    return class_name(type(student)) if isinstance(student, nn.Module) else "the given function's result"


def _check_task(task: Task | None, method: Method) -> Task:
    """The kind of labels; raises :class:`ConfigError` if the method is for another."""
    if task is not None and task != method.task:
        raise ConfigError(
            f"distill(task={shorten(task)}) does not fit the method, which is for {method.task}",
            remedy=f"create the method with task={shorten(task)}",
        )
    return method.task


def _check_arguments(teacher: Any, student: Any, method: Any, seeds: Any) -> None:
    several = isinstance(teacher, Sequence) and not isinstance(teacher, str)
    teachers = teacher if several else [] if teacher is None else [teacher]
    if teacher is None and (method is None or (isinstance(method, Method) and method.needs is not None)):
        raise ConfigError(
            f"distill(teacher=None), and {type(method or LogitMethod()).__name__} needs a teacher",
            remedy="give one, or a method that needs none, as in method=tutelage.methods.SupervisedMethod()",
        )
    are_modules = teacher is None or (bool(teachers) and all(isinstance(t, nn.Module) for t in teachers))
    for name, given, is_valid, wanted in (
        ("teacher", teacher, are_modules, "a torch.nn.Module, or a list of modules"),
        ("student", student, callable(student), "a torch.nn.Module, or a function that makes one"),
    ):
        if not is_valid:
            raise ModelError(f"distill({name}=...) is a {type(given).__name__}", remedy=f"give {wanted}")
    if any(student is t for t in teachers):
        raise CapabilityError(
            "teacher and student are the same module; the student would start with nothing to learn",
            remedy="give the student its own module, or copy.deepcopy(teacher) to start from the teacher",
        )
    if method is not None and not isinstance(method, Method):
        raise ConfigError(
            f"distill(method={shorten(method)})",
            remedy="give a method, as in tutelage.methods.LogitMethod(temperature=4.0)",
        )
    valid = isinstance(seeds, Sequence) and all(isinstance(s, int) and s >= 0 for s in seeds)
    if not valid or not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(
            f"distill(seeds={shorten(seeds)})", remedy="give different whole numbers from 0 on, as in (0, 1, 2)"
        )


def _check_evaluation(eval_data: Any, validation: Any, to_batch: Callable[[Any], Batch]) -> None:
    loaders = {"eval_data": eval_data} | ({} if validation is None else {"validation": validation})
    for name, loader in loaders.items():
        if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
            raise DataError(
                f"distill({name}=...), a {type(loader).__name__}, can be iterated only once",
                remedy="give a list of batches or a DataLoader: it is read once for each model",
            )
        check_order(name, SequentialBatches(loader, to_batch=to_batch))


def check_order(name: str, batches: Iterable[Batch]) -> None:
    """Raise :class:`DataError` unless two passes begin with the same batch."""
    first, again = next(iter(batches), None), next(iter(batches), None)
    if first is None or again is None:
        raise DataError(f"{name} yields no batches", remedy="check its data set and drop_last")

    def tensors(batch: Batch) -> list[torch.Tensor]:
        inputs = batch.inputs.values() if isinstance(batch.inputs, dict) else [batch.inputs]
        return [*inputs, batch.labels]

    if not all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True)):
        raise DataError(
            f"{name} gives other samples, or the same ones in another order, each time it is read",
            remedy="use shuffle=False and no augmentation: the models are compared sample by sample",
        )


S = TypeVar("S", bound=BaseModel)


def _validate(section: type[S], fields: dict[str, Any], argument: str = "") -> S:
    try:
        return section.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(p) for p in first["loc"])
        value_error = first["type"] == "value_error"
        what = first["msg"].removeprefix("Value error, ") if value_error else f"it must be {must_be(first)}"
        raise ConfigError(
            f"distill({argument and argument + ': '}{key}={shorten(first['input'])}): {what}",
            remedy=f"keys of {argument or 'train'}: {', '.join(section.model_fields)}",
        ) from None
