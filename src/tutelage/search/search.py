"""``tutelage search``: which temperature, which alpha, which anything; chosen on validation, tested once."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tutelage.config import Recipe, dump_recipe
from tutelage.engine import RunDirectory
from tutelage.errors import CapabilityError, ConfigError, RunDirectoryError, TutelageError, require
from tutelage.evaluation.statistics import paired
from tutelage.experiment.open_run import choose_run_directory, open_run_directory
from tutelage.experiment.run import run_recipe
from tutelage.files import write_text
from tutelage.progress import Terminal
from tutelage.search.search_space import SearchDimension, asked, check_values, dimensions, own_values, with_values
from tutelage.signals import stopping

FOUND = "search.json"
"""What a search found."""

BEST = "best.yaml"
"""The best recipe, which ``tutelage run`` takes."""


@dataclass(frozen=True)
class SearchResult:
    """A finished search: its folder, and what ``search.json`` says."""

    path: Path
    found: dict[str, Any]

    @property
    def runs(self) -> list[str]:
        """The folders in it of the runs that read the test split."""
        return ["default"] if self.found["same"] else ["default", "chosen"]


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
    """Try settings of a recipe, choose by validation accuracy, and test the chosen and the recipe's own once.

    The teacher is trained once. A trial trains the distilled student under each of the recipe's seeds; what counts is
    the mean of their last validation accuracies. No trial reads the test split.

    Args:
        recipe: its ``search`` says what is tried. Default: the method's temperature and alpha.
        trials: how many, pruned ones included. Default: the recipe's ``search.trials``.
        keys: the space in place of the recipe's: ``KEY=LOW:HIGH``, ``KEY=LOW:HIGH:log``, ``KEY=a,b,c``.
        workers: processes that each run a trial at a time. With one, a search that was interrupted gives the
            results of one that was not.
        out: the folder. Default: the first free of ``runs/NAME-search``, ``runs/NAME-search-2`` ...
        resume: go on with the search in that folder.
        terminal: where progress is shown.

    Raises:
        MissingDependencyError: optuna is not installed.
        ConfigError: a key that the recipe does not have, or a value that it refuses; nothing has been trained.
        TutelageError: one of its subclasses, with the remedy.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """
    require("optuna", "search", "a search")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CapabilityError(
            "a search is one process, and the launcher started several", remedy="leave the launcher out; --workers N"
        )
    away = recipe.teacher is not None and recipe.teacher.endpoint is not None
    if recipe.workflow is not None or recipe.teacher is None or away:
        has = "a teacher behind a server" if away else "no teacher"
        has = has if recipe.workflow is None else f"workflow {recipe.workflow.kind!r}"
        raise ConfigError(f"a search is over single runs with a teacher, and the recipe has {has}",
                          remedy="search the recipe of one run, then use what it found")  # fmt: skip
    if recipe.data.metric != "accuracy":
        raise ConfigError(
            f"a search goes by accuracy, and the recipe by {recipe.data.metric}",
            where="data.metric",
            remedy="set data.metric: accuracy, where the task has it",
        )
    config = asked(recipe, keys, trials)
    recipe = recipe.model_copy(update={"search": config})
    space = dimensions(recipe, config.space)
    check_values(_bare(recipe), space)
    path = choose_run_directory(out, f"{recipe.name}-search", resume)
    terminal = terminal or Terminal()
    with open_run_directory(path, dump_recipe(recipe), resume=resume, main=True) as run:
        found = path / FOUND
        if found.exists() and (before := _read(found))["settings"]["trials"] >= config.trials:
            terminal.say(f"{path} is finished; showing what it found")
            return SearchResult(path, before)
        terminal.say(f"search: {path}, {config.trials} trials of {', '.join(d.key for d in space)}")
        start = time.monotonic()
        with stopping(terminal.say) as should_stop:
            taught = _Search(run, recipe, space, terminal, should_stop)
            taught.trials(workers)
        result = taught.tested(workers, time.monotonic() - start)
        write_text(path / BEST, taught.best_yaml(result))
        write_text(found, json.dumps(result, indent=1) + "\n")
    return SearchResult(path, result)


def _bare(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe without its search."""
    return recipe.model_dump(mode="json", exclude_none=True, exclude={"search"})


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirectoryError(
            f"is damaged: {error}", where=str(file), remedy="delete this file; --resume then writes it again"
        ) from None
    return found


class _Search:
    """A search in its folder."""

    def __init__(
        self, run: RunDirectory, recipe: Recipe, space: list[SearchDimension], terminal: Terminal, should_stop: Any
    ) -> None:
        from tutelage.search.study import SearchStudy
        from tutelage.search.trials import TrialRunner

        assert recipe.search is not None
        self.run, self.recipe, self.space, self.terminal = run, recipe, space, terminal
        self.config, self.should_stop = recipe.search, should_stop
        self.bench = TrialRunner(terminal, should_stop, self.config.warmup)
        bare = recipe.model_copy(update={"search": None})
        self.taught = self.bench.train_teacher(bare, RunDirectory(run.path / "teacher"))
        self.base = _bare(self.taught)
        self.own = own_values(space)
        self.bench.terminal = Terminal(terminal.console, speaks=terminal.speaks)
        self.bench.terminal.live = False  # the line of the trials is
        if not (run.path / "search.journal").exists():
            self._try_out()
        self.known = SearchStudy(run.path / "search.journal", space, self.config)

    def _try_out(self) -> None:
        """Everything but training, for the recipe and for every end and value of the space."""
        self.bench.try_out(self.taught)
        for d in self.space:
            for value in d.ends():
                try:
                    self.bench.try_out(with_values(self.base, {d.key: value}))
                except TutelageError as error:
                    what = f"with {d.key}={json.dumps(value)}: {error.what}"
                    raise type(error)(what, where=error.where, remedy=error.remedy) from None

    # Trials ----------------------------------------------------------------------------------------

    def folder(self, number: int) -> Path:
        """A trial's run directory."""
        return self.run.path / "trials" / f"{number:04d}"

    def trials(self, workers: int) -> None:
        """Run what is left of the trials."""
        for told in self.known.trials():
            self._clear(told["number"])
        with self._shown() as show:
            if workers > 1 and self.known.taken() < self.config.trials:
                self._in_pool(min(workers, self.config.trials - self.known.taken()), show)
            while self.known.taken() < self.config.trials:
                ticket = self.known.next()
                report = partial(self.known.report, ticket.number)
                try:
                    result = self.bench.run(with_values(self.base, ticket.values), self.folder(ticket.number), report)
                except TutelageError as error:
                    result = self._failed(ticket.values, error)
                self._over(ticket.number, ticket.values, result, show)

    def _in_pool(self, workers: int, show: Any) -> None:
        from tutelage.search.workers import WorkerPool

        pool = WorkerPool(workers, self.config.warmup)
        try:
            while True:
                while pool.idle() and self.known.taken() < self.config.trials and not self.should_stop():
                    ticket = self.known.next()
                    pool.start(ticket, with_values(self.base, ticket.values), self.folder(ticket.number))
                if not pool.running:
                    return
                for ticket, said in pool.results(self.known.report, self.should_stop):
                    result = self._failed(ticket.values, said) if isinstance(said, TutelageError) else said
                    self._over(ticket.number, ticket.values, result, show)
        finally:
            pool.close()

    def _failed(self, values: Mapping[str, Any], error: TutelageError) -> Any:
        """A failed trial; the error itself where it is not of these values alone."""
        from tutelage.errors import Interrupted
        from tutelage.search.study import TrialResult

        if isinstance(error, Interrupted | RunDirectoryError) or values == self.own:
            raise error
        return TrialResult("failed", why=str(error))

    def _over(self, number: int, values: Mapping[str, Any], result: Any, show: Any) -> None:
        self.known.finish(number, result)
        self._clear(number)
        told = self.known.trials()
        best = chosen(told)
        mine = next(t for t in told if t["number"] == number)
        at = ", ".join(f"{key}={_shown(value)}" for key, value in values.items())
        if mine["validation"] is None or result.state != "finished":
            seen = f" at evaluation {len(mine['evaluations'])}" if mine["evaluations"] else ""
            what = f"{result.state}{seen}" + (f": {result.why}" if result.why else "")
        else:
            what = f"validation {mine['validation']:.2%}" + (", the best so far" if best is mine else "")
        self.terminal.say(f"trial {number}: {at}: {what}, {result.seconds:.0f} s")
        show(told, best)

    def _clear(self, number: int) -> None:
        """A finished trial needs no checkpoints."""
        shutil.rmtree(self.folder(number) / "checkpoints", ignore_errors=True)

    @contextmanager
    def _shown(self) -> Iterator[Any]:
        """A live line of how many trials are over, and the best; gives what is called after each."""
        if not self.terminal.live:
            yield lambda told, best: None
            return
        columns = (TextColumn("trials"), BarColumn(bar_width=24), TextColumn("{task.completed}/{task.total}"))
        line = Progress(
            *columns, TimeElapsedColumn(), TextColumn("{task.fields[best]}"), console=self.terminal.console,
            transient=True,
        )  # fmt: skip
        task = line.add_task("", total=self.config.trials, completed=self.known.taken(), best="")

        def show(told: list[dict[str, Any]], best: dict[str, Any] | None) -> None:
            words = "" if best is None else f"best {best['validation']:.2%} (trial {best['number']})"
            line.update(task, completed=len(told), best=words)

        with line:
            yield show

    # What was found ------------------------------------------------------------------------------------

    def tested(self, workers: int, seconds: float) -> dict[str, Any]:
        """The chosen recipe and the search's own, each run once in full; and ``search.json``.

        Raises:
            CapabilityError: no trial was trained to its end.
            Interrupted: a stop was asked for; the state is saved.
        """
        told = self.known.trials()
        best = chosen(told)
        if best is None:
            reasons = "; ".join(sorted({t["why"].splitlines()[0] for t in told if t["why"]})[:3])
            raise CapabilityError(
                f"none of {len(told)} trials came to its end" + (f": {reasons}" if reasons else ""),
                where=str(self.run.path), remedy="make the space smaller, or search.startup larger",
            )  # fmt: skip
        test = {"default": self._in_full("default", {})}
        same = best["values"] == self.own
        test["chosen"] = test["default"] if same else self._in_full("chosen", best["values"])
        own = next((t for t in told if t["values"] == self.own and t["state"] == "finished"), None)
        own_seeds = own["seeds"] if own is not None else self._last_validations("default")
        gains = {w: paired(test["chosen"][w]["values"], test["default"][w]["values"]) for w in ("best", "last")}
        return {
            "name": self.recipe.name,
            "objective": "validation accuracy after the last epoch, mean over seeds",
            "seeds": self.recipe.seeds,
            "settings": self.config.model_dump(mode="json", exclude={"space"}) | {"workers": workers},
            "space": [d.to_dict() for d in self.space],
            "trials": told,
            "importance": self.known.importance(),
            "best": best["number"],
            "default": {
                "trial": None if own is None else own["number"],
                "validation": statistics.fmean(own_seeds),
                "seeds": own_seeds,
            },
            "same": same,
            "gain_on_validation": paired(best["seeds"], own_seeds),
            "test": test | {"gain": gains},
            "seconds": round(sum(t["seconds"] for t in told), 1),
            "elapsed": round(seconds, 1),
        }

    def _in_full(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run the recipe with these values to the end in a folder of that name; its test accuracies over seeds."""
        path, recipe = self.run.path / name, with_values(self.base, values)
        _set_aside(path, dump_recipe(recipe))
        self.terminal.say(f"{name}: the recipe{' with the chosen values' if values else ' as it is'}, in full")
        done = run_recipe(recipe, out=path, resume=(path / "config.yaml").exists(), terminal=self.terminal)
        arm = done.summary["students"]["distilled"]
        return {which: arm[which]["accuracy"] for which in ("best", "last")}

    def _last_validations(self, name: str) -> list[float]:
        from tutelage.search.trials import validations

        run = RunDirectory(self.run.path / name)
        return [validations(run, f"distilled-seed{seed}")[-1]["validation"]["accuracy"] for seed in self.recipe.seeds]

    def best_yaml(self, found: Mapping[str, Any]) -> str:
        """The best recipe, with what was found as comments."""
        best = next(t for t in found["trials"] if t["number"] == found["best"])
        test = found["test"]
        lines = [
            f"The best of {len(found['trials'])} trials of a search, by validation: trial {best['number']}.",
            *(f"  {key} = {_shown(value)}" for key, value in best["values"].items()),
            f"Validation {best['validation']:.2%}; the recipe as it was has {found['default']['validation']:.2%}.",
            f"Test, last epoch: {test['chosen']['last']['mean']:.2%} against {test['default']['last']['mean']:.2%}, "
            f"{len(found['seeds'])} seed{'s' if len(found['seeds']) > 1 else ''}.",
        ]
        if self.taught.teacher != self.recipe.teacher:
            lines.append("The teacher is the one that the search trained; give teacher.train to train another.")
        recipe = with_values(self.base, best["values"])
        return "".join(f"# {line}\n" for line in lines) + dump_recipe(recipe)


def _set_aside(path: Path, config: str) -> None:
    """Rename the run that was the chosen one before there were more trials."""
    stored = path / "config.yaml"
    if stored.exists() and stored.read_text(encoding="utf-8") != config:
        free = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}-before-{n}").exists())
        path.rename(path.with_name(f"{path.name}-before-{free}"))


def chosen(trials: Sequence[Mapping[str, Any]]) -> Any:
    """The first of the finished trials with the highest validation accuracy; ``None`` where none is finished."""
    done = [t for t in trials if t["state"] == "finished"]
    return max(done, key=lambda t: (t["validation"], -t["number"]), default=None)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
