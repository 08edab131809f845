"""Save and load models without executing code from the files.

The folder of a model holds ``model.safetensors`` and ``model.json``: the arguments that build the model, the class
names and the preprocessing. A Hugging Face model is saved with its own ``save_pretrained``, so that it also loads
without tutelage.
"""

import json
import pickle
import struct
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save_model as save_shared
from torch import Tensor, nn

from tutelage.errors import CheckpointError, did_you_mean, first_line
from tutelage.files import silence_transformers
from tutelage.models.build import ModelSpec, build
from tutelage.models.pretrained import load_pretrained

WEIGHTS = "model.safetensors"
MODEL_CARD = "model.json"


def save_model(model: nn.Module, folder: Path, card: Mapping[str, Any]) -> None:
    """Write the folder of a model. The card comes last, so a folder with a card is complete.

    Args:
        model: any module, on any device.
        folder: created if absent.
        card: JSON; ``spec`` has the fields of a :class:`ModelSpec`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_pretrained: Any = getattr(model, "save_pretrained", None)
    if callable(save_pretrained):
        with silence_transformers():
            save_pretrained(folder)
        if (tokenizer := getattr(model, "tokenizer", None)) is not None:
            tokenizer.save_pretrained(folder)
    else:
        save_shared(model, str(folder / WEIGHTS))
    (folder / MODEL_CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file, by name.

    Raises:
        CheckpointError: the file is missing, truncated, contains code, or is no mapping of names to tensors.
    """
    if not path.is_file():
        raise CheckpointError("no such file", where=str(path), remedy=did_you_mean(path, "check the path"))
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle protocols
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(
            f"is not a complete safetensors file: {error}", where=str(path), remedy="copy or download it again"
        ) from None
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():  # torch names the global that it refuses to import
            raise CheckpointError(
                "is damaged, or a pickle that torch.save did not write",
                where=str(path),
                remedy="copy or download it again; a safetensors file must end in .safetensors",
            ) from None
        raise CheckpointError(
            "contains more than tensors, and loading it would run code from the file",
            where=str(path),
            remedy="save only the state dict: torch.save(model.state_dict(), path), or use safetensors",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError,
            struct.error) as error:  # fmt: skip
        raise CheckpointError(
            f"cannot be read as weights: {first_line(error)}", where=str(path), remedy="copy or download it again"
        ) from None
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(
            f"is a {type(loaded).__name__}, not a mapping of names to tensors",
            where=str(path),
            remedy="save model.state_dict()",
        )
    return {str(k).removeprefix("module."): v for k, v in loaded.items()}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights into a model, from a file or from the folder of a saved model.

    Raises:
        CheckpointError: the file is unreadable or belongs to another model; the message names the first differences.
    """
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    prefix = getattr(model, "weights_prefix", "")
    tensors, own = {f"{prefix}{k}": v for k, v in read_tensors(file).items()}, model.state_dict()
    if path.is_dir() and not set(tensors) <= set(own):
        tensors = _read_pretrained(model, path) or tensors
    read_layers: Any = getattr(model, "read_layers", None)
    if callable(read_layers) and path.is_dir():
        tensors |= read_layers(path)
    loaded = {own[k].data_ptr() for k in own if k in tensors}  # tied weights are stored under one of their names
    missing = [k for k in own if k not in tensors and own[k].numel() and own[k].data_ptr() not in loaded]
    unexpected = [k for k in tensors if k not in own]
    if missing or unexpected:
        differences = "; ".join(
            f"{what} weights: {', '.join(names[:3])} ({len(names)} in all)"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        )
        raise CheckpointError(
            f"belongs to another model than {type(model).__name__}: {differences}",
            where=str(file),
            remedy="give the checkpoint of this model, built with the same options",
        )
    if shapes := [k for k in own if k in tensors and own[k].shape != tensors[k].shape]:
        k = shapes[0]
        raise CheckpointError(
            f"{k} has shape {tuple(tensors[k].shape)} in the file and {tuple(own[k].shape)} in {type(model).__name__}"
            + (f"; {len(shapes) - 1} more tensors differ in shape" if len(shapes) > 1 else ""),
            where=str(file),
            remedy="give the checkpoint of this model, with the same number of classes and the same options",
        )
    model.load_state_dict(tensors, strict=False)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name} contains NaN or infinity", where=str(file), remedy="use another checkpoint"
            )


def _read_pretrained(model: nn.Module, folder: Path) -> dict[str, Tensor] | None:
    """The weights in a folder, by the names in a transformers model, which may differ from those in its files.

    Families with experts keep those in one tensor, and save each expert on its own. ``None`` for other models, and
    where the folder has weights that this model lacks.
    """
    prefix = getattr(model, "weights_prefix", "")
    inner: Any = getattr(model, prefix.rstrip("."), model) if prefix else model
    if not (folder / "config.json").is_file() or not callable(getattr(type(inner), "from_pretrained", None)):
        return None
    try:
        with silence_transformers():
            loaded, info = type(inner).from_pretrained(folder, output_loading_info=True, dtype=inner.dtype)
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"transformers cannot load it as a {type(inner).__name__}: {first_line(error)}",
            where=str(folder),
            remedy="give the checkpoint of this model, built with the same options",
        ) from None
    if info["unexpected_keys"]:
        return None
    new = {*info["missing_keys"], *(key[0] for key in info.get("mismatched_keys", ()))}
    return {f"{prefix}{k}": x for k, x in loaded.state_dict().items() if k not in new}


def read_card(folder: Path) -> dict[str, Any]:
    """Read the card of a model's folder.

    Raises:
        CheckpointError: the card is missing or not JSON.
    """
    path = folder / MODEL_CARD
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(card, dict):
            raise ValueError(f"it holds a {type(card).__name__}, not a mapping")
        return card
    except FileNotFoundError:
        raise CheckpointError(
            f"has no {MODEL_CARD}", where=str(folder), remedy="give a folder that a run exported"
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path), remedy="export the model again") from None


def load_model(folder: str | Path) -> nn.Module:
    """Build the model in a folder that a run exported and load its weights, in evaluation mode.

    Raises:
        CheckpointError: the folder is incomplete, or the model can only be built by the caller's code.
    """
    folder = Path(folder)
    card = read_card(folder)
    if card.get("task") is not None and (folder / "config.json").exists():
        return load_pretrained(f"hf:{folder}", card["task"], None, {}).eval()
    if card.get("spec") is None:
        if (folder / "config.json").exists():
            import transformers

            architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
            model: nn.Module = getattr(transformers, architecture).from_pretrained(folder)
            return model.eval()
        raise CheckpointError(
            f"contains the weights of {card.get('class')}, a class that only your own code can build",
            where=str(folder),
            remedy=f"build it, then tutelage.models.load_weights(model, {str(folder)!r})",
        )
    try:
        spec = ModelSpec(**card["spec"])
    except TypeError as error:
        raise CheckpointError(
            f"spec: {error}", where=str(folder / MODEL_CARD), remedy="export the model again"
        ) from None
    model = build(spec, card.get("classes"), where=str(folder / MODEL_CARD))
    if isinstance(card.get("reused_head"), dict):
        # imported by name: the room "models" must not depend on the room "students"
        model = import_module("tutelage.students").ReusedHead(model, **card["reused_head"])
    load_weights(model, folder)
    return model.eval()
