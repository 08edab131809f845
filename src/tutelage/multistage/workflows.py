"""Carrying out a recipe's ``workflow``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tutelage.config import Recipe, dump_recipe
from tutelage.experiment.open_run import open_run_directory
from tutelage.experiment.run import RunResult, prepared, read_summary, run_recipe
from tutelage.multistage.assistants import assistant_chain
from tutelage.multistage.born_again import born_again, untaught
from tutelage.multistage.stages import StageRunner, staged
from tutelage.progress import Terminal

WORKFLOWS: dict[str, Callable[[StageRunner, torch.device], dict[str, Any]]] = {
    "assistant-chain": assistant_chain,
    "born-again": born_again,
}
"""Each runs its stages and writes the summary."""


def run_workflow(
    recipe: Recipe, *, out: str | Path | None = None, resume: bool = False, terminal: Terminal | None = None
) -> RunResult:
    """Carry out a recipe's workflow, or go on with it.

    Args:
        recipe: one that has a ``workflow``.
        out: the folder. Default: the first free of ``runs/NAME``, ``runs/NAME-2`` ...
        resume: go on with the workflow in that folder: finished stages stay, the one that was stopped goes on.
        terminal: where progress is shown.

    Raises:
        TutelageError: one of its subclasses, with the remedy.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """
    assert recipe.workflow is not None
    path, accelerator, terminal = prepared(recipe, out, resume, terminal)
    with open_run_directory(path, dump_recipe(recipe), resume=resume, main=accelerator.is_main_process) as run:
        if run.summary.exists():
            terminal.say(f"{path} is finished; showing what it found")
            return RunResult(path, read_summary(run.summary))
        stages = StageRunner(recipe, run, terminal)
        return RunResult(path, WORKFLOWS[recipe.workflow.kind](stages, accelerator.device))


def run_recipe_or_workflow(
    recipe: Recipe, *, out: str | Path | None = None, resume: bool = False, terminal: Terminal | None = None
) -> RunResult:
    """:func:`run_workflow` where the recipe has a workflow, else :func:`run_recipe`."""
    how = run_recipe if recipe.workflow is None else run_workflow
    return how(recipe, out=out, resume=resume, terminal=terminal)


def first_stage(recipe: Recipe) -> Recipe:
    """A recipe of one run that shows what the workflow would meet; the recipe itself where it has no workflow."""
    if recipe.workflow is None:
        return recipe
    changes = untaught(recipe.seeds[0]) if recipe.teacher is None else {}
    return staged(recipe, "first", **changes)
