"""The trials of a search, in this process or in workers; those of one process share data and teacher outputs.

No trial has the test split: its data has the validation split in that place.
"""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tutelage.config import Recipe, dump_recipe
from tutelage.data import Data
from tutelage.engine import RunDirectory, Training, build_accelerator, fit
from tutelage.engine.loop import NullCallback
from tutelage.errors import CapabilityError, Interrupted, NumericsError, TutelageError
from tutelage.evaluation import evaluate_teacher
from tutelage.experiment import checks
from tutelage.experiment.prepare import all_needs, build_teacher, prepare_student_and_method
from tutelage.experiment.recipe_source import data_key, load_data, recipe_spec
from tutelage.experiment.run import open_run_directory
from tutelage.experiment.spec import ExperimentSpec, ModelTeacher, RunContext
from tutelage.experiment.teacher_setup import (
    build_live_teacher,
    build_member,
    fits_memory,
    member_training,
    open_training_teacher,
    store_in_memory,
    with_trained_weights,
)
from tutelage.experiment.trainer import TrainingTeacher, fit_with_progress, student_training
from tutelage.files import atomic_folder
from tutelage.methods import Method, check_capabilities
from tutelage.models import MODEL_CARD, save_model
from tutelage.progress import Terminal
from tutelage.search.study import SEED_STEP, TrialRequest, TrialResult
from tutelage.students import to_float_model
from tutelage.teachers import MemoryTeacher, Teacher

Report = Callable[[int, float], bool]
"""Takes the number of an evaluation and its accuracy; true prunes the trial."""

MAX_DATA = 3
"""Data sets in memory, where trials differ in keys of ``data``."""

LOCK_TIMEOUT = 60.0
"""Seconds to wait until the process of a killed search releases its trial; it stops after a step."""

SILENT = Terminal(speaks=False)


class TrialPruned(Exception):
    """Ends a trial that is pruned."""


class TrialRunner:
    """Runs trials, and holds what they share.

    Args:
        warmup: share of the first seed's training before a trial can be pruned.
    """

    def __init__(self, terminal: Terminal, should_stop: Callable[[], bool], warmup: float) -> None:
        self.terminal, self.should_stop, self.warmup = terminal, should_stop, warmup
        self.loaded: dict[str, Data] = {}
        self.live: dict[str, ModelTeacher] = {}
        self.memory: dict[str, MemoryTeacher] = {}

    def data(self, recipe: Recipe) -> Data:
        """The data of a recipe, with its validation split in place of its test split."""
        key = data_key(recipe)
        if key not in self.loaded:
            while len(self.loaded) >= MAX_DATA:
                self.loaded.pop(next(iter(self.loaded)))
            data = load_data(recipe, self.terminal)
            self.loaded[key] = replace(data, test=data.validation)  # type: ignore[arg-type]  # both of one kind
        return self.loaded[key]

    def train_teacher(self, recipe: Recipe, run: RunDirectory) -> Recipe:
        """The recipe with checkpoints of its teacher or members, which are trained once, in ``run``."""
        if all(member.train is None for member in recipe.required_teacher.each):
            return recipe
        accelerator = build_accelerator(recipe.train.precision, [])
        ctx = RunContext(accelerator, run, self.terminal, self.should_stop)
        spec = recipe_spec(recipe, self.data(recipe))
        untrained = build_teacher(spec)
        assert untrained is not None
        assert spec.teacher is not None
        checks.check_teachers(spec, ctx.device, untrained)
        models = list(untrained.children()) if spec.teacher.ensemble is not None else [untrained]
        for number, (member, model) in enumerate(zip(spec.teacher.members, models, strict=True)):
            folder = run.model(member.name)
            if member.training is None or (folder / MODEL_CARD).exists():
                continue
            outcome = fit_with_progress(member_training(spec, ctx, number, model), ctx)
            trained = build_member(spec, number)
            trained.load_state_dict(outcome.best)
            with atomic_folder(folder) as draft:
                save_model(to_float_model(trained), draft, dict(member.card))
        raw = recipe.model_dump(mode="json", exclude_none=True)
        return Recipe.model_validate({**raw, "teacher": with_trained_weights(raw["teacher"], run.path)})

    def check(self, recipe: Recipe) -> None:
        """Load the models and run all checks, without training."""
        accelerator = build_accelerator(recipe.train.precision, [])
        self._prepare(
            recipe, RunContext(accelerator, RunDirectory(".", writes=False), self.terminal, self.should_stop)
        )

    def run(self, recipe: Recipe, folder: Path, report: Report) -> TrialResult:
        """Run a trial, or continue it, in a run directory without a summary."""
        start = time.monotonic()
        accelerator = build_accelerator(recipe.train.precision, [])
        resume = (folder / "config.yaml").exists()
        result = TrialResult("finished")
        with open_run_directory(folder, dump_recipe(recipe), resume=resume, main=True, patience=LOCK_TIMEOUT) as run:
            ctx = RunContext(accelerator, run, self.terminal, self.should_stop)
            try:
                spec, live, method = self._prepare(recipe, ctx)
                with self._training_teacher(recipe, spec, ctx, live, method) as teacher:
                    for seed in recipe.seeds:
                        is_last = seed == recipe.seeds[-1]
                        first_report = report if seed == recipe.seeds[0] else None
                        accuracy = self._train_seed(spec, ctx, seed, teacher, live, first_report, is_last)
                        result.seeds.append(accuracy)
                        count = len(result.seeds)
                        mean = sum(result.seeds) / count
                        if count > 1 and report(count * SEED_STEP, mean) and not is_last:
                            raise TrialPruned
            except TrialPruned:
                result.state = "pruned"
            except NumericsError as error:
                result.state, result.why = "diverged", error.what
            finally:
                accelerator.free_memory()
        result.seconds = time.monotonic() - start
        return result

    def _train_seed(
        self, spec: ExperimentSpec, ctx: RunContext, seed: int, teacher: Teacher, live: ModelTeacher,
        report: Report | None, is_last: bool,
    ) -> float:  # fmt: skip
        """Train the student of a seed; its last validation accuracy."""
        classes = spec.evaluation.classes
        assert classes is not None
        both = TrainingTeacher(live, teacher)
        training = student_training(spec, replace(ctx, terminal=SILENT), "distilled", seed, both, len(classes))
        reporter = _Reporter(ctx.run, training, report, (self.warmup, 1.0 if is_last else 2.0))
        fit(replace(training, callback=reporter), ctx.accelerator)
        return reporter.accuracies[-1]

    def _prepare(self, recipe: Recipe, ctx: RunContext) -> tuple[ExperimentSpec, ModelTeacher, Method]:
        spec, seed = recipe_spec(recipe, self.data(recipe)), recipe.seeds[0]
        student = spec.source.build_student(seed)
        checks.check_output(spec, ctx.device, student, "student")
        live = self._teacher(recipe, spec, ctx)
        student, method = prepare_student_and_method(spec, spec.source.build_student(seed), live.model, seed)
        checks.check_trains(spec, ctx.device, student, method)
        checks.check_optimizer(spec, student, method)
        checks.check_separate(live.model, student)
        checks.check_labels(spec, live.model, student)
        if spec.teacher is not None and spec.teacher.cache is None:
            check_capabilities(method, live)
        checks.check_tokenizers(spec, method)
        checks.check_method_runs(spec, ctx, student, method, live)
        return spec, live, method

    def _teacher(self, recipe: Recipe, spec: ExperimentSpec, ctx: RunContext) -> ModelTeacher:
        key = _key(recipe)
        if key not in self.live:
            self.live.clear()  # one at a time: a teacher is large
            untrained = build_teacher(spec)
            assert untrained is not None
            checks.check_teachers(spec, ctx.device, untrained)
            live = build_live_teacher(spec, untrained, ctx.device)
            assert spec.evaluation.validation is not None
            scores = evaluate_teacher(live, spec.evaluation.validation, ctx.device)
            checks.check_better_than_chance(scores, len(spec.evaluation.classes or []), ctx)
            self.live[key] = live
        return self.live[key]

    @contextmanager
    def _training_teacher(
        self, recipe: Recipe, spec: ExperimentSpec, ctx: RunContext, live: ModelTeacher, method: Method
    ) -> Iterator[Teacher]:
        """The teacher outputs for training: in memory, shared by trials, if they fit; else as in any other run."""
        classes = len(spec.evaluation.classes or [])
        if (spec.teacher and spec.teacher.cache is not None) or not fits_memory(spec, ctx, live, method, classes):
            with open_training_teacher(replace(spec, unaugmented=None), ctx, live, method, classes) as teacher:
                yield teacher or live
            return
        needs = replace(all_needs(method), temperature=None)
        key = f"{_key(recipe)} {needs}"
        if key not in self.memory:
            self.memory.clear()
            self.memory[key] = store_in_memory(spec, ctx, live, needs)
        yield self.memory[key]


def _key(recipe: Recipe) -> str:
    """All that determines the data and the teacher's outputs."""
    return json.dumps(
        [recipe.data.model_dump(mode="json"), recipe.required_teacher.model_dump(mode="json")], sort_keys=True
    )


class _Reporter(NullCallback):
    """Reports every evaluation of a training, those before an interruption first.

    Args:
        window: two shares of the training's steps; only an evaluation between them can prune the trial.
    """

    def __init__(
        self, run: RunDirectory, training: Training, report: Report | None, window: tuple[float, float]
    ) -> None:
        self.run, self.name, self.report = run, training.name, report
        self.window = [share * training.steps for share in window]
        self.accuracies: list[float] = []

    def on_start(self, name: str, step: int, total: int) -> None:
        """Report what was logged before ``step``."""
        if step:
            for line in validations(self.run, self.name):
                self._evaluated(line)

    def on_log(self, line: dict[str, Any]) -> None:
        """Report an evaluation."""
        if "validation" in line:
            self._evaluated(line)

    def _evaluated(self, line: dict[str, Any]) -> None:
        self.accuracies.append(line["validation"]["accuracy"])
        is_bad = self.report is not None and self.report(len(self.accuracies), self.accuracies[-1])
        if is_bad and self.window[0] <= line["step"] < self.window[1]:
            raise TrialPruned


def validations(run: RunDirectory, training: str) -> list[dict[str, Any]]:
    """The logged evaluations of a training, in order."""
    if not run.metrics.exists():
        return []
    lines = [json.loads(text) for text in run.metrics.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["training"] == training and "validation" in line]


class WorkerPool:
    """Processes that each run one trial at a time and send its evaluations."""

    def __init__(self, workers: int, warmup: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.stop = context.Event()
        threads = max(1, (os.cpu_count() or 1) // workers)
        self.processes: dict[Connection, BaseProcess] = {}
        self.running: dict[Connection, TrialRequest] = {}
        for _ in range(workers):
            here, there = context.Pipe()
            process = context.Process(
                target=_work, args=(there, self.stop, os.getpid(), threads, warmup), daemon=True
            )
            process.start()
            there.close()
            self.processes[here] = process

    def idle(self) -> list[Connection]:
        """Processes without a trial."""
        return [c for c in self.processes if c not in self.running]

    def start(self, trial: TrialRequest, recipe: Recipe, folder: Path) -> None:
        """Give a trial to an idle process."""
        connection = self.idle()[0]
        connection.send((recipe, folder))
        self.running[connection] = trial

    def results(
        self, report: Callable[[int, int, float], bool], should_stop: Callable[[], bool]
    ) -> Iterator[tuple[TrialRequest, TrialResult | TutelageError]]:
        """Wait until trials end; meanwhile answer the evaluations that processes send.

        ``report`` takes number, evaluation and accuracy; true prunes the trial. Raises :class:`Interrupted` once
        ``should_stop`` was true and all processes have stopped.
        """
        ended: list[tuple[TrialRequest, TrialResult | TutelageError]] = []
        while self.running and not ended:
            if should_stop():
                self.stop.set()
            for connection in wait(list(self.running), timeout=0.2):
                assert isinstance(connection, Connection)
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    raise self._died(connection) from None
                if isinstance(message, tuple):
                    connection.send(report(self.running[connection].number, *message))
                elif isinstance(message, Interrupted):
                    self.running.pop(connection)
                else:
                    ended.append((self.running.pop(connection), message))
        yield from ended
        if self.stop.is_set() and not self.running:
            raise Interrupted("stopped; everything is saved")

    def _died(self, connection: Connection) -> CapabilityError:
        process = self.processes[connection]
        process.join(5)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return CapabilityError(
            f"the process of trial {self.running[connection].number} {how}",
            remedy="continue with --resume; if memory ran out, with fewer --workers",
        )

    def close(self) -> None:
        """End the processes; a running trial stays at its last checkpoint."""
        self.stop.set()
        for connection, process in self.processes.items():
            if connection not in self.running and process.is_alive():
                try:
                    connection.send(None)
                except OSError:  # it has just ended
                    continue
        for connection, process in self.processes.items():
            process.join(0.1 if connection in self.running else 10)
            if process.is_alive():
                process.terminate()
                process.join()
            connection.close()


def _work(connection: Connection, stop: Any, parent: int, threads: int, warmup: float) -> None:
    """Run trials until a ``None`` arrives, or until the search's process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the search decides when to stop
    torch.set_num_threads(threads)
    runner = TrialRunner(SILENT, lambda: stop.is_set() or os.getppid() != parent, warmup)

    def report(step: int, value: float) -> bool:
        connection.send((step, value))
        is_pruned: bool = connection.recv()
        return is_pruned

    try:
        while (job := connection.recv()) is not None:
            recipe, folder = job
            try:
                outcome: TrialResult | TutelageError = runner.run(recipe, folder, report)
            except TutelageError as error:
                outcome = error
            connection.send(outcome)
    except (EOFError, OSError):  # the search is gone; its trial continues with --resume
        return
