"""Runs a recipe that has a ``workflow``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tutelage.config import Recipe, dump_recipe
from tutelage.experiment.run import RunResult, open_run_directory, read_summary, run_recipe, set_up_run
from tutelage.multistage.assistants import assistant_chain
from tutelage.multistage.born_again import born_again, generation_zero
from tutelage.multistage.stages import StageRunner, stage_recipe
from tutelage.progress import Terminal

WORKFLOWS: dict[str, Callable[[StageRunner, torch.device], dict[str, Any]]] = {
    "assistant-chain": assistant_chain,
    "born-again": born_again,
}
"""Each runs its stages and writes the summary."""


def run_recipe_or_workflow(
    recipe: Recipe, *, out: str | Path | None = None, resume: bool = False, terminal: Terminal | None = None
) -> RunResult:
    """Run a recipe's workflow; without one this is :func:`run_recipe`."""
    if recipe.workflow is None:
        return run_recipe(recipe, out=out, resume=resume, terminal=terminal)
    path, accelerator, terminal = set_up_run(recipe, out, resume, terminal)
    with open_run_directory(path, dump_recipe(recipe), resume=resume, main=accelerator.is_main_process) as run:
        if run.summary.exists():
            terminal.say(f"{path} is finished; showing its results")
            return RunResult(path, read_summary(run.summary))
        stages = StageRunner(recipe, run, terminal)
        return RunResult(path, WORKFLOWS[recipe.workflow.kind](stages, accelerator.device))


def first_stage(recipe: Recipe) -> Recipe:
    """The recipe of a workflow's first run, for checks; a recipe without workflow itself."""
    if recipe.workflow is None:
        return recipe
    changes = generation_zero(recipe.seeds[0]) if recipe.teacher is None else {}
    return stage_recipe(recipe, "first", **changes)
