"""Measure teacher, student and other models side by side: size, operations, speed, memory and quality."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutelage.data import Batch, Data
from tutelage.engine import RunDirectory
from tutelage.errors import ConfigError, ModelError, TutelageError, suggest
from tutelage.evaluation import evaluate
from tutelage.experiment.export_student import CALIBRATION
from tutelage.experiment.measure import parameters
from tutelage.experiment.recipe_source import RecipeSource, data_card, model_spec
from tutelage.experiment.run_artifacts import SavedModel, find, one_side, rows_of, whole_test
from tutelage.export.bundle import Inputs, named_inputs
from tutelage.export.check import random_inputs
from tutelage.export.formats import has_convolutions
from tutelage.export.runtimes import Run, RuntimeModule, input_names
from tutelage.export.timing import (
    COLUMNS,
    Cell,
    count_flops,
    peak_memory,
    prepare_runner,
    summarise_times,
    time_interleaved,
    try_call,
)
from tutelage.files import write_text
from tutelage.models import ModelSpec, build, load_weights, save_model
from tutelage.progress import Terminal

BATCHES, ROUNDS = (1, 8, 32), 20
"""Default batch sizes, and default number of timed calls."""


@dataclass
class BenchModel:
    """A model to measure.

    Attributes:
        name: name in the tables.
        role: ``teacher``, ``student`` or ``other``.
        model: the module, in evaluation mode, on the CPU.
        task: ``images`` or a text task.
        names: names of its inputs.
        data: data with a test split; ``None``: inputs are random.
        preprocessing: shape of the random inputs.
        vocabulary: vocabulary size of a text model.
        card: the model card, from which another process builds the model.
        quality: test metric of its run.
        reads: ``teacher`` if the model takes the teacher's inputs.
    """

    name: str
    role: str
    model: nn.Module
    task: str
    names: tuple[str, ...]
    data: Data | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = 0
    card: dict[str, Any] | None = None
    quality: float | None = None
    reads: str = "student"

    def inputs(self, count: int) -> Inputs:
        """A batch of ``count`` rows, from the test split where there is one."""
        if self.data is None:
            batch = random_inputs(self.task, self.preprocessing, self.names, self.vocabulary, 16)[0]
            times = -(-count // len(batch[self.names[0]]))
            return {name: torch.cat([batch[name]] * times)[:count] for name in self.names}
        order = torch.randperm(len(self.data.test), generator=torch.Generator().manual_seed(0))
        rows = order.repeat(-(-count // len(order)))[:count]
        return self._named(self.data.test.fetch(rows))

    def _named(self, batch: Batch) -> Inputs:
        inputs = named_inputs((batch.for_teacher() if self.reads == "teacher" else batch).inputs)
        return one_side(inputs) if self.task == "embedding" else inputs


def bench(
    sources: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    batch_sizes: Sequence[int] = BATCHES,
    rounds: int = ROUNDS,
    columns: Sequence[str] = COLUMNS,
    quality: bool = True,
    memory: bool = True,
    terminal: Terminal | None = None,
) -> dict[str, Any]:
    """Measure models side by side, in one loop, and write the results.

    Args:
        sources: runs (their teacher and student are measured), folders of models, or models as recipes name them.
        out: the JSON file. Default: ``bench.json`` in the first run, else in the current folder.
        batch_sizes: batch sizes.
        rounds: timed calls of each model, runtime and batch size.
        columns: runtimes, of ``eager``, ``compiled``, ``onnx`` and ``int8``.
        quality: evaluate int8 models on the test split.
        memory: measure peak memory, in one process per model and runtime.
        terminal: prints progress.

    Raises:
        TutelageError: one of its subclasses. A runtime that does not work for a model is no error; the result has
            the reason.
    """
    terminal = terminal or Terminal()
    _check(sources, batch_sizes, rounds, columns)
    models, place = load_bench_models(sources, terminal)
    threads = torch.get_num_threads()
    metric = place.get("metric") or "accuracy"
    with ExitStack() as stack:
        folders = {c.name: Path(stack.enter_context(tempfile.TemporaryDirectory())) for c in models}
        runs: dict[tuple[str, str], tuple[Run, Path | None]] = {}
        failed: dict[tuple[str, str], str] = {}
        for c in models:
            for column in columns:
                terminal.say(f"preparing {c.name}, {column}")
                runtime, why = try_call(partial(_ready, c, column, folders[c.name], batch_sizes))
                if why is None:
                    runs[c.name, column] = runtime
                else:
                    failed[c.name, column] = why
        terminal.say(f"timing: {len(runs) * len(batch_sizes)} cells, {rounds} rounds")
        cells: dict[Cell, Any] = {
            (c.name, column, size): partial(runs[c.name, column][0], inputs)
            for c in models
            for size in batch_sizes
            for inputs in [c.inputs(size)]
            for column in columns
            if (c.name, column) in runs
        }
        times = time_interleaved(cells, rounds)
        rows = [
            _row(c, columns, batch_sizes, runs, failed, times, models[0], folders[c.name], metric, quality, memory,
                 threads)
            for c in models
        ]  # fmt: skip
    result = {
        "tutelage": version("tutelage"),
        "machine": {
            "processor": _processor(), "threads": threads, "torch": torch.__version__, "onnxruntime": _version(),
        },
        "rounds": rounds,
        "batch_sizes": list(batch_sizes),
        "metric": metric,
        "base": models[0].name,
        "models": rows,
    }  # fmt: skip
    path = Path(out) if out is not None else (place.get("run") or Path()) / "bench.json"
    write_text(path, json.dumps(result, indent=1) + "\n")
    result["path"] = str(path)
    return result


def _check(sources: Sequence[Any], sizes: Sequence[int], rounds: int, columns: Sequence[str]) -> None:
    if not sources:
        raise ConfigError("there is nothing to measure", remedy="give runs, folders of models, or names of models")
    if not sizes or min(sizes) < 1 or len(set(sizes)) != len(sizes):
        raise ConfigError(f"batch sizes {list(sizes)}", remedy="give different numbers from 1 on, as in 1,8,32")
    if rounds < 1:
        raise ConfigError(f"rounds {rounds}", remedy="give 1 or more")
    for column in columns:
        if column not in COLUMNS:
            raise ConfigError(
                f"there is no column {column!r}" + suggest(column, list(COLUMNS)),
                remedy=f"allowed: {', '.join(COLUMNS)}",
            )


def load_bench_models(sources: Sequence[str | Path], terminal: Terminal) -> tuple[list[BenchModel], dict[str, Any]]:
    """The models, teachers first; and the folder and metric of the first run."""
    models: list[BenchModel] = []
    place: dict[str, Any] = {}
    for source in sources:
        if not Path(source).exists() and (":" in str(source) or "/" not in str(source)):
            models.append(_named(str(source), models))
            continue
        of = find(source, terminal)
        data = of.data()
        if of.run is not None and not place:
            place = {"run": of.run, "metric": of.summary.get("metric")}
        label = of.run.name if of.is_student and of.run is not None else of.folder.name
        if of.is_student:
            teacher = _teacher(of, data, f"{label} teacher")
            models += [] if teacher is None else [teacher]
        models.append(_student(of, data, f"{label} student" if of.is_student else label))
    for c in models:
        if [o.name for o in models].count(c.name) > 1:
            c.name = f"{c.name} ({models.index(c) + 1})"
    return sorted(models, key=lambda c: c.role != "teacher"), place


def _student(of: SavedModel, data: Data | None, name: str) -> BenchModel:
    bundle = of.bundle
    names = input_names(bundle.model, bundle.task, bundle.tokenizer)
    card = {"task": bundle.task, "classes": bundle.classes} if hasattr(bundle.model, "config") else None
    return BenchModel(
        name, "student" if of.is_student else "other", bundle.model, bundle.task, names, data,
        bundle.preprocessing, len(bundle.tokenizer) if bundle.tokenizer is not None else 0,
        card if card is not None else json.loads((of.folder / "model.json").read_text(encoding="utf-8")),
        _quality(of),
    )  # fmt: skip


def _quality(of: SavedModel) -> float | None:
    """The test metric of this model in its run."""
    if of.run is None:
        return None
    metric = str(of.summary.get("metric", "accuracy"))
    training = of.summary.get("exported") if of.is_student else of.folder.name
    stage, _, name = str(training).rpartition("/models/")
    run = RunDirectory(of.run / stage if stage else of.run, writes=False)
    result = run.result(name)
    return None if result is None else result["best"].get(metric)


def _teacher(of: SavedModel, data: Data | None, name: str) -> BenchModel | None:
    """The teacher of a run, if it is one local model."""
    recipe, run = of.recipe, of.run
    if recipe is None or run is None or data is None or recipe.teacher is None:
        return None
    if recipe.teacher.members is not None or recipe.teacher.endpoint is not None or recipe.workflow is not None:
        of.terminal.say(f"note: the teacher of {run} is not one local model, and is not measured")
        return None
    model = RecipeSource(recipe, data).build_teacher(0)
    if (run / "models" / "teacher").is_dir():
        load_weights(model, run / "models" / "teacher")
    spec = model_spec(recipe.teacher.each[0], data)
    bundle = of.bundle
    metric = str(of.summary.get("metric", "accuracy"))
    value = (of.summary.get("teacher") or {}).get(metric)
    return BenchModel(
        name, "teacher", model.cpu().eval(), bundle.task,
        input_names(model, bundle.task, bundle.tokenizer), data, bundle.preprocessing,
        len(bundle.tokenizer) if bundle.tokenizer is not None else 0,
        {"spec": spec.to_dict(), **data_card(data)}, value, reads="teacher",
    )  # fmt: skip


def _named(name: str, before: Sequence[BenchModel]) -> BenchModel:
    """An untrained model by its name in recipes, for the images of the run before it if there is one."""
    first = next((c for c in before if c.task == "images" and c.data is not None), None)
    texts = next((c for c in before if c.task != "images"), None)
    if texts is not None:
        raise ModelError(
            f"{name}: with a text model, only runs and folders can be measured",
            remedy="give a folder with a model and its tokenizer",
        )
    library = name.partition(":")[0] in ("timm", "torchvision", "hf")
    facts: dict[str, Any] = {"classes": 10, "channels": 3, "size": 224 if library else 32}
    if first is not None and first.data is not None:
        facts = dict(first.data.spec)
    spec = ModelSpec(name, **facts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(spec, where=name).eval()
    if getattr(model, "main_input_name", "") == "input_ids":
        raise ModelError(f"{name} is a model of texts", remedy="give a folder with it and its tokenizer")
    data = None if first is None else first.data
    return BenchModel(name, "other", model, "images", ("image",), data, facts, card={"spec": spec.to_dict()})


def _ready(c: BenchModel, column: str, folder: Path, sizes: Sequence[int]) -> tuple[Run, Path | None]:
    """A runtime of a model, after a warm-up call with each batch size."""
    calibration: list[Inputs] = []
    if column == "int8" and has_convolutions(c.model) and c.data is not None:
        calibration = rows_of(c.data.validation, CALIBRATION, c.task)
    run, path = prepare_runner(column, c.model, c.names, c.inputs(3), calibration, folder)
    for size in sizes:
        run(c.inputs(size))
    return run, path


def _row(
    c: BenchModel,
    columns: Sequence[str],
    sizes: Sequence[int],
    runs: Mapping[tuple[str, str], tuple[Run, Path | None]],
    failed: Mapping[tuple[str, str], str],
    times: Mapping[Cell, list[float]],
    base: BenchModel,
    folder: Path,
    metric: str,
    quality: bool,
    memory: bool,
    threads: int,
) -> dict[str, Any]:
    """The results of one model."""
    saved, size = _saved(c, folder)
    count, why = try_call(partial(count_flops, c.model, c.names, c.inputs(1)))
    ways: dict[str, Any] = {}
    for column in columns:
        if (c.name, column) in failed:
            ways[column] = {"failed": failed[c.name, column]}
            continue
        run, path = runs[c.name, column]
        way: dict[str, Any] = {
            "bytes": size if path is None else path.stat().st_size,
            "quality": c.quality,
            "batches": {
                str(rows): summarise_times(times[c.name, column, rows], rows, times.get((base.name, "eager", rows)))
                for rows in sizes
            },
        }
        if column == "int8":
            way["quality"] = _int8_quality(c, run, metric) if quality else None
        if memory and column != "compiled" and (path is not None or saved is not None):
            kind, file = ("onnx", path) if path is not None else ("model", saved)
            assert file is not None
            peak, reason = try_call(partial(peak_memory, kind, file, c.names, c.inputs(max(sizes)), threads))
            way["memory"] = peak if reason is None else {"failed": reason}
        ways[column] = way
    return {
        "name": c.name,
        "role": c.role,
        "parameters": parameters(c.model),
        "flops": count if why is None else None,
        "bytes": size,
        "quality": c.quality,
        "inputs": "made up" if c.data is None else f"the test split of {c.data.name}",
        "columns": ways,
    }


def _saved(c: BenchModel, folder: Path) -> tuple[Path | None, int]:
    """A folder from which another process can load the model, and the bytes of its weights."""
    if c.card is None:
        return None, sum(p.numel() * p.element_size() for p in c.model.parameters())
    saved = folder / "saved"
    save_model(c.model, saved, c.card)
    tokenizer = getattr(c.data, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(saved)
    return saved, sum(p.stat().st_size for p in saved.glob("*.safetensors"))


def _int8_quality(c: BenchModel, run: Run, metric: str) -> float | None:
    """The test metric of an int8 model; ``None`` without labelled data."""
    if (
        c.data is None
        or c.quality is None
        or (c.reads == "teacher" and c.data.test.fetch(torch.arange(1)).teacher_inputs)
    ):
        return None
    try:
        return evaluate(RuntimeModule(run, c.names), whole_test(c.data), torch.device("cpu")).get(metric)
    except (TutelageError, RuntimeError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


def _version() -> str | None:
    try:
        return version("onnxruntime")
    except PackageNotFoundError:
        return None
