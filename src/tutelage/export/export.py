"""Write a model in another format and check it in the runtime of that format.

::

    export.json     the manifest: format, inputs, label names, preprocessing, difference from the source
    README.md       the model card
    model.*         the model
    tokenizer.json  and other files of the tokenizer of a text model
"""

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from tutelage.errors import CapabilityError, ConfigError, RunDirectoryError, suggest
from tutelage.export.bundle import Inputs, ModelBundle, TraceModule, is_transformers
from tutelage.export.card import model_card
from tutelage.export.check import TOLERANCE, compare_outputs
from tutelage.export.formats import FORMATS, ExportJob, output_name, trace_rows
from tutelage.export.runtimes import MANIFEST, Run, RuntimeModule, input_names, open_export
from tutelage.export.timing import time_interleaved
from tutelage.files import atomic_folder

QUANTISED = ("int8",)
"""Formats that change the outputs."""


@dataclass(frozen=True)
class ExportResult:
    """A finished export: its folder and its manifest."""

    path: Path
    manifest: dict[str, Any]


def supported_formats(model: nn.Module) -> list[str]:
    """The formats that a model supports."""
    return [name for name in FORMATS if name != "hf" or is_transformers(model)]


def check_format(to: str, model: nn.Module) -> None:
    """Raise :class:`ConfigError` for an unknown format, :class:`CapabilityError` for one of other models."""
    if to not in FORMATS:
        raise ConfigError(
            f"there is no format {to!r}" + suggest(to, list(FORMATS)),
            where="--to",
            remedy=f"allowed: {', '.join(FORMATS)}",
        )
    if to not in supported_formats(model):
        raise CapabilityError(
            f"the student is a {type(model).__name__}, which is not a transformers model",
            where=f"--to {to}",
            remedy=f"supported: {', '.join(supported_formats(model))}",
        )


def write_export(
    bundle: ModelBundle,
    to: str,
    out: Path,
    batches: Sequence[Inputs],
    *,
    read_from: str,
    calibration: Sequence[Inputs] = (),
    facts: Mapping[str, Any] | None = None,
    measure: Callable[[nn.Module], Mapping[str, Any]] | None = None,
    pairs: bool = False,
) -> ExportResult:
    """Write a model, load the export in its runtime, and compare its outputs with those of the model.

    ``read_from`` describes ``batches`` in the manifest; ``calibration`` inputs calibrate int8; ``measure`` computes
    test metrics of a module, if the format changes the outputs; with ``pairs`` a row is a pair of texts.

    Raises:
        ConfigError: the format is unknown.
        CapabilityError: the model does not support the format.
        NumericsError: the outputs differ; nothing is written.
        RunDirectoryError: the folder contains something else, or cannot be written.
        MissingDependencyError: the format needs an extra.
    """
    check_format(to, bundle.model)
    if not batches:
        raise CapabilityError("there are no inputs to check the export with", remedy="give data=")
    check_output_folder(out)
    names = tuple(n for n in input_names(bundle.model, bundle.task, bundle.tokenizer) if n in batches[0])
    if bundle.task != "images" and bundle.tokenizer is None:
        names = tuple(batches[0])
    positions = getattr(getattr(bundle.model, "config", None), "max_position_embeddings", None)
    with atomic_folder(out) as folder:
        how = FORMATS[to](ExportJob(bundle, folder, names, trace_rows(batches[0]), calibration))
        if bundle.tokenizer is not None:
            bundle.tokenizer.save_pretrained(folder)
        manifest: dict[str, Any] = {
            "tutelage": version("tutelage"),
            "format": to,
            "task": bundle.task,
            "inputs": list(names),
            "output": output_name(bundle.task),
            "classes": bundle.classes,
            "preprocessing": bundle.preprocessing,
            "source": _source(bundle, out),
            **({"pairs": True} if pairs else {}),
            **({} if positions is None else {"positions": positions}),
            **({"how": how} if how else {}),
        }
        _write(folder, manifest)
        export = open_export(folder, tokenizer=False)
        exact = to not in QUANTISED
        source = TraceModule(bundle.model, names)
        result = compare_outputs(source.run, export.run, batches, bundle.task, exact=exact)
        manifest["check"] = {**result, "inputs": read_from, **({"tolerance": TOLERANCE} if exact else {})}
        if not exact:
            manifest["check"]["time_ratio"] = _time_ratio(source.run, export.run, trace_rows(batches[0]))
        if measure is not None and not exact:
            manifest["measured"] = {
                "source": dict(measure(RuntimeModule(source.run, names))),
                "export": dict(measure(RuntimeModule(export.run, names))),
            }
        manifest["bytes"] = sum(p.stat().st_size for p in folder.glob("model*"))
        _write(folder, manifest)
        (folder / "README.md").write_text(model_card(manifest, dict(facts or {})), encoding="utf-8")
        del export  # closes the file before the folder is renamed
    return ExportResult(out, manifest)


def _source(bundle: ModelBundle, out: Path) -> str:
    """Where the model is; relative to an export in the same folder, which may be moved with it."""
    folder = bundle.folder
    together = folder is not None and out.resolve().is_relative_to(folder.resolve().parent)
    return os.path.relpath(folder, out) if folder is not None and together else bundle.source


def _time_ratio(source: Run, export: Run, few: Inputs) -> float:
    """Time of an export over that of the float32 model in PyTorch, for a few rows on this machine."""
    cells = {("source", "", 0): lambda: source(few), ("export", "", 0): lambda: export(few)}
    times = time_interleaved(cells, rounds=9)
    before, now = (statistics.median(seconds) for seconds in times.values())
    return round(now / before, 2)


def _write(folder: Path, manifest: Mapping[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_output_folder(out: Path) -> None:
    """Raise :class:`RunDirectoryError` if the folder exists and is neither empty nor an export."""
    if out.exists() and not out.is_dir():
        raise RunDirectoryError("is a file", where=str(out), remedy="choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise RunDirectoryError(
            "contains files that are not an export", where=str(out), remedy="choose an empty or new folder as --out"
        )
