"""Loads what a finished run left: its student, recipe, figures and data."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tutelage.config import Recipe, TextDataConfig, build_recipe, load_recipe
from tutelage.data import Data, load_texts
from tutelage.data.preprocessing import Preprocessing, differences
from tutelage.data.tokens import tokenizer_fingerprint
from tutelage.errors import CheckpointError, ConfigError, DataError, RunDirectoryError, nearest
from tutelage.experiment.image_inputs import load_recipe_images
from tutelage.experiment.run import read_config, read_summary
from tutelage.export.bundle import Inputs, ModelBundle, load_bundle, named_inputs
from tutelage.models import MODEL_CARD
from tutelage.models.files import read_card
from tutelage.models.pretrained import SentenceEncoder
from tutelage.models.sentence_modules import ranking_prompts
from tutelage.progress import Terminal

SUMMARY, CONFIG, STUDENT = "summary.json", "config.yaml", "student"

BATCH = 16
"""Rows of a batch that is compared or calibrated with."""


@dataclass(frozen=True)
class SavedModel:
    """A model in its folder, and the run that it belongs to.

    Attributes:
        run: the run directory that it is in; ``None`` if there is none.
        recipe: that run's; ``None`` for a run of :func:`tutelage.distill`, or without a run.
    """

    folder: Path
    run: Path | None
    recipe: Recipe | None
    config: dict[str, Any]
    summary: dict[str, Any]
    terminal: Terminal

    @cached_property
    def bundle(self) -> ModelBundle:
        """The model."""
        return load_bundle(self.folder)

    @property
    def is_student(self) -> bool:
        """Whether it is the student that its run exported."""
        return self.run is not None and self.folder == self.run / STUDENT

    def data(self) -> Data | None:
        """The run's data, as this model reads it; ``None`` where no recipe says which."""
        return None if self.recipe is None else data_of(self.recipe, self.bundle, self.terminal, is_own=True)


def find(path: str | Path, terminal: Terminal) -> SavedModel:
    """The student of a run, or the model in a folder, with its run."""
    given = Path(path)
    if not given.is_dir():
        siblings = [str(p) for p in given.parent.glob("*")] if given.parent.is_dir() else []
        close = nearest(str(given), siblings, 1)
        raise RunDirectoryError(
            "no such folder",
            where=str(given),
            remedy=f"did you mean {close[0]}?" if close else "give a run, or a folder with a model",
        )
    if (given / CONFIG).is_file():
        if not (given / STUDENT).is_dir():
            raise RunDirectoryError(
                "has no student yet", where=str(given), remedy="finish the run first: tutelage run ... --resume"
            )
        return _load_saved_model(given / STUDENT, given, terminal)
    run = next((p for p in given.resolve().parents[:2] if (p / CONFIG).is_file() and (p / SUMMARY).is_file()), None)
    return _load_saved_model(given, run, terminal)


def _load_saved_model(folder: Path, run: Path | None, terminal: Terminal) -> SavedModel:
    if run is None:
        return SavedModel(folder, None, None, {}, {}, terminal)
    config = read_config(run / CONFIG, "give the folder of the model itself")
    recipe = build_recipe(config, name=str(run / CONFIG)) if "data" in config else None
    summary = read_summary(run / SUMMARY) if (run / SUMMARY).is_file() else {}
    return SavedModel(folder, run, recipe, config, summary, terminal)


def data_of(recipe: Recipe, bundle: ModelBundle, terminal: Terminal, *, is_own: bool = False) -> Data:
    """The data of a recipe as a model reads it: with its class order, its preprocessing and its tokenizer.

    ``is_own``: the model was trained by this recipe.
    """
    config = recipe.data
    if not isinstance(config, TextDataConfig):
        own: dict[str, Any] = {"augment": [], "labels": None}
        if bundle.classes:
            own["classes"] = bundle.classes
        data = load_recipe_images(recipe.model_copy(update={"data": config.model_copy(update=own)}), terminal)
        if "mean" not in bundle.preprocessing:
            return data
        known, actual = Preprocessing.from_dict(bundle.preprocessing), data.train.preprocessing
        changed = [line for line in differences(actual, known) if line.startswith(("mean", "std"))]
        # the normalisation of images in memory is computed from them
        if changed and is_own and known.geometry == actual.geometry and not data.notes:
            raise DataError(
                f"these are not the training images of the run: {changed[0]} (the run's value is in brackets)",
                where=str(config.path or config.source),
                remedy="restore the images that the run was trained on",
            )
        return data.read_as(known)
    if bundle.folder is not None and (bundle.folder / MODEL_CARD).exists():
        known_tokenizer = (read_card(bundle.folder).get("preprocessing") or {}).get("tokenizer")
        if known_tokenizer is not None and tokenizer_fingerprint(bundle.tokenizer) != known_tokenizer:
            raise CheckpointError(
                "the tokenizer next to the model is not the one that it was trained with",
                where=str(bundle.folder),
                remedy="restore the files that the run wrote",
            )
    unused = {"kind", "metric", "tokenizer", "views", "workers", "classes", "pack", "teacher_text", "labels",
              "route", "prompt", "teacher_prompt"}  # fmt: skip
    fields, model = config.model_dump(exclude=unused), bundle.model
    prompts: list[str] = []
    if isinstance(model, SentenceEncoder):
        prompts = ranking_prompts(model.after.settings) if config.task == "ranking" else [model.after.prompt]
    return load_texts(
        **fields, tokenizer=bundle.tokenizer, classes=bundle.classes or None, prompts=(prompts, prompts),
        progress=terminal.iterate,
    )  # fmt: skip


def rows_of(split: Any, count: int, task: str, *, is_teacher: bool = False) -> list[Inputs]:
    """Inputs of so many rows of a split, drawn once and for all; with ``is_teacher`` the teacher's."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:count]
    fetched = (split.fetch(rows) for rows in order.split(BATCH))
    batches = [named_inputs((batch.for_teacher() if is_teacher else batch).inputs) for batch in fetched]
    return [one_side(inputs) for inputs in batches] if task == "embedding" else batches


def one_side(inputs: Inputs) -> Inputs:
    """Of a query and its answers the query."""
    return {k: v for k, v in inputs.items() if not k.startswith(("positive_", "negative_"))}


def checked_recipe(given: str | Path) -> Recipe:
    """The recipe in a file, whose data a model without a run is tried on."""
    if not Path(given).is_file():
        raise ConfigError("no such recipe", where=str(given), remedy="give a YAML file whose data is read")
    return load_recipe(given)
