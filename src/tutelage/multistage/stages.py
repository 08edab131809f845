"""Workflows of several runs: each run is a stage in a folder of its own, and goes on where it stopped.

::

    config.yaml     the resolved recipe, with its workflow
    stages/NAME/    a run directory for each stage
    student/        the exported student
    summary.json    what the workflow found; written at the end
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
from tutelage.evaluation.statistics import paired, spread
from tutelage.experiment.run import RunResult, load_data, read_summary, run_data
from tutelage.files import write_text
from tutelage.progress import Terminal


@dataclass
class StageRunner:
    """The runs of one workflow.

    Args:
        recipe: of the workflow.
        run: its folder.
        terminal: where progress is shown.
    """

    recipe: Recipe
    run: RunDirectory
    terminal: Terminal
    names: list[str] = field(default_factory=list)
    _data: dict[str, Data] = field(default_factory=dict)

    def data(self, recipe: Recipe) -> Data:
        """The data of a stage; read once for all stages that have the same."""
        augment = None if recipe.teacher is None else recipe.teacher.augment
        key = json.dumps([recipe.data.model_dump(mode="json"), augment])
        if key not in self._data:
            self._data[key] = load_data(recipe, self.terminal)
        return self._data[key]

    def path(self, name: str) -> Path:
        """The folder of a stage."""
        return self.run.path / "stages" / name

    def stage(self, name: str, **changes: Any) -> RunResult:
        """Run a stage, or go on with it, or find it finished: the workflow's recipe with other sections.

        Args:
            name: of its folder.
            changes: sections of the recipe in place of the workflow's.
        """
        path = self.path(name)
        self.names.append(name)
        summary = path / "summary.json"
        if summary.exists():  # whatever its paths were then; the workflow's own settings are checked
            return RunResult(path, read_summary(summary))
        stage = staged(self.recipe, name, **changes)
        self.terminal.say(f"stage {name}")
        return run_data(stage, self.data(stage), path, resume=(path / "config.yaml").exists(), terminal=self.terminal)


def staged(recipe: Recipe, name: str, **changes: Any) -> Recipe:
    """The recipe of a stage: the workflow's with other sections."""
    raw: dict[str, Any] = yaml.safe_load(dump_recipe(recipe))
    raw.pop("workflow", None)
    raw["name"] = f"{recipe.name}-{name.replace('/', '-')}"
    return build_recipe({**raw, **changes}, name=f"stage {name}")


def weights_of(stage: Path, training: str) -> str:
    """The folder of a finished training's model, as a recipe's ``checkpoint``."""
    return str(stage / "models" / training)


def with_trained_weights(teacher: Mapping[str, Any], stage: Path) -> dict[str, Any]:
    """The section ``teacher`` of later stages, once ``stage`` trained what had no weights."""

    def ready(one: Mapping[str, Any], name: str) -> dict[str, Any]:
        if one.get("train") is None:
            return dict(one)
        kept = {k: v for k, v in one.items() if k not in ("train", "trained", "trainable")}
        return {**kept, "checkpoint": weights_of(stage, name)}

    if teacher.get("members") is None:
        return ready(teacher, "teacher")
    members = [ready(member, f"teacher-{i}") for i, member in enumerate(teacher["members"])]
    return {**teacher, "members": members}


@dataclass
class ResultRow:
    """A line of a workflow's table: one kind of model over the seeds.

    Attributes:
        name: what it is.
        role: ``teacher``, ``baseline``, ``distilled``, ``assistant``, ``ensemble`` or ``control``.
        results: for each seed ``best`` and ``last`` figures of the test split, and ``validation``.
        parameters: of one such model.
        taught_by: the name of another row, where there is one.
        against: names of rows that it is compared with, seed by seed.
        step: its place in the order of training, where it has one.
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


def conclude(
    stages: StageRunner,
    kind: str,
    rows: Sequence[ResultRow],
    verdict: Callable[[Mapping[str, Any]], str],
    exported: tuple[Path, str],
    **more: Any,
) -> dict[str, Any]:
    """Write the workflow's summary and its student.

    Args:
        stages: the runs.
        kind: of the workflow.
        rows: of its table.
        verdict: what was found, in a sentence, of the rows by name.
        exported: a stage's folder and the training whose model is the workflow's student.
        more: what else the summary holds.
    """
    known = {row.name: row for row in rows}
    table: list[dict[str, Any]] = []
    for row in rows:
        validation = [r["validation"]["accuracy"] for r in row.results if r.get("validation")]
        table.append(
            {
                "name": row.name, "role": row.role, "taught_by": row.taught_by, "step": row.step,
                "parameters": row.parameters,
                **{
                    which: {
                        figure: spread(row.values(which, figure))
                        for figure in ("accuracy", "loss", "agreement", "ece")
                        if all(figure in r[which] for r in row.results)
                    }
                    for which in ("best", "last")
                },
                "validation": spread(validation) if len(validation) == len(row.results) else None,
                "against": {other: _against(row, known[other]) for other in row.against},
            }
        )  # fmt: skip
    summary: dict[str, Any] = {
        "workflow": kind,
        "name": stages.recipe.name,
        "seeds": list(stages.recipe.seeds),
        "rows": table,
        "stages": list(dict.fromkeys(stages.names)),
        "exported": f"{exported[0].relative_to(stages.run.path)}/models/{exported[1]}",
        **more,
    }
    summary["verdict"] = verdict({row["name"]: row for row in table})
    if stages.run.writes:
        stages.run.export(exported[0] / "models" / exported[1])
        write_text(stages.run.summary, json.dumps(summary, indent=1) + "\n")
    return summary


def _against(row: ResultRow, other: ResultRow) -> dict[str, Any]:
    return {which: paired(row.values(which), other.values(which)) for which in ("best", "last")}


def result_of(stage: RunResult, training: str) -> dict[str, Any]:
    """The result of a training in a finished stage.

    Raises:
        RunDirectoryError: its folder is gone or damaged.
    """
    found = RunDirectory(stage.path, writes=False).result(training)
    if found is None:
        raise RunDirectoryError(
            f"has no model {training}",
            where=str(stage.path),
            remedy="delete that stage's folder; --resume then trains it again",
        )
    return found


def best_of(results: Sequence[Mapping[str, Any]]) -> int:
    """Which is best on validation; the first of equals, and the first where there is no validation."""
    scores = [(r.get("validation") or {}).get("accuracy") or 0.0 for r in results]
    return scores.index(max(scores))


def signed(difference: Mapping[str, Any]) -> str:
    """``+1.20 points (+0.80 to +1.60)`` of a paired difference of accuracies."""
    held = ""
    if difference["low"] is not None:
        held = f" ({100 * difference['low']:+.2f} to {100 * difference['high']:+.2f})"
    return f"{100 * difference['mean']:+.2f} points{held}".replace("-", "−")
