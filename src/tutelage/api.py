"""The Python entry points: each runs a workflow and writes its report."""

import os
from collections.abc import Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from tutelage.config import EndpointRecipe, Recipe, load_recipe
from tutelage.engine import leave as leave
from tutelage.experiment.distill import DistillResult as DistillResult
from tutelage.experiment.distill import distill as _distill
from tutelage.experiment.run import RunResult
from tutelage.generation import judge_answers
from tutelage.generation.judge import JudgementResult as JudgementResult
from tutelage.multistage.run import run_recipe_or_workflow
from tutelage.progress import Terminal
from tutelage.reports import verdict, write_report
from tutelage.search.search import SearchResult as SearchResult
from tutelage.search.search import search_recipe


@wraps(_distill)
def distill(*args: Any, **kwargs: Any) -> DistillResult:
    """See :func:`tutelage.experiment.distill.distill`; writes ``report.html`` and prints the result."""
    run = _distill(*args, **kwargs)
    _report(run.path)
    terminal = Terminal(speaks=kwargs.get("verbose", True) and is_main())
    terminal.say(f"{verdict(run.summary)}\nstudent: {run.path / 'student'}\nreport:  {run.path / 'report.html'}")
    return run


def run(
    recipe: Recipe | str | Path,
    overrides: Iterable[str] = (),
    *,
    out: str | Path | None = None,
    resume: bool = False,
    terminal: Terminal | None = None,
) -> RunResult:
    """Run a recipe and write its report, like ``tutelage run``.

    Args:
        recipe: a recipe, or the path of its YAML file.
        overrides: ``key=value``, if ``recipe`` is a path.
        out: the run directory. Default: the first free one of ``runs/NAME``, ``runs/NAME-2`` ...
        resume: continue the run in that directory.
        terminal: shows progress.

    Raises:
        TutelageError: one of its subclasses, with the remedy.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    with loaded.locating():
        finished = run_recipe_or_workflow(loaded, out=out, resume=resume, terminal=terminal)
    _report(finished.path)
    return finished


def run_search(
    recipe: Recipe | str | Path,
    overrides: Iterable[str] = (),
    *,
    trials: int | None = None,
    keys: Sequence[str] = (),
    workers: int = 1,
    out: str | Path | None = None,
    resume: bool = False,
    terminal: Terminal | None = None,
) -> SearchResult:
    """Search a recipe's hyperparameters and write the report, like ``tutelage search``.

    Args:
        recipe: a recipe, or the path of its YAML file.
        overrides: ``key=value``, if ``recipe`` is a path.
        trials: the number of trials. Default: the recipe's ``search.trials``, 20.
        keys: the search space, instead of the recipe's: ``KEY=LOW:HIGH``, ``KEY=LOW:HIGH:log``, ``KEY=a,b,c``.
        workers: processes that run trials in parallel; above 1, call it under ``if __name__ == "__main__"``.
        out: the folder. Default: the first free one of ``runs/NAME-search``, ``runs/NAME-search-2`` ...
        resume: continue the search in that folder.
        terminal: shows progress.

    Raises:
        TutelageError: one of its subclasses, with the remedy.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    with loaded.locating():
        searched = search_recipe(
            loaded, trials=trials, keys=keys, workers=workers, out=out, resume=resume, terminal=terminal
        )
    for name in searched.runs:
        _report(searched.path / name)
    write_report([searched.path], searched.path / "search.html")
    return searched


def judge(
    recipe: EndpointRecipe | str | Path,
    overrides: Iterable[str] = (),
    *,
    out: str | Path | None = None,
    terminal: Terminal | None = None,
) -> JudgementResult:
    """Generate answers, let an endpoint judge them, and write the reports, like ``tutelage judge``.

    Args:
        recipe: the path of a YAML file, or its content as a :class:`Judgement`.
        overrides: ``key=value``, if ``recipe`` is a path.
        out: the folder. Default: ``runs/NAME-judge``.
        terminal: shows progress.

    Raises:
        TutelageError: one of its subclasses, with the remedy.
    """
    judged = judge_answers(recipe, overrides, out=out, terminal=terminal)
    write_report([judged.path], judged.path / "report.html")
    for run in judged.runs:
        _report(run)
    return judged


def is_main() -> bool:
    """Whether this is the main process, the only one that writes reports and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def _report(path: Path) -> None:
    if is_main():
        write_report([path], path / "report.html")
