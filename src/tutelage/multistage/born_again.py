"""``workflow: born-again``: generations of one architecture, each taught by the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tutelage.config import BornAgainConfig, Recipe
from tutelage.data import SequentialBatches
from tutelage.evaluation import evaluate_teacher
from tutelage.experiment.run import build_model, decoding, model_spec
from tutelage.models import load_weights
from tutelage.multistage.stages import ResultRow, StageRunner, best_of, conclude, result_of, signed, weights_of
from tutelage.teachers import EnsembleTeacher, LiveTeacher

OTHER_WEIGHTS = 100_003
"""Between the seeds of one generation and the next, so that each starts from weights of its own."""

CONTROLS: dict[str, dict[str, Any]] = {
    "label-smoothing": {"kind": "supervised", "label_smoothing": 0.1},
    "teacher-free": {"kind": "teacher-free"},
}
"""Methods that need no teacher."""


def born_again(stages: StageRunner, device: torch.device) -> dict[str, Any]:
    """Train generations 0 to N for each seed, score their ensembles, and compare.

    Generation 0 is the student trained alone; generation n starts from weights of its own and is taught by n-1, as in
    Furlanello et al., "Born-Again Neural Networks" (ICML 2018), section 3; its ensembles (section 3.1) are the means
    of the probabilities of generations 0 to n.
    """
    recipe, asked = stages.recipe, stages.recipe.workflow
    assert isinstance(asked, BornAgainConfig)
    generations: list[list[dict[str, Any]]] = [[] for _ in range(asked.generations + 1)]
    ensembles: list[list[dict[str, Any]]] = [[] for _ in range(asked.generations)]
    controls: dict[str, list[dict[str, Any]]] = {name: [] for name in asked.controls}
    last: list[tuple[Path, str]] = []
    parameters = 0
    for seed in recipe.seeds:
        stage = stages.stage(f"seed{seed}/generation-0", **untaught(seed))
        generations[0].append(result_of(stage, f"distilled-seed{seed}"))
        teachers = [weights_of(stage.path, f"distilled-seed{seed}")]
        for n in range(1, asked.generations + 1):
            stage = stages.stage(f"seed{seed}/generation-{n}", **taught(recipe, seed, n, teachers[-1]))
            name = f"distilled-seed{born(seed, n)}"
            generations[n].append(result_of(stage, name))
            teachers.append(weights_of(stage.path, name))
            parameters = stage.summary["parameters"]["student"]
        last.append((stage.path, name))
        for name in asked.controls:
            control = born(seed, 1)
            changes = taught(recipe, seed, 1, teachers[0])
            stage = stages.stage(f"seed{seed}/{name}", **{**changes, "method": CONTROLS[name]})
            controls[name].append(result_of(stage, f"distilled-seed{control}"))
        if asked.ensemble:
            for n, scores in enumerate(scored_together(stages, teachers, device)):
                ensembles[n].append(scores)
    rows = [
        ResultRow(
            f"generation {n}", "baseline" if n == 0 else "distilled", results, parameters,
            taught_by=f"generation {n - 1}" if n else None,
            against=[f"generation {other}" for other in dict.fromkeys((n - 1, 0)) if n],
            step=n,
        )
        for n, results in enumerate(generations)
    ]  # fmt: skip
    if asked.ensemble:
        rows += [
            ResultRow(f"ensemble of 0 to {n}", "ensemble", results, (n + 1) * parameters,
                against=[f"generation {n}"], step=n)
            for n, results in enumerate(ensembles, 1)
        ]  # fmt: skip
    rows += [
        ResultRow(name, "control", results, parameters, against=["generation 0", "generation 1"])
        for name, results in controls.items()
    ]
    return conclude(stages, "born-again", rows, _verdict, last[best_of(generations[-1])])


def born(seed: int, generation: int) -> int:
    """The seed of a generation."""
    return (seed + OTHER_WEIGHTS * generation) % 2**32


def untaught(seed: int) -> dict[str, Any]:
    """In what the stage of generation 0 differs from the recipe: the baseline student, on its labelled images."""
    return {"method": {"kind": "supervised"}, "seeds": [seed], "baseline": False}


def taught(recipe: Recipe, seed: int, generation: int, teacher: str) -> dict[str, Any]:
    """In what the stage of a later generation differs, whose teacher has its weights in the folder ``teacher``."""
    section = {"model": recipe.student.model, "options": dict(recipe.student.options), "checkpoint": teacher}
    return {"teacher": section, "seeds": [born(seed, generation)], "baseline": False}


def scored_together(stages: StageRunner, folders: Sequence[str], device: torch.device) -> list[Any]:
    """The scores of the ensembles of the first two, three ... models, as results."""
    recipe = stages.recipe
    data = stages.data(recipe)
    spec, models = model_spec(recipe.student, data), []
    for folder in folders:
        model = build_model(recipe.student, spec, data, 0)
        load_weights(model, Path(folder))
        models.append(LiveTeacher(model).to(device))
    workers = decoding(recipe, data)
    splits = {
        "test": SequentialBatches(data.test, workers=workers),
        "validation": SequentialBatches(data.validation, workers=workers),
    }
    found = []
    for many in range(2, len(models) + 1):
        together = EnsembleTeacher(models[:many])
        scores = {split: evaluate_teacher(together, batches, device) for split, batches in splits.items()}
        found.append({"best": scores["test"], "last": scores["test"], "validation": scores["validation"]})
    return found


def _verdict(rows: Mapping[str, Any]) -> str:
    taught_rows = [row for row in rows.values() if row["role"] == "distilled"]
    last = taught_rows[-1]
    steps = [
        f"Generation {row['step']} {signed(next(iter(row['against'].values()))['best'])} over generation "
        f"{row['step'] - 1}"
        for row in taught_rows
    ]
    whole = f"; {signed(last['against']['generation 0']['best'])} in all" if len(taught_rows) > 1 else ""
    together = rows.get(f"ensemble of 0 to {last['step']}")
    if together is not None:
        gain = signed(next(iter(together["against"].values()))["best"])
        whole += f"; their ensemble {gain} over the last"
    return "; ".join(steps).replace("; G", "; g") + whole + "."
