"""``workflow: born-again``: generations of one architecture, each distilled from the one before."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tutelage.config import BornAgainConfig, Recipe
from tutelage.data import SequentialBatches
from tutelage.evaluation import evaluate_teacher
from tutelage.experiment.recipe_source import build_model, evaluation_workers
from tutelage.experiment.teacher_setup import checkpoint_path
from tutelage.models import load_weights
from tutelage.multistage.stages import ResultRow, StageRunner, best_of, format_gain, load_result, write_summary
from tutelage.teachers import EnsembleTeacher, LiveTeacher

SEED_STEP = 100_003
"""Difference between the seeds of two generations, so that each starts from other weights."""

CONTROLS: dict[str, dict[str, Any]] = {
    "label-smoothing": {"kind": "supervised", "label_smoothing": 0.1},
    "teacher-free": {"kind": "teacher-free"},
}
"""Methods without a teacher."""


def born_again(stages: StageRunner, device: torch.device) -> dict[str, Any]:
    """Train generations 0 to N for each seed, evaluate their ensembles, and compare.

    Generation 0 learns from labels only; generation n starts from weights of its own and learns from generation n-1,
    as in Furlanello et al., "Born-Again Neural Networks" (ICML 2018), section 3. The ensembles (section 3.1) are the
    means of the probabilities of generations 0 to n.
    """
    recipe, config = stages.recipe, stages.recipe.workflow
    assert isinstance(config, BornAgainConfig)
    generations: list[list[dict[str, Any]]] = [[] for _ in range(config.generations + 1)]
    ensembles: list[list[dict[str, Any]]] = [[] for _ in range(config.generations)]
    controls: dict[str, list[dict[str, Any]]] = {name: [] for name in config.controls}
    last: list[tuple[Path, str]] = []
    size = 0
    for seed in recipe.seeds:
        name = f"distilled-seed{seed}"
        stage = stages.run_stage(f"seed{seed}/generation-0", **generation_zero(seed))
        generations[0].append(load_result(stage, name))
        teachers = [checkpoint_path(stage.path, name)]
        for n in range(1, config.generations + 1):
            changes = later_generation(recipe, seed, n, teachers[-1])
            stage = stages.run_stage(f"seed{seed}/generation-{n}", **changes)
            name = f"distilled-seed{generation_seed(seed, n)}"
            generations[n].append(load_result(stage, name))
            teachers.append(checkpoint_path(stage.path, name))
            size = stage.summary["parameters"]["student"]
        last.append((stage.path, name))
        for control in config.controls:
            changes = {**later_generation(recipe, seed, 1, teachers[0]), "method": CONTROLS[control]}
            stage = stages.run_stage(f"seed{seed}/{control}", **changes)
            controls[control].append(load_result(stage, f"distilled-seed{generation_seed(seed, 1)}"))
        if config.ensemble:
            for results, scores in zip(ensembles, evaluate_ensembles(stages, teachers, device), strict=True):
                results.append(scores)
    rows = []
    for n, results in enumerate(generations):
        of = f"generation {n - 1}" if n else None
        against = [f"generation {other}" for other in dict.fromkeys((n - 1, 0)) if n]
        role = "distilled" if n else "baseline"
        rows.append(ResultRow(f"generation {n}", role, results, size, of, against, step=n))
    for n, results in enumerate(ensembles if config.ensemble else [], 1):
        against = [f"generation {n}"]
        rows.append(ResultRow(_ensemble(n), "ensemble", results, (n + 1) * size, against=against, step=n))
    for name, results in controls.items():
        rows.append(ResultRow(name, "control", results, size, against=["generation 0", "generation 1"]))
    return write_summary(stages, "born-again", rows, _verdict, last[best_of(generations[-1])])


def _ensemble(generation: int) -> str:
    return f"ensemble of 0 to {generation}"


def generation_seed(seed: int, generation: int) -> int:
    """The seed of a generation."""
    return (seed + SEED_STEP * generation) % 2**32


def generation_zero(seed: int) -> dict[str, Any]:
    """Sections of the recipe of generation 0, which learns from labels only."""
    return {"method": {"kind": "supervised"}, "seeds": [seed], "baseline": False}


def later_generation(recipe: Recipe, seed: int, generation: int, checkpoint: str) -> dict[str, Any]:
    """Sections of the recipe of a later generation; ``checkpoint`` is the folder of its teacher's weights."""
    teacher = {"model": recipe.student.model, "options": dict(recipe.student.options), "checkpoint": checkpoint}
    return {"teacher": teacher, "seeds": [generation_seed(seed, generation)], "baseline": False}


def evaluate_ensembles(stages: StageRunner, folders: Sequence[str], device: torch.device) -> list[Any]:
    """Results of the ensembles of the first two, three ... models."""
    recipe = stages.recipe
    data = stages.data(recipe)
    models = []
    for folder in folders:
        model = build_model(recipe.student, data, 0)
        load_weights(model, Path(folder))
        models.append(LiveTeacher(model).to(device))
    workers = evaluation_workers(recipe, data)
    splits = {
        "test": SequentialBatches(data.test, workers=workers),
        "validation": SequentialBatches(data.validation, workers=workers),
    }
    results = []
    for count in range(2, len(models) + 1):
        ensemble = EnsembleTeacher(models[:count])
        scores = {split: evaluate_teacher(ensemble, batches, device) for split, batches in splits.items()}
        results.append({"best": scores["test"], "last": scores["test"], "validation": scores["validation"]})
    return results


def _verdict(rows: Mapping[str, Any]) -> str:
    generations = [row for row in rows.values() if row["role"] == "distilled"]
    last = generations[-1]
    parts = [
        f"{'g' if i else 'G'}eneration {row['step']} {_first_gain(row)} over generation {row['step'] - 1}"
        for i, row in enumerate(generations)
    ]
    if len(generations) > 1:
        parts.append(f"{format_gain(last['against']['generation 0']['best'])} in all")
    if (ensemble := rows.get(_ensemble(last["step"]))) is not None:
        parts.append(f"their ensemble {_first_gain(ensemble)} over the last")
    return "; ".join(parts) + "."


def _first_gain(row: Mapping[str, Any]) -> str:
    return format_gain(next(iter(row["against"].values()))["best"])
