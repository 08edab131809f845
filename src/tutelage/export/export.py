"""``tutelage export``: a model in a format, checked in the runtime of that format, with all that its use needs.

::

    export.json     what it holds: format, inputs, label names, preprocessing, how far it is from its source
    README.md       the model card
    model.*         the model
    tokenizer.json  and what else the tokenizer of a model of texts needs
"""

from __future__ import annotations

import json
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
from tutelage.export.formats import FORMATS, output_name, trace_rows
from tutelage.export.runtimes import MANIFEST, RuntimeModule, input_names, open_export
from tutelage.files import atomic_folder

QUANTISED = ("int8",)
"""Formats that change the weights, and so the answers."""


@dataclass(frozen=True)
class ExportResult:
    """A finished export: its folder and what is in its ``export.json``."""

    path: Path
    manifest: dict[str, Any]


def supported_formats(model: nn.Module) -> list[str]:
    """The formats that a model can be written in."""
    return [name for name in FORMATS if name != "hf" or is_transformers(model)]


def check_format(to: str, model: nn.Module) -> None:
    """Raise :class:`ConfigError` where there is no such format, :class:`CapabilityError` where not of this model."""
    if to not in FORMATS:
        raise ConfigError(
            f"there is no format {to!r}" + suggest(to, list(FORMATS)),
            where="--to",
            remedy=f"allowed: {', '.join(FORMATS)}",
        )
    if to not in supported_formats(model):
        raise CapabilityError(
            f"the student is a {type(model).__name__}, which is no model of transformers",
            where=f"--to {to}",
            remedy=f"possible are: {', '.join(supported_formats(model))}",
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
    """Write a model, load it again in the runtime that is to run it, and see that it answers as its source does.

    Args:
        bundle: the model with all that its use needs.
        to: the format.
        out: the folder; an export that is there is replaced once this one is complete.
        batches: inputs on which both are compared.
        read_from: what these inputs are, for the record.
        calibration: other inputs, by which int8 fixes the ranges of activations.
        facts: ``summary`` and ``recipe`` of the run, for the card.
        measure: gives figures of a module on the test split; asked where rounding changes the answers.
        pairs: whether a row is two texts.

    Raises:
        ConfigError: no such format.
        CapabilityError: a format that this model cannot have.
        NumericsError: it does not answer as its source; nothing is left of it.
        RunDirectoryError: the folder holds something else, or cannot be written.
        MissingDependencyError: the format needs an extra.
    """
    check_format(to, bundle.model)
    if not batches:
        raise CapabilityError("there are no inputs to check the export with", remedy="give some, in data=")
    check_output_folder(out)
    names = tuple(n for n in input_names(bundle.model, bundle.task, bundle.tokenizer) if n in batches[0])
    if bundle.task != "images" and bundle.tokenizer is None:
        names = tuple(batches[0])
    positions = getattr(getattr(bundle.model, "config", None), "max_position_embeddings", None)
    with atomic_folder(out) as folder:
        how = FORMATS[to](bundle, folder, names, trace_rows(batches[0]), calibration)
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
            "source": bundle.source,
            **({"pairs": True} if pairs else {}),
            **({} if positions is None else {"positions": positions}),
            **({"how": how} if how else {}),
        }
        _write(folder, manifest)
        export = open_export(folder, tokenizer=False)
        exact = to not in QUANTISED
        found = compare_outputs(TraceModule(bundle.model, names).run, export.run, batches, bundle.task, exact=exact)
        manifest["check"] = {**found, "inputs": read_from, **({"tolerance": TOLERANCE} if exact else {})}
        if measure is not None and not exact:
            manifest["measured"] = {
                "source": dict(measure(RuntimeModule(TraceModule(bundle.model, names).run, names))),
                "export": dict(measure(RuntimeModule(export.run, names))),
            }
        manifest["bytes"] = sum(p.stat().st_size for p in folder.glob("model*"))
        _write(folder, manifest)
        (folder / "README.md").write_text(model_card(manifest, dict(facts or {})), encoding="utf-8")
        del export  # closes the file before the folder gets its name
    return ExportResult(out, manifest)


def _write(folder: Path, manifest: Mapping[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_output_folder(out: Path) -> None:
    """Raise :class:`RunDirectoryError` unless nothing is there, or an older export."""
    if out.exists() and not out.is_dir():
        raise RunDirectoryError("is a file", where=str(out), remedy="choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise RunDirectoryError(
            "holds something that is no export", where=str(out), remedy="choose an empty or new folder as --out"
        )
