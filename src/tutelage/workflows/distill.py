"""``tutelage.distill``: the same comparison on the caller's own modules and loaders."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from tutelage.config import OptimizerConfig, ScheduleConfig, TrainConfig
from tutelage.data import Batch, InOrder, LoaderBatches, as_batch
from tutelage.engine import from_main, make_accelerator
from tutelage.methods import LogitMethod, Method
from tutelage.workflows.comparison import Arm, Comparison, Context, compare, exported_student
from tutelage.workflows.folder import choose, opened
from tutelage.workflows.progress import Terminal
from tutelage.workflows.stop import stopping


@dataclass(frozen=True)
class Run:
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
    teacher: nn.Module,
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
    to_batch: Callable[[Any], Batch] = as_batch,
    out: str | Path | None = None,
    resume: bool = False,
    verbose: bool = True,
) -> Run:
    """Distil ``teacher`` into ``student`` and measure whether it helped.

    Args:
        teacher: a trained module; it is frozen, and never changed.
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
        baseline: train the student alone too, with the same budget. It doubles the cost, and is what shows the gain.
        classes: class names.
        teacher_mode: see :class:`tutelage.teachers.LiveTeacher`.
        to_batch: makes a :class:`tutelage.data.Batch` of what the loaders yield; for causal language models
            :func:`tutelage.data.causal_batch`.
        out: the run directory. Default: the first free of ``runs/distill``, ``runs/distill-2`` ...
        resume: go on with the run in that directory.
        verbose: show progress.

    Raises:
        TutelageError: one of its subclasses, with the remedy; misfits are found before any training.
    """
    optimizer = {"kind": optimizer} if isinstance(optimizer, str) else optimizer
    if isinstance(optimizer, dict) and lr is not None:
        optimizer = {**optimizer, "lr": float(lr)}
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
            return student()

    def batches(arm: Arm, seed: int) -> LoaderBatches:
        return LoaderBatches(train_loader, seed, to_batch)

    cls = type(template) if template is not None else None
    described = {
        "teacher": _describe(teacher),
        "student": _describe(make_student(seeds[0])),
        "method": {"class": type(method).__name__, "formula": method.formula()},
        "train": config.model_dump(mode="json", exclude_none=True),
        "seeds": list(seeds),
        "baseline": baseline,
    }
    pristine = copy.deepcopy(method)
    comparison = Comparison(
        name="distill",
        teacher=lambda: teacher,
        student=make_student,
        method=lambda: copy.deepcopy(pristine),
        batches=batches,
        config=config,
        test=InOrder(eval_data, to_batch=to_batch),
        validation=None if validation is None else InOrder(validation, to_batch=to_batch),
        seeds=seeds,
        baseline=baseline,
        teacher_mode=teacher_mode,
        classes=classes,
        student_card={
            "spec": None, "class": _name(cls) if cls else "the given function's result", "classes": classes,
        },
    )  # fmt: skip
    path = choose(out, "distill", resume)
    accelerator = make_accelerator(config.precision, list(config.trackers), str(path / "trackers"))
    path = Path(from_main(accelerator, str(path)))
    terminal = Terminal(speaks=verbose and accelerator.is_main_process)
    text = yaml.safe_dump(described, sort_keys=False)
    with opened(path, text, resume=resume, main=accelerator.is_main_process) as run, stopping(terminal.say) as stop:
        ctx = Context(accelerator, run, terminal, stop)
        if config.trackers:
            accelerator.init_trackers("tutelage", config={"distill": text})
        summary = compare(comparison, ctx)
        if config.trackers:
            accelerator.end_training()
        return Run(exported_student(comparison, ctx, summary), summary, path)


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _describe(model: nn.Module) -> dict[str, Any]:
    return {"class": _name(type(model)), "parameters": sum(p.numel() for p in model.parameters())}


def _checked(section: type[TrainConfig], fields: dict[str, Any]) -> TrainConfig:
    from pydantic import ValidationError

    from tutelage.errors import ConfigError

    try:
        return section.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(p) for p in first["loc"])
        raise ConfigError(
            f"distill({key}={first['input']!r}): {first['msg'].removeprefix('Value error, ')}",
            remedy=f"keys of train: {', '.join(section.model_fields)}",
        ) from None
