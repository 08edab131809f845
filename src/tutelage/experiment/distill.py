"""``tutelage.distill``: the same comparison on the caller's own modules and loaders."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml
from pydantic import BaseModel
from torch import nn

from tutelage.config import (
    CacheConfig,
    EnsembleConfig,
    OptimizerConfig,
    ScheduleConfig,
    TeacherInferenceConfig,
    TrainConfig,
)
from tutelage.config.teachers import cache_section
from tutelage.data import Batch, LoaderBatches, SequentialBatches, as_batch
from tutelage.engine import from_main, make_accelerator, precision_here, tracking
from tutelage.errors import CapabilityError, ConfigError, DataError, Interrupted, ModelError
from tutelage.experiment.caching import open_own_cache
from tutelage.experiment.checks import warn_of_precision
from tutelage.experiment.compare import compare
from tutelage.experiment.dataset_fingerprint import samples, tokenizer
from tutelage.experiment.measure import class_name, fingerprint
from tutelage.experiment.open_run import choose_run_directory, open_run_directory
from tutelage.experiment.spec import Arm, ExperimentSpec, RunContext, example_of
from tutelage.experiment.summary import exported_student
from tutelage.experiment.teachers import EnsemblePlan, Member, live_options, prefetch_mode
from tutelage.methods import LogitMethod, Method
from tutelage.progress import Terminal
from tutelage.signals import stopping
from tutelage.teachers import EnsembleTeacher, LiveTeacher


@dataclass(frozen=True)
class DistillResult:
    """What :func:`distill` found.

    Attributes:
        student: the distilled student, of its original class, in evaluation mode.
        summary: every figure, as in ``summary.json``.
        path: the run directory.
    """

    student: nn.Module
    summary: dict[str, Any]
    path: Path


def distill(
    teacher: nn.Module | Sequence[nn.Module] | None,
    student: nn.Module | Callable[[], nn.Module],
    train_loader: Iterable[Any],
    *,
    eval_data: Iterable[Any],
    validation: Iterable[Any] | None = None,
    method: Method | None = None,
    epochs: int = 10,
    optimizer: OptimizerConfig | dict[str, Any] | str = "adamw",
    lr: float | None = None,
    schedule: ScheduleConfig | dict[str, Any] | str = "cosine",
    train: dict[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    baseline: bool = True,
    classes: list[str] | None = None,
    teacher_mode: Literal["eval", "train_bn"] = "eval",
    ensemble: dict[str, Any] | None = None,
    inference: dict[str, Any] | None = None,
    cache: bool | str | Path | dict[str, Any] = False,
    to_batch: Callable[[Any], Batch] = as_batch,
    out: str | Path | None = None,
    resume: bool = False,
    verbose: bool = True,
) -> DistillResult:
    """Distil ``teacher`` into ``student`` and measure whether it helped.

    Args:
        teacher: a trained module, or a list of them that speak as one; frozen, and never changed. ``None`` for a
            ``method`` that needs none.
        student: a module, whose state is where every seed starts, or a function that makes one, called
            under each seed. The caller's module itself is not trained; take ``run.student``.
        train_loader: yields ``(inputs, labels)``, Hugging Face mappings, or what ``to_batch`` understands.
        eval_data: a loader for the final figures; read once for each model.
        validation: a loader to select the best epoch on. Default: none, and the last epoch is kept.
        method: default :class:`LogitMethod` at T = 4, alpha = 0.9.
        epochs: passes over ``train_loader``; each batch it yields is one optimizer step.
        optimizer: name, or mapping with ``kind``, ``lr`` and the optimizer's options.
        lr: learning rate, where ``optimizer`` does not give one. Default 1e-3.
        schedule: name, or mapping with ``kind``, ``warmup`` and the schedule's options.
        train: further keys of a recipe's ``train``: ``clip``, ``precision``, ``ema``, ``accumulate`` ...
        seeds: each trains its own students; from two on, the gain gets an interval.
        baseline: train the baseline student too, with the same budget. It doubles the cost and shows the gain.
        classes: class names.
        teacher_mode: see :class:`tutelage.teachers.LiveTeacher`.
        ensemble: of several teachers: ``combine``, ``weights`` and ``average_temperature`` of a recipe's ``teacher``,
            and ``route``, for each value of ``batch.route`` a list of members, which ``to_batch`` has to set.
        inference: keys of a recipe's ``teacher.inference``: ``dtype``, ``compile``, ``batch_size``, ``overlap`` ...
        cache: keep the teacher's word on disk, so that it is asked for each training sample once, in this run and in
            later ones: a folder; keys of a recipe's ``teacher.cache``, as ``path``, ``keep`` and ``dtype``; or
            ``True``, for a folder in ``runs/cache`` with a name of its own. The loader's batches must have sample
            ids, as by :class:`tutelage.data.IndexedDataset`, and show a sample the same each time. It is read again,
            to see that it is the data that the cache was made from.
        to_batch: makes a :class:`tutelage.data.Batch` of what the loaders yield; for causal language models
            :func:`tutelage.data.causal_batch`.
        out: the run directory. Default: the first free of ``runs/distill``, ``runs/distill-2`` ...
        resume: go on with the run in that directory.
        verbose: show progress.

    Raises:
        TutelageError: one of its subclasses, with the remedy; misfits are found before any training.
    """
    many = not isinstance(teacher, nn.Module) and isinstance(teacher, Sequence)
    _check_arguments(teacher, student, method, seeds, eval_data, validation, to_batch)
    optimizer = {"kind": optimizer} if isinstance(optimizer, str) else optimizer
    if isinstance(optimizer, dict) and lr is not None:
        optimizer = {**optimizer, "lr": lr}
    schedule = {"kind": schedule} if isinstance(schedule, str) else schedule
    budget = {} if train is not None and "steps" in train else {"epochs": epochs}
    config = _checked(TrainConfig, {**budget, "optimizer": optimizer, "schedule": schedule, **(train or {})})
    method = method if method is not None else LogitMethod()
    template = copy.deepcopy(student) if isinstance(student, nn.Module) else None

    def make_student(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if template is not None:
                return copy.deepcopy(template)
            assert not isinstance(student, nn.Module)
            made = student()
        if not isinstance(made, nn.Module):
            raise ModelError(
                f"the function given as student returned a {type(made).__name__}",
                remedy="it must return a torch.nn.Module",
            )
        return made

    def make_peer(asked: Any, seed: int) -> nn.Module:
        if asked is None:
            return make_student(seed)
        if not callable(asked) or isinstance(asked, nn.Module):
            raise ConfigError(
                f"peers: {asked!r} is no function that makes a module",
                remedy="give a number, or a list of functions such as lambda: Net(width=8)",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = asked()
        if not isinstance(made, nn.Module):
            raise ModelError(
                f"a function given as a peer returned a {type(made).__name__}", remedy="return a torch.nn.Module"
            )
        return made

    def batches(arm: Arm, seed: int) -> LoaderBatches:
        return LoaderBatches(train_loader, seed, to_batch)

    cls = type(template) if template is not None else None
    plan, live, prefetch = None, dict[str, Any](), None
    if inference:
        wanted = _checked(TeacherInferenceConfig, inference, "inference")
        live, prefetch = live_options(wanted), prefetch_mode(wanted)
    if many and live.get("sharded"):
        raise ConfigError(
            "distill(inference={'sharded': True}) of several teachers", remedy="it is for one; leave it out"
        )
    if many:
        assert isinstance(teacher, Sequence)
        plan = _plan(teacher, dict(ensemble or {}), live)
    elif teacher is None and (ensemble or inference):
        raise ConfigError(
            f"distill(teacher=None, {'ensemble' if ensemble else 'inference'}=...), and there is no teacher",
            remedy="leave it out",
        )
    elif ensemble:
        raise ConfigError(
            f"distill(ensemble={ensemble!r}), and there is one teacher", remedy="give a list of modules as teacher"
        )
    kept = _cache(cache, teacher_mode, "sharded" if live.get("sharded") else prefetch)
    described = {
        "teacher": _fingerprints(teacher),
        "student": fingerprint(make_student(seeds[0])),
        "method": {"class": type(method).__name__, "formula": method.formula()},
        "train": config.model_dump(mode="json", exclude_none=True),
        "seeds": list(seeds),
        "baseline": baseline,
        "teacher_mode": teacher_mode,
        **({"ensemble": ensemble} if ensemble else {}),
        **({"inference": inference} if inference else {}),
        **({"cache": kept.model_dump(mode="json", exclude_none=True)} if kept is not None else {}),
        "classes": classes,
        "batches": len(train_loader) if isinstance(train_loader, Sized) else None,
    }
    if config.early_stop is not None and validation is None:
        raise ConfigError(
            f"distill(train={{'early_stop': {config.early_stop}}}): there is nothing to stop early on",
            remedy="pass validation=, a loader that is neither trained nor tested on",
        )
    pristine = copy.deepcopy(method)
    comparison = ExperimentSpec(
        name="distill",
        teacher=None if teacher is None else plan.untrained if plan is not None else lambda: teacher,  # type: ignore[arg-type, return-value]
        student=make_student,
        method=lambda: copy.deepcopy(pristine),
        batches=batches,
        config=config,
        test=SequentialBatches(eval_data, to_batch=to_batch),
        validation=None if validation is None else SequentialBatches(validation, to_batch=to_batch),
        seeds=seeds,
        baseline=baseline,
        teacher_mode=teacher_mode,
        ensemble=plan,
        inference=live,
        prefetch=prefetch,
        classes=classes,
        peer=make_peer,
        peer_card=lambda asked: {} if asked is None else {"class": "the given function's result"},
        student_card={
            "spec": None, "class": class_name(cls) if cls else "the given function's result", "classes": classes,
        },
    )  # fmt: skip
    accelerator = make_accelerator(config.precision, list(config.trackers))
    path = from_main(accelerator, lambda: choose_run_directory(out, "distill", resume))
    terminal = Terminal(speaks=verbose and accelerator.is_main_process)
    warn_of_precision(accelerator, terminal)
    text = yaml.safe_dump(described, sort_keys=False)
    tracked = tracking(accelerator, path / "trackers", {"distill": text})
    with (
        open_run_directory(path, text, resume=resume, main=accelerator.is_main_process) as run,
        stopping(terminal.say) as stop,
        tracked,
    ):
        ctx = RunContext(accelerator, run, terminal, stop)
        if kept is not None:
            found = partial(_made_from, train_loader, to_batch, ctx, config.precision)
            comparison.cache = partial(open_own_cache, kept, found, partial(example_of, comparison))
        summary = compare(comparison, ctx)
        return DistillResult(exported_student(comparison, ctx, summary), summary, path)


def _cache(given: Any, mode: str, prefetch: str | None) -> CacheConfig | None:
    """What is kept of the teacher's word; what it does not go with is refused."""
    section = cache_section(str(given) if isinstance(given, Path) else given)
    if section is None:
        return None
    config = _checked(CacheConfig, section, "cache")
    if mode != "eval":
        raise ConfigError(
            f"distill(cache={given!r}, teacher_mode={mode!r}): what the teacher says of a sample would depend on the "
            "batch that it first came in",
            remedy="use teacher_mode='eval', or leave cache out",
        )
    if prefetch is not None:
        raise ConfigError(
            f"distill(cache={given!r}, inference=...): a teacher whose word is read from disk is asked neither ahead "
            "nor by all processes at once",
            remedy="leave overlap, process and sharded out of inference, or leave out the cache",
        )
    return config


def _made_from(
    loader: Iterable[Any], to_batch: Callable[[Any], Batch], ctx: RunContext, precision: str | None
) -> dict[str, Any]:
    """What a cache of the caller's own data depends on beside the teacher."""

    def shown(batches: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        for step in ctx.terminal.iterate(batches, "reading training data"):
            yield step
            if ctx.should_stop():
                raise Interrupted("stopped before any training", remedy="the same call again begins anew")

    known = tokenizer(loader)
    return {
        "data": samples(loader, to_batch, shown),
        "preprocessing": {} if known is None else {"tokenizer": known},
        "precision": precision_here(precision),
    }


def _check_arguments(
    teacher: Any, student: Any, method: Any, seeds: Any, eval_data: Any, validation: Any, to_batch: Any
) -> None:
    """Raise the error that names the argument that is not what :func:`distill` says."""
    several = isinstance(teacher, Sequence) and not isinstance(teacher, str)
    if teacher is None and (method is None or (isinstance(method, Method) and method.needs is not None)):
        raise ConfigError(
            f"distill(teacher=None), and {type(method or LogitMethod()).__name__} needs a teacher",
            remedy="give one, or a method that needs none, as in method=tutelage.methods.SupervisedMethod()",
        )
    modules = bool(teacher) and all(isinstance(t, nn.Module) for t in (teacher if several else [teacher]))
    modules = modules or teacher is None
    for name, given, right, wanted in (
        ("teacher", teacher, modules, "a torch.nn.Module, or a list of modules"),
        ("student", student, callable(student), "a torch.nn.Module, or a function that makes one"),
    ):
        if not right:
            raise ModelError(f"distill({name}=...) is a {type(given).__name__}", remedy=f"give {wanted}")
    if any(student is t for t in (teacher if several else [teacher])):
        raise CapabilityError(
            "teacher and student are the same module; the student would start with nothing to learn",
            remedy="give the student its own module, or copy.deepcopy(teacher) where it shall start from the teacher",
        )
    if method is not None and not isinstance(method, Method):
        raise ConfigError(
            f"distill(method={method!r})", remedy="give a method, as in tutelage.methods.LogitMethod(temperature=4.0)"
        )
    whole = isinstance(seeds, Sequence) and all(isinstance(s, int) and s >= 0 for s in seeds)
    if not whole or not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(
            f"distill(seeds={seeds!r})", remedy="give different whole numbers from 0 on, as in (0, 1, 2)"
        )
    for name, loader in (("eval_data", eval_data), ("validation", validation)):
        if loader is None and name == "validation":
            continue
        if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
            raise DataError(
                f"distill({name}=...), a {type(loader).__name__}, cannot be iterated again and again",
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


def _plan(teachers: Sequence[nn.Module], options: dict[str, Any], inference: dict[str, Any]) -> EnsemblePlan:
    """The teachers as one; what does not fit is found at once."""
    route = options.pop("route", None)
    asked = _checked(EnsembleConfig, options, "ensemble")
    members = [Member(f"teacher-{i}", partial(_itself, t), inference=inference) for i, t in enumerate(teachers)]
    plan = EnsemblePlan(
        members, asked.combine or "probabilities", asked.weights, asked.average_temperature or 1.0, route
    )
    if asked.weights == "learned" and route is not None:
        raise ConfigError(
            "distill(ensemble=...): weights are learned of members that teach all samples",
            remedy="leave route out, or give weights",
        )
    weights = None if isinstance(asked.weights, str) else asked.weights
    EnsembleTeacher([LiveTeacher(t) for t in teachers], combine=plan.combine, weights=weights, route=route)
    return plan


def _fingerprints(teacher: nn.Module | Sequence[nn.Module] | None) -> Any:
    if isinstance(teacher, Sequence):
        return [fingerprint(t) for t in teacher]
    return None if teacher is None else fingerprint(teacher)


def _itself(model: nn.Module) -> nn.Module:
    return model


S = TypeVar("S", bound=BaseModel)


def _checked(section: type[S], fields: dict[str, Any], argument: str = "") -> S:
    from pydantic import ValidationError

    try:
        return section.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(p) for p in first["loc"])
        raise ConfigError(
            f"distill({argument and argument + ': '}{key}={first['input']!r}): "
            f"{first['msg'].removeprefix('Value error, ')}",
            remedy=f"keys of {argument or 'train'}: {', '.join(section.model_fields)}",
        ) from None
