"""Open exports, each in its runtime."""

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

from tutelage.errors import CheckpointError, did_you_mean, first_line, require
from tutelage.export.bundle import Inputs, TraceModule, load_bundle
from tutelage.models import load_model, load_tokenizer
from tutelage.models.pretrained import load_pretrained
from tutelage.taps import vocabulary_head

MANIFEST = "export.json"
"""Name of the manifest of an export."""

ONNX, PROGRAM = "model.onnx", "model.pt2"

Run = Callable[[Inputs], Tensor]
"""Inputs by name -> logits or embeddings."""


@dataclass(frozen=True)
class Export:
    """An opened export.

    Attributes:
        folder: folder of the export.
        manifest: content of ``export.json``.
        run: inputs by name -> logits or embeddings, float32.
        tokenizer: tokenizer of a text model.
        model: the module, if the runtime is torch with the model's own code.
    """

    folder: Path
    manifest: dict[str, Any]
    run: Run
    tokenizer: Any = None
    model: nn.Module | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(self.manifest["inputs"])


class RuntimeModule(nn.Module):
    """An export as a module, for code that measures modules."""

    def __init__(self, run: Run, names: tuple[str, ...]) -> None:
        super().__init__()
        self._run, self.names = run, names

    def forward(self, *args: Tensor, **inputs: Tensor) -> Tensor:
        """Logits."""
        given = dict(zip(self.names, args, strict=False)) | {k: v for k, v in inputs.items() if k in self.names}
        return self._run(given)


def open_export(folder: str | Path, *, tokenizer: bool = True) -> Export:
    """Open an export, the folder of a model, or the student of a run.

    Raises:
        CheckpointError: the folder has no export, or an incomplete one.
        MissingDependencyError: the runtime is not installed.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        return _open_model(folder)
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
    loaded = load_tokenizer(f"hf:{folder}") if tokenizer and task != "images" else None
    return Export(folder, manifest, run, loaded, model)


def _open_model(folder: Path) -> Export:
    place = folder / "student" if (folder / "student").is_dir() else folder
    if not folder.is_dir():
        remedy = did_you_mean(folder, "make an export: tutelage export RUN --to onnx")
        raise CheckpointError("no such folder", where=str(folder), remedy=remedy)
    try:
        bundle = load_bundle(place)
    except CheckpointError as error:
        if place == folder and "holds no model" in error.what:
            raise CheckpointError(
                f"is not an export: it has no {MANIFEST}",
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
    """Names of the inputs of a model, in order."""
    if task == "images":
        return ("image",)
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in getattr(tokenizer, "model_input_names", ()):
        names.append("token_type_ids")
    return tuple(names)


Runtime = tuple[nn.Module | None, Run]


def _safetensors(folder: Path, task: str, names: tuple[str, ...]) -> Runtime:
    bundle = load_bundle(folder) if task == "embedding" else None  # a bi-encoder embeds one text
    model = load_model(folder) if bundle is None else bundle.model
    return _module(model, folder, names)


def _huggingface(folder: Path, task: str, names: tuple[str, ...]) -> Runtime:
    try:
        model = load_pretrained(f"hf:{folder}", task, None, {}).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _damaged(folder, error) from None
    return _module(model, folder, names)


def _module(model: nn.Module, folder: Path, names: tuple[str, ...]) -> Runtime:
    if vocabulary_head(model) is not None and (folder / "tokenizer.json").is_file():
        model.tokenizer = load_tokenizer(f"hf:{folder}")  # which says how many outputs are tokens
    return model, TraceModule(model, names).run


def _program(folder: Path, task: str, names: tuple[str, ...]) -> Runtime:
    path = folder / PROGRAM
    _check_archive(path)
    try:
        module = torch.export.load(path).module()
    except (RuntimeError, ValueError, OSError, AssertionError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None

    @torch.no_grad()
    def run(inputs: Inputs) -> Tensor:
        outputs: Tensor = module(*(inputs[name] for name in names))
        return outputs

    return None, run


def _check_archive(path: Path) -> None:
    """Raise :class:`CheckpointError` if loading the program would execute code from the file.

    torch reads some entries of such an archive with pickle; our exports have no such entries.
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
                    except Exception:  # noqa: BLE001 - torch would unpickle it
                        unsafe = True
                if unsafe:
                    raise CheckpointError(
                        "contains more than tensors, and loading it would run code from the file",
                        where=f"{path}: {name}",
                        remedy="export the model again, from a run that you trust",
                    )
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(path, error) from None


def _onnx(folder: Path, task: str, names: tuple[str, ...]) -> Runtime:
    return None, onnx_runner(folder / ONNX, names)


def onnx_runner(path: Path, names: tuple[str, ...]) -> Run:
    """Run a graph in ONNX Runtime, with as many threads as torch.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        CheckpointError: the file is missing or damaged.
    """
    require("onnxruntime", "export", "an ONNX graph")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - its errors have no other common base
        raise _damaged(path, error) from None

    def run(inputs: Inputs) -> Tensor:
        return torch.from_numpy(session.run(None, {name: inputs[name].numpy() for name in names})[0])

    return run


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot be loaded: {first_line(error)}", where=str(path), remedy="export the model again")


RUNTIMES: dict[str, Callable[[Path, str, tuple[str, ...]], Runtime]] = {
    "safetensors": _safetensors, "hf": _huggingface, "onnx": _onnx, "int8": _onnx, "torch-export": _program,
}  # fmt: skip
"""The loader of each format."""
