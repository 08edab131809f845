"""Workflows of several runs: each run is a stage with a folder of its own, and continues where it stopped.

::

    config.yaml     the resolved recipe, with its workflow
    stages/NAME/    a run directory for each stage
    student/        the exported student
    summary.json    the results of the workflow; written at the end
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tutelage.config import Recipe, build_recipe, dump_recipe
from tutelage.data import Data
from tutelage.engine import RunDirectory
from tutelage.errors import RunDirectoryError
from tutelage.evaluation.statistics import paired_difference, spread
from tutelage.experiment.recipe_source import data_key, load_data
from tutelage.experiment.run import RunResult, read_summary, run_on_data
from tutelage.files import write_text
from tutelage.progress import Terminal


@dataclass
class StageRunner:
    """The runs of one workflow."""

    recipe: Recipe
    run: RunDirectory
    terminal: Terminal
    names: list[str] = field(default_factory=list)
    _data: dict[str, Data] = field(default_factory=dict)

    def data(self, recipe: Recipe) -> Data:
        """The data of a stage; stages with the same data share one copy."""
        key = data_key(recipe)
        if key not in self._data:
            self._data[key] = load_data(recipe, self.terminal)
        return self._data[key]

    def path(self, name: str) -> Path:
        """The folder of a stage."""
        return self.run.path / "stages" / name

    def run_stage(self, name: str, **changes: Any) -> RunResult:
        """Run a stage, or continue it; a finished stage is only read."""
        path = self.path(name)
        self.names.append(name)
        summary = path / "summary.json"
        if summary.exists():  # its recipe may have other paths; the workflow's own recipe has been checked
            return RunResult(path, read_summary(summary))
        stage = stage_recipe(self.recipe, name, **changes)
        self.terminal.say(f"stage {name}")
        return run_on_data(
            stage, self.data(stage), path, resume=(path / "config.yaml").exists(), terminal=self.terminal
        )


def stage_recipe(recipe: Recipe, name: str, **changes: Any) -> Recipe:
    """The recipe of a stage: the workflow's, with ``changes`` in place of its sections."""
    raw: dict[str, Any] = yaml.safe_load(dump_recipe(recipe))
    raw.pop("workflow", None)
    raw["name"] = f"{recipe.name}-{name.replace('/', '-')}"
    return build_recipe({**raw, **changes}, name=f"stage {name}")


@dataclass
class ResultRow:
    """A row of a workflow's table: one kind of model over the seeds.

    Attributes:
        results: for each seed ``best`` and ``last`` figures of the test split, and ``validation``.
        against: names of rows that it is compared with, seed by seed.
        step: its place in the order of training, if any.
    """

    name: str
    role: str
    results: list[dict[str, Any]]
    parameters: int
    taught_by: str | None = None
    against: Sequence[str] = ()
    step: int | None = None

    def values(self, which: str, figure: str = "accuracy") -> list[float]:
        """A figure of the test split for each seed."""
        return [float(r[which][figure]) for r in self.results]

    def to_dict(self, rows: Mapping[str, ResultRow]) -> dict[str, Any]:
        """The row as ``summary.json`` has it; ``rows`` are all rows by name."""
        validation = [r["validation"]["accuracy"] for r in self.results if r.get("validation")]
        figures = {
            which: {
                figure: spread(self.values(which, figure))
                for figure in ("accuracy", "loss", "agreement", "ece")
                if all(figure in r[which] for r in self.results)
            }
            for which in ("best", "last")
        }
        against = {
            other: {
                which: paired_difference(self.values(which), rows[other].values(which)) for which in ("best", "last")
            }
            for other in self.against
        }
        return {
            "name": self.name, "role": self.role, "taught_by": self.taught_by, "step": self.step,
            "parameters": self.parameters, **figures,
            "validation": spread(validation) if len(validation) == len(self.results) else None, "against": against,
        }  # fmt: skip


def write_summary(
    stages: StageRunner, kind: str, rows: Sequence[ResultRow], verdict: Callable[[Mapping[str, Any]], str],
    exported: tuple[Path, str], **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write the workflow's summary, and export its student.

    Args:
        verdict: gives the conclusion in a sentence, from the rows by name.
        exported: a stage's folder, and the training whose model is the workflow's student.
    """
    by_name = {row.name: row for row in rows}
    table = [row.to_dict(by_name) for row in rows]
    summary: dict[str, Any] = {
        "workflow": kind,
        "name": stages.recipe.name,
        "seeds": list(stages.recipe.seeds),
        "rows": table,
        "stages": list(dict.fromkeys(stages.names)),
        "exported": f"{exported[0].relative_to(stages.run.path)}/models/{exported[1]}",
        **more,
        "verdict": verdict({row["name"]: row for row in table}),
    }
    if stages.run.writes:
        stages.run.export(exported[0] / "models" / exported[1])
        write_text(stages.run.summary, json.dumps(summary, indent=1) + "\n")
    return summary


def load_result(stage: RunResult, training: str) -> dict[str, Any]:
    """The result of a training in a finished stage."""
    result = RunDirectory(stage.path, writes=False).result(training)
    if result is None:
        raise RunDirectoryError(
            f"has no model {training}", where=str(stage.path),
            remedy="delete the folder of that stage; --resume then trains it again",
        )  # fmt: skip
    return result


def best_of(results: Sequence[Mapping[str, Any]]) -> int:
    """The index of the best result on validation; the first of equals, and the first without validation."""
    scores = [(r.get("validation") or {}).get("accuracy") or 0.0 for r in results]
    return scores.index(max(scores))


def format_gain(difference: Mapping[str, Any]) -> str:
    """``+1.20 points (+0.80 to +1.60)`` of a paired difference of accuracies."""
    interval = ""
    if difference["low"] is not None:
        interval = f" ({100 * difference['low']:+.2f} to {100 * difference['high']:+.2f})"
    return f"{100 * difference['mean']:+.2f} points{interval}".replace("-", "−")
