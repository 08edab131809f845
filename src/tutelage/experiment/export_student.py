"""``tutelage export``: the student of a run, written for use and checked on the run's own test data."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutelage.config import TextDataConfig
from tutelage.data import Batch, Data, SequentialBatches, as_batch
from tutelage.data.texts import as_list
from tutelage.errors import ConfigError, DataError
from tutelage.evaluation import evaluate
from tutelage.experiment.run_artifacts import SavedModel, checked_recipe, data_of, find, rows_of
from tutelage.export.bundle import TASKS, Inputs, ModelBundle, named_inputs
from tutelage.export.check import ROWS, random_inputs
from tutelage.export.export import ExportResult, check_format, check_output_folder, write_export
from tutelage.export.runtimes import input_names
from tutelage.models.pretrained import AUTO_CLASSES, fewest_tokens
from tutelage.progress import Terminal

CALIBRATION = 256
"""Rows of the validation split by which the ranges of activations are fixed."""


def export_student(
    source: str | Path | nn.Module,
    to: str,
    *,
    out: str | Path | None = None,
    data: str | Path | Iterable[Any] | None = None,
    classes: list[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    to_batch: Callable[[Any], Batch] = as_batch,
    terminal: Terminal | None = None,
) -> ExportResult:
    """Export a finished model, and check that the exported model gives the same outputs.

    Args:
        source: the folder of a run, for its student; the folder of a model; or a module, with ``data``.
        to: ``safetensors``, ``hf``, ``onnx``, ``int8`` or ``torch-export``.
        out: the folder. Default: ``export/FORMAT`` in the run's or the model's.
        data: the check's inputs: a recipe, for a model without a run; a loader, for a module. Default: 256 rows of
            the run's test split, or random inputs without a run.
        classes: label names, of a module.
        preprocessing: ``size``, ``channels``, ``mean`` and ``std`` of a module's images, or ``max_length`` of texts.
        to_batch: makes a :class:`tutelage.data.Batch` of what a loader yields.
        terminal: shows progress.

    Raises:
        TutelageError: one of its subclasses, with the remedy; a failed export leaves no files.
    """
    terminal = terminal or Terminal()
    if isinstance(source, nn.Module):
        return _of_module(source, to, out, data, classes, preprocessing, to_batch)
    saved = find(source, terminal)
    bundle = saved.bundle
    check_format(to, bundle.model)
    place = Path(out) if out is not None else (saved.run if saved.is_student else saved.folder) / "export" / to  # type: ignore[operator]
    check_output_folder(place)
    known = _data(saved, data, terminal)
    if known is None:
        names = input_names(bundle.model, bundle.task, bundle.tokenizer)
        batches = random_inputs(
            bundle.task, bundle.preprocessing, names, len(bundle.tokenizer or ()), ROWS, fewest_tokens(bundle.model)
        )
        read_from, calibration, measure = "random inputs, because the model belongs to no run", [], None
        terminal.say(f"note: {bundle.source} belongs to no run, so it is checked on random inputs; use --data RECIPE")
    else:
        batches = rows_of(known.test, ROWS, bundle.task)
        read_from = f"rows of the test split of {known.name}"
        calibration = rows_of(known.validation, CALIBRATION, bundle.task) if to == "int8" else []
        measure = None if bundle.task == "embedding" else partial(_measured, known)
    facts = {"summary": saved.summary if saved.is_student else {}, "recipe": saved.config,
             "auto": AUTO_CLASSES[bundle.task]}  # fmt: skip
    config = None if saved.recipe is None else saved.recipe.data
    reads_pairs = (
        isinstance(config, TextDataConfig)
        and config.task not in ("causal", "ranking")
        and len(as_list(config.text)) == 2
    )
    return write_export(
        bundle, to, place, batches, read_from=read_from, calibration=calibration, facts=facts, measure=measure,
        pairs=reads_pairs,
    )  # fmt: skip


def _data(saved: SavedModel, given: Any, terminal: Terminal) -> Data | None:
    if isinstance(given, (str, Path)):
        return data_of(checked_recipe(given), saved.bundle, terminal)
    if given is not None:
        raise ConfigError(
            f"export_student(data=...) is a {type(given).__name__}, and the source is a folder",
            remedy="give the path of a recipe, or leave it out: the run's own data is read",
        )
    return saved.data()


def _measured(data: Data, model: nn.Module) -> dict[str, Any]:
    """Figures of the whole test split, read once."""
    scores = evaluate(model, SequentialBatches(data.test), torch.device("cpu"))
    return {k: v for k, v in scores.items() if isinstance(v, (int, float))}


def _of_module(
    model: nn.Module,
    to: str,
    out: str | Path | None,
    data: Any,
    classes: list[str] | None,
    preprocessing: Mapping[str, Any] | None,
    to_batch: Callable[[Any], Batch],
) -> ExportResult:
    if out is None or data is None or isinstance(data, (str, Path)):
        raise ConfigError(
            "export_student(MODULE) needs a folder and inputs",
            remedy="give out=, and data=, a loader of test samples",
        )
    batches: list[Inputs] = []
    rows = 0
    for raw in data:
        batch = to_batch(raw)
        batches.append(named_inputs(batch.rows(0, min(len(batch), ROWS - rows)).to("cpu").inputs))
        rows += len(batch)
        if rows >= ROWS:
            break
    if not batches:
        raise DataError("the loader yields no batches", where="export_student(data=...)", remedy="check its data set")
    training = model.training
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    first = next(iter(batches[0].values()))
    given = dict(preprocessing or {})
    if "image" in batches[0] and first.ndim == 4:
        given = {"size": first.shape[-1], "channels": first.shape[1], "mean": [0.0] * first.shape[1],
                 "std": [1.0] * first.shape[1]} | given  # fmt: skip
    task = next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), "classes")
    bundle = ModelBundle(
        model=model.cpu().eval(),
        task="images" if "image" in batches[0] else task,
        classes=list(classes or []),
        preprocessing=given,
        tokenizer=getattr(model, "tokenizer", None),
        source=f"a {type(model).__name__}",
    )
    try:
        return write_export(bundle, to, Path(out), batches, read_from="rows of the given loader", facts={})
    finally:
        model.to(place).train(training)
