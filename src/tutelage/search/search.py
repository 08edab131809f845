"""``tutelage search``: choose values of a recipe's keys on validation, then test the choice once."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tutelage.config import Recipe, SearchConfig, dump_recipe
from tutelage.engine import RunDirectory
from tutelage.errors import CapabilityError, ConfigError, Interrupted, RunDirectoryError, TutelageError, require
from tutelage.evaluation.statistics import paired_difference
from tutelage.experiment.run import (
    choose_run_directory,
    differing_settings,
    open_run_directory,
    own_paths_yaml,
    read_config,
    read_summary,
    run_recipe,
)
from tutelage.files import write_text
from tutelage.interrupts import catch_interrupts
from tutelage.progress import Terminal
from tutelage.safe_yaml import load_yaml
from tutelage.search.search_space import (
    SearchDimension,
    build_dimensions,
    check_values,
    recipe_values,
    resolve_search,
    with_values,
)

if TYPE_CHECKING:
    from tutelage.search.study import TrialRequest, TrialResult

SUMMARY = "search.json"
"""The results of a search."""

BEST = "best.yaml"
"""The best recipe, which ``tutelage run`` takes."""

JOURNAL = "search.journal"
"""Optuna's study."""

Outcome: TypeAlias = "tuple[TrialRequest, TrialResult | TutelageError]"
ShowTrials = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any] | None], None]


@dataclass(frozen=True)
class SearchResult:
    """A finished search: its folder, and the content of ``search.json``."""

    path: Path
    summary: dict[str, Any]

    @property
    def runs(self) -> list[str]:
        """The folders in it of the runs that read the test split."""
        return ["default"] if self.summary["same"] else ["default", "chosen"]


def search_recipe(
    recipe: Recipe,
    *,
    trials: int | None = None,
    keys: Sequence[str] = (),
    workers: int = 1,
    out: str | Path | None = None,
    resume: bool = False,
    terminal: Terminal | None = None,
) -> SearchResult:
    """Try values of a recipe's keys, choose by validation accuracy, and test the chosen and the recipe's own once.

    The teacher is trained once. A trial trains the distilled student under each of the recipe's seeds; its score is
    the mean of their last validation accuracies. No trial reads the test split.

    Args:
        keys: the space in place of the recipe's: ``KEY=LOW:HIGH``, ``KEY=LOW:HIGH:log``, ``KEY=a,b,c``.
        workers: processes that each run one trial at a time. With one worker, an interrupted and resumed search gives
            the results of an uninterrupted one.
    """
    require("optuna", "search", "a search")
    _check_recipe(recipe)
    config = resolve_search(recipe, keys, trials)
    recipe = recipe.model_copy(update={"search": config})
    space = build_dimensions(recipe, config.space)
    check_values(_without_search(recipe), space)
    path = choose_run_directory(out, f"{recipe.name}-search", resume)
    terminal = terminal or Terminal()
    with open_run_directory(path, dump_recipe(recipe), resume=resume, main=True) as run:
        file = path / SUMMARY
        if file.exists() and (before := read_summary(file))["settings"]["trials"] >= config.trials:
            terminal.say(f"{path} is finished; showing its results")
            return SearchResult(path, before)
        terminal.say(f"search: {path}, {config.trials} trials of {', '.join(d.key for d in space)}")
        start = time.monotonic()
        with catch_interrupts(terminal.say) as should_stop:
            search = _Search(run, recipe, config, space, terminal, should_stop)
            search.run_trials(workers)
        summary = search.summarise(workers, start)
        write_text(path / BEST, search.best_recipe(summary))
        write_text(file, json.dumps(summary, indent=1) + "\n")
    return SearchResult(path, summary)


def _check_recipe(recipe: Recipe) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CapabilityError(
            "a search is one process, and the launcher started several",
            remedy="start it without the launcher; --workers N runs trials in parallel",
        )
    problem = None
    if recipe.workflow is not None:
        problem = f"workflow {recipe.workflow.kind!r}"
    elif recipe.teacher is None:
        problem = "no teacher"
    elif recipe.teacher.endpoint is not None:
        problem = "a teacher behind a server"
    if problem is not None:
        raise ConfigError(
            f"a search needs a recipe of single runs with a local teacher, and this one has {problem}",
            remedy="search with the recipe of one run, then use the result",
        )
    if recipe.data.metric != "accuracy":
        raise ConfigError(
            f"a search maximises accuracy, and the recipe's metric is {recipe.data.metric}", where="data.metric",
            remedy="set data.metric: accuracy, if the task has it",
        )  # fmt: skip


def _without_search(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude_none=True, exclude={"search"})


class _Search:
    def __init__(
        self, run: RunDirectory, recipe: Recipe, config: SearchConfig, space: list[SearchDimension],
        terminal: Terminal, should_stop: Callable[[], bool],
    ) -> None:  # fmt: skip
        from tutelage.search.study import SearchStudy
        from tutelage.search.trials import TrialRunner

        self.run, self.recipe, self.config, self.space, self.terminal = run, recipe, config, space, terminal
        self.should_stop = should_stop
        self.runner = TrialRunner(terminal, should_stop, config.warmup)
        single = recipe.model_copy(update={"search": None})
        self.base_recipe = self.runner.train_teacher(single, RunDirectory(run.path / "teacher"))
        self.base = _without_search(self.base_recipe)
        self.default_values = recipe_values(space)
        self.runner.terminal = Terminal(terminal.console, speaks=terminal.speaks)
        self.runner.terminal.live = False  # the live line counts trials
        if not (run.path / JOURNAL).exists():
            self._check_space()
        self.study = SearchStudy(run.path / JOURNAL, space, config)

    def _check_space(self) -> None:
        """Run all checks without training: for the recipe, and for each limit and value of the space."""
        self.runner.check(self.base_recipe)
        for d in self.space:
            for value in d.ends():
                try:
                    self.runner.check(with_values(self.base, {d.key: value}))
                except TutelageError as error:
                    what = f"with {d.key}={json.dumps(value)}: {error.what}"
                    raise type(error)(what, where=error.where, remedy=error.remedy) from None

    # Trials ----------------------------------------------------------------------------------------

    def _folder(self, number: int) -> Path:
        return self.run.path / "trials" / f"{number:04d}"

    def run_trials(self, workers: int) -> None:
        """Run the remaining trials."""
        for ended in self.study.trials():
            self._delete_checkpoints(ended["number"])
        with closing(self._outcomes(workers)) as outcomes, self._show_progress() as show:
            for trial, outcome in outcomes:
                self._finish(trial, outcome, show)

    def _outcomes(self, workers: int) -> Generator[Outcome, None, None]:
        """Run trials, in worker processes or in this one; yield each with its result or its error."""
        missing = self.config.trials - self.study.count()
        if workers > 1 and missing > 0:
            yield from self._worker_outcomes(min(workers, missing))
        while self.study.count() < self.config.trials:
            trial = self.study.next()
            report = partial(self.study.report, trial.number)
            try:
                yield trial, self.runner.run(with_values(self.base, trial.values), self._folder(trial.number), report)
            except TutelageError as error:
                yield trial, error

    def _worker_outcomes(self, workers: int) -> Generator[Outcome, None, None]:
        from tutelage.search.trials import WorkerPool

        with closing(WorkerPool(workers, self.config.warmup)) as pool:
            while True:
                while pool.idle() and self.study.count() < self.config.trials and not self.should_stop():
                    trial = self.study.next()
                    pool.start(trial, with_values(self.base, trial.values), self._folder(trial.number))
                if not pool.running:
                    return
                yield from pool.results(self.study.report, self.should_stop)

    def _finish(self, request: TrialRequest, outcome: TrialResult | TutelageError, show: ShowTrials) -> None:
        from tutelage.search.study import TrialResult

        number, values = request.number, request.values
        if isinstance(outcome, TutelageError):
            if isinstance(outcome, Interrupted | RunDirectoryError) or values == self.default_values:
                raise outcome  # the values did not cause it
            outcome = TrialResult("failed", why=str(outcome))
        self.study.finish(number, outcome)
        self._delete_checkpoints(number)
        trials = self.study.trials()
        best = best_trial(trials)
        trial = next(t for t in trials if t["number"] == number)
        settings = ", ".join(f"{key}={_format(value)}" for key, value in values.items())
        if trial["validation"] is None or outcome.state != "finished":
            place = f" at evaluation {len(trial['evaluations'])}" if trial["evaluations"] else ""
            text = f"{outcome.state}{place}" + (f": {outcome.why}" if outcome.why else "")
        else:
            text = f"validation {trial['validation']:.2%}" + (", the best so far" if best is trial else "")
        self.terminal.say(f"trial {number}: {settings}: {text}, {outcome.seconds:.0f} s")
        show(trials, best)

    def _delete_checkpoints(self, number: int) -> None:
        shutil.rmtree(self._folder(number) / "checkpoints", ignore_errors=True)

    @contextmanager
    def _show_progress(self) -> Iterator[ShowTrials]:
        """A live line with the number of trials and the best one; yields a function that updates it."""
        if not self.terminal.live:
            yield lambda trials, best: None
            return
        line = Progress(
            TextColumn("trials"), BarColumn(bar_width=24), TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(), TextColumn("{task.fields[best]}"), console=self.terminal.console, transient=True,
        )  # fmt: skip
        task = line.add_task("", total=self.config.trials, completed=self.study.count(), best="")

        def show(trials: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None) -> None:
            text = "" if best is None else f"best {best['validation']:.2%} (trial {best['number']})"
            line.update(task, completed=len(trials), best=text)

        with line:
            yield show

    # Results -------------------------------------------------------------------------------------------

    def summarise(self, workers: int, start: float) -> dict[str, Any]:
        """Run the chosen recipe and the original one in full; return the content of ``search.json``."""
        from tutelage.search.trials import validations

        elapsed, trials = time.monotonic() - start, self.study.trials()
        best = best_trial(trials)
        if best is None:
            reasons = "; ".join(sorted({t["why"].splitlines()[0] for t in trials if t["why"]})[:3])
            raise CapabilityError(
                f"none of {len(trials)} trials finished" + (f": {reasons}" if reasons else ""),
                where=str(self.run.path), remedy="make the space smaller, or search.startup larger",
            )  # fmt: skip
        is_default = best["values"] == self.default_values
        test = {"default": self._run_in_full("default", {})}
        test["chosen"] = test["default"] if is_default else self._run_in_full("chosen", best["values"])
        own = next((t for t in trials if t["values"] == self.default_values and t["state"] == "finished"), None)
        full = RunDirectory(self.run.path / "default")
        own_seeds = own["seeds"] if own is not None else [
            validations(full, f"distilled-seed{seed}")[-1]["validation"]["accuracy"] for seed in self.recipe.seeds
        ]  # fmt: skip
        gains = {
            w: paired_difference(test["chosen"][w]["values"], test["default"][w]["values"]) for w in ("best", "last")
        }
        return {
            "name": self.recipe.name,
            "objective": "validation accuracy after the last epoch, mean over seeds",
            "seeds": self.recipe.seeds,
            "settings": self.config.model_dump(mode="json", exclude={"space"}) | {"workers": workers},
            "space": [d.to_dict() for d in self.space],
            "trials": trials,
            "importance": self.study.importance(),
            "best": best["number"],
            "default": {
                "trial": own and own["number"],
                "validation": statistics.fmean(own_seeds),
                "seeds": own_seeds,
            },
            "same": is_default,
            "gain_on_validation": paired_difference(best["seeds"], own_seeds),
            "test": test | {"gain": gains},
            "seconds": round(sum(t["seconds"] for t in trials), 1),
            "elapsed": round(elapsed, 1),
        }

    def _run_in_full(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run the recipe with these values in the folder ``name``; its test accuracies over seeds."""
        path, recipe = self.run.path / name, with_values(self.base, values)
        _move_other_run(path, dump_recipe(recipe))
        self.terminal.say(f"{name}: full run of the recipe with {'the chosen' if values else 'its own'} values")
        done = run_recipe(recipe, out=path, resume=(path / "config.yaml").exists(), terminal=self.terminal)
        arm = done.summary["students"]["distilled"]
        return {which: arm[which]["accuracy"] for which in ("best", "last")}

    def best_recipe(self, summary: Mapping[str, Any]) -> str:
        """The best recipe as YAML, with the results as comments."""
        best = next(t for t in summary["trials"] if t["number"] == summary["best"])
        test, count = summary["test"], len(summary["seeds"])
        lines = [
            f"The best of {len(summary['trials'])} trials of a search, by validation: trial {best['number']}.",
            *(f"  {key} = {_format(value)}" for key, value in best["values"].items()),
            f"Validation {best['validation']:.2%}; the recipe before the search has "
            f"{summary['default']['validation']:.2%}.",
            f"Test, last epoch: {test['chosen']['last']['mean']:.2%} against {test['default']['last']['mean']:.2%}, "
            f"{count} seed{'s' if count > 1 else ''}.",
        ]
        if self.base_recipe.teacher != self.recipe.teacher:
            lines.append("The teacher is the one that the search trained; give teacher.train to train another.")
        recipe = with_values(self.base, best["values"])
        return "".join(f"# {line}\n" for line in lines) + own_paths_yaml(dump_recipe(recipe), self.run.path)


def _move_other_run(path: Path, config: str) -> None:
    """Rename the folder of a run with other values, which an earlier search with fewer trials chose."""
    stored = path / "config.yaml"
    if not stored.exists():
        return
    before = read_config(stored, "the search cannot go on without it: delete that folder")
    if differing_settings(path, before, load_yaml(config)[0]):
        names = (path.with_name(f"{path.name}-before-{n}") for n in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))


def best_trial(trials: Sequence[Mapping[str, Any]]) -> Any:
    """The first of the finished trials with the highest validation accuracy; ``None`` if none is finished."""
    finished = [t for t in trials if t["state"] == "finished"]
    return max(finished, key=lambda t: (t["validation"], -t["number"]), default=None)


def _format(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
