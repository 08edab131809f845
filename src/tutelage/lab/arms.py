"""The trainings behind the claims: each arm is a recipe that is run once and shared by all experiments."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tutelage.config import Recipe, build_recipe, dump_recipe
from tutelage.data import Data, SequentialBatches
from tutelage.engine import RunDirectory
from tutelage.errors import Interrupted
from tutelage.evaluation import evaluate
from tutelage.experiment.recipe_source import build_model, load_data
from tutelage.experiment.run import read_summary
from tutelage.experiment.teacher_setup import with_trained_weights
from tutelage.lab import llm
from tutelage.models import load_weights
from tutelage.multistage.run import run_recipe_or_workflow
from tutelage.progress import Terminal
from tutelage.reports.class_similarity import pairs_of, shares, square

SILENT = Terminal(speaks=False)

VIEWS = 30

Bases = Mapping[str, Recipe]
"""The recipes that arms start from, by the kind of data."""


@dataclass(frozen=True)
class Arm:
    """A recipe to run.

    Attributes:
        name: of its folder.
        changes: to the base recipe, section by section; a mapping is merged, ``None`` removes.
        base: the base recipe that it changes.
        cache: the cache of teacher outputs that such arms share; ``None`` where they have several teachers.
        augmented: images are augmented as the teacher's were, and shifted by up to a pixel, in 30 views.
        answers: of a closed teacher: ``own``, each to its prompt, or ``other``, each to another prompt.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    base: str = "images"
    cache: str | None = "images"
    augmented: bool = False
    answers: str | None = None


_FILE = yaml.safe_load((files(__package__) / "arms.yaml").read_text(encoding="utf-8"))

SMALL: dict[str, dict[str, Any]] = _FILE["small"]
"""Changes of the small budget to the base recipes."""

ARMS = {name: Arm(name, **fields) for name, fields in _FILE["arms"].items()}
"""Every arm of an experiment, by its name."""

FIRST = {"images": "kd", "texts": "triple"}
"""The arm that trains the teacher of its base; a closed teacher is trained already."""


def merged(base: Any, over: Any) -> Any:
    """``over`` merged into ``base``; a section of another kind replaces it."""
    if isinstance(base, dict) and isinstance(over, Mapping):
        if "kind" in over and over["kind"] != base.get("kind"):
            return dict(over)
        return {**base, **{k: merged(base.get(k), v) for k, v in over.items()}}
    return over


def recipe_of(bases: Bases, arm: Arm, out: Path) -> Recipe:
    """The recipe of an arm, with the teacher that the first arm of its base trained."""
    base, first = bases[arm.base], FIRST.get(arm.base)
    raw: dict[str, Any] = yaml.safe_load(dump_recipe(base))
    if first is not None and arm.name != first:
        raw["teacher"] = with_trained_weights(raw["teacher"], out / "arms" / first)
    raw = merged(raw, arm.changes)
    raw["name"] = f"{base.name}-{arm.name}"
    if arm.augmented:
        raw["data"] |= {"augment": [*(base.required_teacher.augment or []), {"shift": 1}], "views": VIEWS}
    if arm.cache is not None:
        raw["teacher"]["cache"] = {"path": str(out / "cache" / arm.cache), "dtype": "fp32"}
    if arm.answers is not None:
        folder = llm.data_folder(out)
        files = {"train": str(folder / f"{arm.answers}.jsonl"), "test": str(folder / "held.jsonl")}
        raw["data"] |= {"path": files, "tokenizer": f"hf:{folder / 'tokenizer'}"}
    if raw.get("teacher") is None:
        raw.pop("teacher", None)
    return build_recipe(raw, name=f"arm {arm.name}")


def run_arm(bases: Bases, name: str, out: Path, terminal: Terminal) -> dict[str, Any]:
    """The summary of an arm, which is run, resumed, or finished already."""
    folder = out / "arms" / name
    if (folder / "summary.json").exists():
        return read_summary(folder / "summary.json")
    recipe = recipe_of(bases, ARMS[name], out)
    resume = (folder / "config.yaml").exists()
    try:
        return run_recipe_or_workflow(recipe, out=folder, resume=resume, terminal=terminal).summary
    except Interrupted as stop:
        raise Interrupted(f"arm {name}: {stop.what}", remedy=f"go on with --resume --out {out}") from None


class Results:
    """The results of the arms.

    Args:
        bases: the recipes that arms start from.
        out: the folder of the lab.
    """

    def __init__(self, bases: Bases, out: Path) -> None:
        self.bases, self.out = bases, out
        self.base = bases["images"]
        self._logits: dict[str, Tensor] = {}

    @cached_property
    def _data(self) -> Data:
        return load_data(recipe_of(self.bases, ARMS["T1"], self.out), SILENT)

    def summary(self, arm: str) -> dict[str, Any]:
        """The summary of a finished arm."""
        return read_summary(self.out / "arms" / arm / "summary.json")

    def accuracy(
        self, arm: str, which: str = "distilled", weights: str = "last", key: str = "accuracy"
    ) -> list[float]:
        """Test accuracy, or another metric, of a run's students; one value a seed."""
        values: list[float] = self.summary(arm)["students"][which][weights][key]["values"]
        return values

    def row(self, arm: str, name: str, weights: str = "last") -> list[float]:
        """Test accuracy of a row of a multi-stage run; one value a seed."""
        row = next(row for row in self.summary(arm)["rows"] if row["name"] == name)
        values: list[float] = row[weights]["accuracy"]["values"]
        return values

    def untrained(self, arm: str, key: str = "loss") -> list[float]:
        """A test metric of a run's students before training; one value a seed."""
        recipe = recipe_of(self.bases, ARMS[arm], self.out)
        data = load_data(recipe, SILENT)
        models = (build_model(recipe.student, data, seed) for seed in recipe.seeds)
        return [float(evaluate(model, SequentialBatches(data.test), torch.device("cpu"))[key]) for model in models]

    def validation(self, arm: str) -> float:
        """Mean validation accuracy of a run's distilled students."""
        run = RunDirectory(self.out / "arms" / arm, writes=False)
        results = [run.result(f"distilled-seed{seed}") for seed in self.base.seeds]
        return sum(result["validation"]["accuracy"] for result in results if result) / len(results)

    def similarity(self, model: str, temperature: int) -> Tensor:
        """Similarity of each pair of classes for a model of the first arm, ``[pairs]``; see :func:`shares`."""
        file = self.out / "arms" / FIRST["images"] / "similarity" / f"{model}.json"
        raw = json.loads(file.read_text(encoding="utf-8"))
        return torch.from_numpy(pairs_of(shares(square(raw["sim"][str(temperature)], raw["classes"]))))

    def logits(self, model: str) -> Tensor:
        """Logits of a model of the first arm (``teacher``, ``baseline-seed0``) on the validation split, float64."""
        if model not in self._logits:
            recipe = recipe_of(self.bases, ARMS["T1"], self.out)
            data = self._data
            config = recipe.required_teacher if model == "teacher" else recipe.student
            net = build_model(config, data, 0)
            if model != "teacher":
                load_weights(net, self.out / "arms" / FIRST["images"] / "models" / model)
            net.eval()
            with torch.no_grad():
                batches = [net(batch.inputs).double() for batch in SequentialBatches(data.validation)]
            self._logits[model] = torch.cat(batches)
        return self._logits[model]
