"""Exports opened again, each in the runtime that is to run it."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import CheckpointError, nearest, require
from tutelage.export.bundle import Inputs, TraceModule, auto_class, load_bundle
from tutelage.files import silence_transformers
from tutelage.models import load_model, load_tokenizer
from tutelage.models.pretrained import SentenceEncoder

MANIFEST = "export.json"
"""What an export holds and needs, as JSON."""

ONNX, PROGRAM = "model.onnx", "model.pt2"

Run = Callable[[Inputs], Tensor]
"""Inputs by name -> logits or embeddings."""


@dataclass(frozen=True)
class Export:
    """An export, opened.

    Attributes:
        folder: where it is.
        manifest: what it holds and needs.
        run: inputs by name -> logits or embeddings, float32.
        tokenizer: of texts.
        model: the module, where the runtime is torch with the model's own code.
    """

    folder: Path
    manifest: dict[str, Any]
    run: Run
    tokenizer: Any = None
    model: nn.Module | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the inputs that it takes."""
        return tuple(self.manifest["inputs"])


class RuntimeModule(nn.Module):
    """An export as a module, for whatever measures modules."""

    def __init__(self, run: Run, names: tuple[str, ...]) -> None:
        super().__init__()
        self._run, self.names = run, names

    def forward(self, *args: Tensor, **inputs: Tensor) -> Tensor:
        """Logits."""
        given = dict(zip(self.names, args, strict=False)) | {k: v for k, v in inputs.items() if k in self.names}
        return self._run(given)


def open_export(folder: str | Path, *, tokenizer: bool = True) -> Export:
    """An export, the folder of a model that a run exported, or a run whose student is asked.

    Args:
        folder: of an export, a model or a run.
        tokenizer: whether the tokenizer of texts is opened too.

    Raises:
        CheckpointError: no export there, or one that is not whole.
        MissingDependencyError: its runtime is not installed.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        return _of_model(folder)
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, task, names = manifest["format"], manifest["task"], tuple(manifest["inputs"])
        if not isinstance(manifest["preprocessing"], dict):
            raise TypeError("preprocessing")
        opener = RUNTIMES[kind]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"is damaged: {type(error).__name__} {error}", where=str(path), remedy="export the model again"
        ) from None
    model, run = opener(folder, task, names)
    cutter = None
    if tokenizer and task != "images":
        cutter = load_tokenizer(f"hf:{folder}")
    return Export(folder, manifest, run, cutter, model)


def _of_model(folder: Path) -> Export:
    place = folder / "student" if (folder / "student").is_dir() else folder
    if not folder.is_dir():
        siblings = [str(p) for p in folder.parent.glob("*")] if folder.parent.is_dir() else []
        close = nearest(str(folder), siblings, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise CheckpointError(
            "no such folder", where=str(folder), remedy=f"{hint}make an export: tutelage export RUN --to onnx"
        )
    try:
        bundle = load_bundle(place)
    except CheckpointError as error:
        if place == folder and "holds no model" in error.what:
            raise CheckpointError(
                f"is no export: it has no {MANIFEST}",
                where=str(folder),
                remedy="make one: tutelage export RUN --to onnx",
            ) from None
        raise
    names = input_names(bundle.model, bundle.task, bundle.tokenizer)
    manifest = {
        "format": "safetensors", "task": bundle.task, "inputs": list(names), "classes": bundle.classes,
        "preprocessing": bundle.preprocessing,
    }  # fmt: skip
    return Export(place, manifest, TraceModule(bundle.model, names).run, bundle.tokenizer, bundle.model)


def input_names(model: nn.Module, task: str, tokenizer: Any) -> tuple[str, ...]:
    """What a model is given in use, in order."""
    if task == "images":
        return ("image",)
    given = ["input_ids", "attention_mask"]
    if "token_type_ids" in getattr(tokenizer, "model_input_names", ()):
        given.append("token_type_ids")
    return tuple(given)


# The runtimes ------------------------------------------------------------------------------------------

Opened = tuple[nn.Module | None, Run]


def _safetensors(folder: Path, task: str, names: tuple[str, ...]) -> Opened:
    bundle = load_bundle(folder) if task == "embedding" else None  # of a ranking one side is used
    model = load_model(folder) if bundle is None else bundle.model
    return model, TraceModule(model, names).run


def _huggingface(folder: Path, task: str, names: tuple[str, ...]) -> Opened:
    require("transformers", "text", "an export for transformers")
    import transformers

    try:
        with silence_transformers():
            model = getattr(transformers, auto_class(task)).from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _damaged(folder, error) from None
    model = SentenceEncoder(model) if task == "embedding" else model
    return model, TraceModule(model.eval(), names).run


def _program(folder: Path, task: str, names: tuple[str, ...]) -> Opened:
    path = folder / PROGRAM
    _check_archive(path)
    try:
        module = torch.export.load(path).module()
    except (RuntimeError, ValueError, OSError, AssertionError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None

    @torch.no_grad()
    def run(inputs: Inputs) -> Tensor:
        found: Tensor = module(*(inputs[name] for name in names))
        return found

    return None, run


def _check_archive(path: Path) -> None:
    """Raise :class:`CheckpointError` where loading the program would run code from the file.

    torch reads some parts of such an archive with pickle; those that we write have none of them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                unsafe = False
                if name.endswith("_config.json"):
                    entries = json.loads(archive.read(name)).get("config", {}).values()
                    unsafe = any(
                        e.get("use_pickle") or not e["path_name"].startswith(("weight_", "tensor_")) for e in entries
                    )
                elif name.endswith(".pt"):
                    try:
                        torch.load(io.BytesIO(archive.read(name)), weights_only=True)
                    except Exception:  # noqa: BLE001 - whatever it is, torch would then unpickle it
                        unsafe = True
                if unsafe:
                    raise CheckpointError(
                        "holds more than tensors; loading it would run code from the file",
                        where=f"{path}: {name}",
                        remedy="export the model again, from a run that you trust",
                    )
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(path, error) from None


def _onnx(folder: Path, task: str, names: tuple[str, ...]) -> Opened:
    session = onnx_session(folder / ONNX)

    def run(inputs: Inputs) -> Tensor:
        return torch.from_numpy(session.run(None, {name: inputs[name].numpy() for name in names})[0])

    return None, run


def onnx_session(path: Path, threads: int | None = None) -> Any:
    """ONNX Runtime on a graph, with as many threads as torch has.

    Raises:
        MissingDependencyError: it is not installed.
        CheckpointError: the file is missing or damaged.
    """
    require("onnxruntime", "export", "an ONNX graph")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - its errors have no common root but this
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(f"cannot be loaded: {reason}", where=str(path), remedy="export the model again")


RUNTIMES: dict[str, Callable[[Path, str, tuple[str, ...]], Opened]] = {
    "safetensors": _safetensors,
    "hf": _huggingface,
    "onnx": _onnx,
    "int8": _onnx,
    "torch-export": _program,
}
"""Opens each format."""
