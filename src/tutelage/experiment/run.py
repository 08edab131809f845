"""``tutelage run``: runs the experiment of a recipe in a run directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.config import Recipe, dump_recipe
from tutelage.data import Data
from tutelage.engine import Accelerator, broadcast_from_main, build_accelerator, open_trackers
from tutelage.errors import ConfigError, RunDirectoryError
from tutelage.experiment.checks import warn_of_precision
from tutelage.experiment.compare import compare
from tutelage.experiment.open_run import choose_run_directory, open_run_directory
from tutelage.experiment.recipe_source import load_data, recipe_spec
from tutelage.experiment.spec import RunContext
from tutelage.interrupts import catch_interrupts
from tutelage.progress import Terminal


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and its summary."""

    path: Path
    summary: dict[str, Any]


def run_recipe(
    recipe: Recipe, *, out: str | Path | None = None, resume: bool = False, terminal: Terminal | None = None
) -> RunResult:
    """Train the teacher if it has no weights, the baseline student and the distilled student, and compare them."""
    if recipe.workflow is not None:
        raise ConfigError(
            f"run_recipe does not run workflows, and this recipe has {recipe.workflow.kind!r}",
            where="workflow",
            remedy="call tutelage.api.run, or remove workflow from the recipe",
        )
    path, accelerator, terminal = set_up_run(recipe, out, resume, terminal)
    return run_on_data(recipe, None, path, resume=resume, terminal=terminal, accelerator=accelerator)


def set_up_run(
    recipe: Recipe, out: str | Path | None, resume: bool, terminal: Terminal | None
) -> tuple[Path, Accelerator, Terminal]:
    """The run directory, the same for all processes; this process's accelerator; and where it shows progress."""
    accelerator = build_accelerator(recipe.train.precision, list(recipe.train.trackers))
    path = broadcast_from_main(accelerator, lambda: choose_run_directory(out, recipe.name, resume))
    terminal = (terminal or Terminal()).only_on(accelerator.is_main_process)
    warn_of_precision(accelerator, terminal)
    return path, accelerator, terminal


def run_on_data(
    recipe: Recipe,
    data: Data | None,
    path: Path,
    *,
    resume: bool,
    terminal: Terminal,
    accelerator: Accelerator | None = None,
) -> RunResult:
    """:func:`run_recipe` in the folder ``path``, on loaded data; ``None`` loads the recipe's."""
    accelerator = accelerator or build_accelerator(recipe.train.precision, list(recipe.train.trackers))
    with open_run_directory(path, dump_recipe(recipe), resume=resume, main=accelerator.is_main_process) as run:
        if run.summary.exists():
            terminal.say(f"{path} is finished; showing its results")
            return RunResult(path, read_summary(run.summary))
        processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
        terminal.say(f"run directory: {path}{processes}")
        data = data or load_data(recipe, terminal)
        tracked = open_trackers(accelerator, path / "trackers", {"recipe": dump_recipe(recipe)})
        with catch_interrupts(terminal.say) as should_stop, tracked:
            summary = compare(recipe_spec(recipe, data), RunContext(accelerator, run, terminal, should_stop))
    return RunResult(path, summary)


def read_summary(path: Path) -> dict[str, Any]:
    """The ``summary.json`` of a finished run or workflow."""
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirectoryError(
            f"is damaged: {error}", where=str(path), remedy="delete this file; --resume then writes it again"
        ) from None
    return summary
