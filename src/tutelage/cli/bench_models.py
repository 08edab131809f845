"""Measure teacher, student and other models side by side: size, operations, speed, memory and quality."""

import json
import platform
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tutelage.data import Data, SequentialBatches
from tutelage.engine import RunDirectory
from tutelage.errors import ConfigError, ModelError, TutelageError, suggest
from tutelage.evaluation import evaluate
from tutelage.experiment.export_student import CALIBRATION
from tutelage.experiment.measure import parameters
from tutelage.experiment.recipe_source import RecipeSource, data_card, model_spec
from tutelage.experiment.run_artifacts import SavedModel, find, one_side, rows_of
from tutelage.export import timing
from tutelage.export.bundle import Inputs, TraceModule, named_inputs
from tutelage.export.check import ROWS, compare_outputs, random_inputs
from tutelage.export.formats import has_convolutions
from tutelage.export.runtimes import Run, RuntimeModule, input_names
from tutelage.files import write_text
from tutelage.models import ModelSpec, build, load_weights, save_model
from tutelage.models.pretrained import fewest_tokens
from tutelage.progress import Terminal
from tutelage.reports.bench import RANDOM_INPUTS

BATCHES, ROUNDS = (1, 8, 32), 20
"""Default batch sizes, and default number of timed calls."""


@dataclass
class BenchModel:
    """A model to measure, in evaluation mode, on the CPU.

    Attributes:
        names: names of its inputs.
        data: data with a test split; ``None``: inputs are random, with the shape in ``preprocessing``.
        card: the model card, from which another process builds the model.
        quality: test metric of its run.
        is_teacher: the model takes the teacher's inputs.
    """

    name: str
    role: Literal["teacher", "student", "other"]
    model: nn.Module
    task: str
    names: tuple[str, ...]
    data: Data | None
    preprocessing: dict[str, Any]
    card: dict[str, Any]
    vocabulary: int = 0
    quality: float | None = None
    is_teacher: bool = False

    def inputs(self, count: int) -> Inputs:
        """A batch of ``count`` rows, from the test split where there is one."""
        if self.data is None:
            least = fewest_tokens(self.model)
            batch = random_inputs(self.task, self.preprocessing, self.names, self.vocabulary, 16, least)[0]
            times = -(-count // len(batch[self.names[0]]))
            return {name: torch.cat([batch[name]] * times)[:count] for name in self.names}
        order = torch.randperm(len(self.data.test), generator=torch.Generator().manual_seed(0))
        rows = self.data.test.fetch(order.repeat(-(-count // len(order)))[:count])
        inputs = named_inputs((rows.for_teacher() if self.is_teacher else rows).inputs)
        return one_side(inputs) if self.task == "embedding" else inputs

    def prepare(self, column: str, folder: Path, sizes: Sequence[int]) -> tuple[Run, Path | None]:
        """A runtime of the model, after a warm-up call with each batch size."""
        calibration: list[Inputs] = []
        if column == "int8" and has_convolutions(self.model) and self.data is not None:
            calibration = rows_of(self.data.validation, CALIBRATION, self.task, is_teacher=self.is_teacher)
        run, path = timing.prepare_runner(column, self.model, self.names, self.inputs(3), calibration, folder)
        for size in sizes:
            run(self.inputs(size))
        return run, path


def bench(
    sources: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    batch_sizes: Sequence[int] = BATCHES,
    rounds: int = ROUNDS,
    columns: Sequence[str] = timing.COLUMNS,
    quality: bool = True,
    memory: bool = True,
    terminal: Terminal | None = None,
) -> dict[str, Any]:
    """Measure models side by side, in one loop, and write the results as JSON.

    The arguments are those of ``tutelage bench``; ``quality`` evaluates int8 models on the test split. If a runtime
    does not support a model, the results have the reason.

    Raises:
        TutelageError: one of its subclasses.
    """
    terminal = terminal or Terminal()
    _check(sources, batch_sizes, rounds, columns)
    models, place = load_bench_models(sources, terminal)
    threads = torch.get_num_threads()
    metric = place.get("metric") or "accuracy"
    with ExitStack() as stack:
        folders = {c.name: Path(stack.enter_context(tempfile.TemporaryDirectory())) for c in models}
        runtimes: dict[tuple[str, str], tuple[Any, str | None]] = {}
        for c in models:
            for column in columns:
                terminal.say(f"preparing {c.name}, {column}")
                runtimes[c.name, column] = timing.try_call(partial(c.prepare, column, folders[c.name], batch_sizes))
        cells: dict[timing.Cell, Any] = {
            (c.name, column, size): partial(runtimes[c.name, column][0][0], inputs)
            for c in models
            for size in batch_sizes
            for inputs in [c.inputs(size)]
            for column in columns
            if runtimes[c.name, column][1] is None
        }
        terminal.say(f"timing: {len(cells)} cells, {rounds} rounds")
        times = timing.time_interleaved(cells, rounds)
        rows = []
        for c in models:
            saved = _save(c, folders[c.name])
            row = _row(c, saved)
            for column in columns:
                runtime, why = runtimes[c.name, column]
                if why is not None:
                    row["columns"][column] = {"failed": why}
                    continue
                run, path = runtime
                cell: dict[str, Any] = {
                    "bytes": row["bytes"] if path is None else path.stat().st_size,
                    "quality": c.quality,
                    "batches": {
                        str(n): timing.summarise_times(
                            times[c.name, column, n], n, times.get((models[0].name, "eager", n))
                        )
                        for n in batch_sizes
                    },
                }
                if column != "eager":
                    cell["agreement"] = timing.try_call(partial(_agreement, c, run))[0]
                if column == "int8":
                    cell["quality"] = _int8_quality(c, run, metric) if quality else None
                if memory and column != "compiled":
                    kind, file = ("model", saved) if path is None else ("onnx", path)
                    measure = partial(timing.peak_memory, kind, file, c.names, c.inputs(max(batch_sizes)), threads)
                    peak, why = timing.try_call(measure)
                    cell["memory"] = peak if why is None else {"failed": why}
                row["columns"][column] = cell
            rows.append(row)
    onnxruntime = version("onnxruntime") if find_spec("onnxruntime") else None
    result = {
        "tutelage": version("tutelage"),
        "machine": {
            "processor": _processor(), "threads": threads, "torch": torch.__version__, "onnxruntime": onnxruntime,
        },
        "rounds": rounds,
        "batch_sizes": list(batch_sizes),
        "metric": metric,
        "base": models[0].name,
        "models": rows,
    }  # fmt: skip
    path = Path(out) if out is not None else (place.get("run") or Path()) / "bench.json"
    write_text(path, json.dumps(result, indent=1) + "\n")
    return result | {"path": str(path)}


def _check(sources: Sequence[Any], sizes: Sequence[int], rounds: int, columns: Sequence[str]) -> None:
    if not sources:
        raise ConfigError("there is nothing to measure", remedy="give runs, folders of models, or names of models")
    if not sizes or min(sizes) < 1 or len(set(sizes)) != len(sizes):
        raise ConfigError(
            f"{list(sizes)} is not a list of batch sizes", remedy="give different numbers of at least 1, as in 1,8,32"
        )
    if rounds < 1:
        raise ConfigError(f"{rounds} rounds measure nothing", remedy="give 1 or more")
    for column in columns:
        if column not in timing.COLUMNS:
            raise ConfigError(
                f"there is no runtime {column!r}" + suggest(column, list(timing.COLUMNS)),
                remedy=f"allowed: {', '.join(timing.COLUMNS)}",
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
    if hasattr(bundle.model, "config"):
        card: dict[str, Any] = {"task": bundle.task, "classes": bundle.classes}
    else:
        card = json.loads((of.folder / "model.json").read_text(encoding="utf-8"))
    return BenchModel(
        name, "student" if of.is_student else "other", bundle.model, bundle.task,
        input_names(bundle.model, bundle.task, bundle.tokenizer), data, bundle.preprocessing, card,
        len(bundle.tokenizer) if bundle.tokenizer is not None else 0, _quality(of),
    )  # fmt: skip


def _quality(of: SavedModel) -> float | None:
    """The test metric of this model in its run."""
    if of.run is None:
        return None
    stage, _, name = str(of.summary.get("exported") if of.is_student else of.folder.name).rpartition("/models/")
    result = RunDirectory(of.run / stage if stage else of.run, writes=False).result(name)
    return None if result is None else result["best"].get(str(of.summary.get("metric", "accuracy")))


def _teacher(of: SavedModel, data: Data | None, name: str) -> BenchModel | None:
    """The teacher of a run, if it is one local model."""
    recipe, run, bundle = of.recipe, of.run, of.bundle
    if recipe is None or run is None or data is None or recipe.teacher is None:
        return None
    if recipe.teacher.members is not None or recipe.teacher.endpoint is not None or recipe.workflow is not None:
        of.terminal.say(f"note: the teacher of {run} is not one local model, and is not measured")
        return None
    model = RecipeSource(recipe, data).build_teacher(0)
    if (run / "models" / "teacher").is_dir():
        load_weights(model, run / "models" / "teacher")
    card = {"spec": model_spec(recipe.teacher.each[0], data, 0).to_dict(), **data_card(data, 0)}
    return BenchModel(
        name, "teacher", model.cpu().eval(), bundle.task, input_names(model, bundle.task, bundle.tokenizer), data,
        card["preprocessing"], card, len(bundle.tokenizer) if bundle.tokenizer is not None else 0,
        (of.summary.get("teacher") or {}).get(str(of.summary.get("metric", "accuracy"))), is_teacher=True,
    )  # fmt: skip


def _named(name: str, before: Sequence[BenchModel]) -> BenchModel:
    """An untrained model by its name in recipes, for the images of the run before it if there is one."""
    if any(c.task != "images" for c in before):
        raise ModelError(
            f"{name} takes images, and other models of this measurement take texts",
            remedy="give the folder of a text model with its tokenizer",
        )
    data = next((c.data for c in before if c.data is not None), None)
    in_library = name.partition(":")[0] in ("timm", "torchvision", "hf")
    default = {"classes": 10, "channels": 3, "size": 224 if in_library else 32}
    facts: dict[str, Any] = default if data is None else dict(data.spec)
    spec = ModelSpec(name, **facts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(spec, where=name).eval()
    if getattr(model, "main_input_name", "") == "input_ids":
        raise ModelError(f"{name} is a text model", remedy="give a folder with it and its tokenizer")
    return BenchModel(name, "other", model, "images", ("image",), data, facts, {"spec": spec.to_dict()})


def _save(c: BenchModel, folder: Path) -> Path:
    """Save the model for another process."""
    saved = folder / "saved"
    save_model(c.model, saved, c.card)
    if (tokenizer := getattr(c.data, "tokenizer", None)) is not None:
        tokenizer.save_pretrained(saved)
    return saved


def _row(c: BenchModel, saved: Path) -> dict[str, Any]:
    """The results of a model that do not depend on the runtime."""
    count, why = timing.try_call(partial(timing.count_flops, c.model, c.names, c.inputs(1)))
    return {
        "name": c.name,
        "role": c.role,
        "parameters": parameters(c.model),
        "flops": count if why is None else None,
        "bytes": sum(p.stat().st_size for p in saved.glob("*.safetensors")),
        "quality": c.quality,
        "inputs": RANDOM_INPUTS if c.data is None else f"the test split of {c.data.name}",
        "columns": {},
    }


def _agreement(c: BenchModel, run: Run) -> float:
    """The share of equal predictions with the eager model, or the cosine or correlation, on some rows."""
    if c.data is None:
        batches = random_inputs(c.task, c.preprocessing, c.names, c.vocabulary, ROWS)
    else:
        batches = rows_of(c.data.test, ROWS, c.task, is_teacher=c.is_teacher)
    source = TraceModule(c.model, c.names).run
    return float(compare_outputs(source, run, batches, c.task, exact=False, least=-1.0)["agreement"])


def _int8_quality(c: BenchModel, run: Run, metric: str) -> float | None:
    """The test metric of an int8 model; ``None`` without labelled data."""
    if c.data is None or c.quality is None:
        return None
    if c.is_teacher and c.data.test.fetch(torch.arange(1)).teacher_inputs is not None:
        return None
    try:
        return evaluate(RuntimeModule(run, c.names), SequentialBatches(c.data.test), torch.device("cpu")).get(metric)
    except (TutelageError, RuntimeError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()
