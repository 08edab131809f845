"""Checkpoints: all that a run needs to continue with the same results as without an interruption.

A checkpoint is a folder with one safetensors file for all tensors and one JSON file for all other values, so reading
it never runs code. Tensors are stored unsharded, by the names of the unwrapped module, so a run can continue with
another number of processes.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tutelage.engine.zero import Zero
from tutelage.errors import CheckpointError
from tutelage.files import TEMPORARY_PREFIX, atomic_folder

TENSORS = "tensors.safetensors"
STATE = "state.json"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def full_model_state(module: nn.Module, zero: Zero | None = None) -> dict[str, Tensor]:
    """A copy of all weights and buffers, unsharded, on the CPU, by the names of the unwrapped module.

    Every process must call it; only the main process gets the weights.
    """
    if zero is not None:
        return zero.model()
    state = get_model_state_dict(module, options=_WHOLE)  # on the CPU without a copy
    return {k: v.detach().clone() for k, v in state.items() if isinstance(v, Tensor)}


def pack(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; each tensor in it is added to ``tensors`` and replaced by its name."""
    if isinstance(value, Tensor):
        tensors[prefix] = value.detach().cpu().contiguous().clone()  # safetensors needs its own storage
        return {"tensor": prefix}
    if isinstance(value, dict):
        return {"dict": [[k, pack(v, f"{prefix}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [pack(v, f"{prefix}/{i}", tensors) for i, v in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{prefix} is a {type(value).__name__}, which a checkpoint cannot hold")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`pack`."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "tensor":
            return tensors[inner]
        case "dict":
            return {k: unpack(v, tensors) for k, v in inner}
        case "list":
            return [unpack(v, tensors) for v in inner]
        case _:
            return tuple(unpack(v, tensors) for v in inner)


def rng_state() -> dict[str, Any]:
    """The states of all random generators that training may use in this process."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the result of :func:`rng_state`."""
    torch.set_rng_state(state["torch"].to(torch.uint8))
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].to(torch.uint8))


def capture_training(module: nn.Module, optimizer: torch.optim.Optimizer, zero: Zero | None = None) -> dict[str, Any]:
    """Weights and optimizer state, unsharded; every process must call it."""
    model = full_model_state(module, zero)
    state = get_optimizer_state_dict(module, optimizer, options=_WHOLE) if zero is None else zero.state()
    return {"model": model, "optimizer": state}


def restore_training(
    module: nn.Module, optimizer: torch.optim.Optimizer, captured: dict[str, Any], zero: Zero | None = None
) -> None:
    """Restore the result of :func:`capture_training`; every process must call it with the same values."""
    if zero is not None:
        zero.restore(captured)
        return
    set_model_state_dict(module, captured["model"], options=StateDictOptions(full_state_dict=True))
    # torch cannot distribute a full state without any tensor, such as that of SGD without momentum.
    holds = any(
        isinstance(v, Tensor) and v.dim() > 0 for s in captured["optimizer"]["state"].values() for v in s.values()
    )
    # Not strict: a parameter that no loss reaches has no optimizer state.
    options = StateDictOptions(full_state_dict=holds, strict=False)
    set_optimizer_state_dict(module, optimizer, captured["optimizer"], options=options)


def save_checkpoint(folder: Path, parts: dict[str, Any]) -> None:
    """Write a checkpoint, atomically."""
    tensors: dict[str, Tensor] = {}
    state = pack(parts, "", tensors)
    with atomic_folder(folder) as draft:
        save_file(tensors, str(draft / TENSORS))
        (draft / STATE).write_text(json.dumps(state), encoding="utf-8")


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote."""
    try:
        tensors = load_file(str(folder / TENSORS))
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        parts: dict[str, Any] = unpack(state, tensors)
        if not isinstance(parts, dict):
            raise ValueError(f"{STATE} holds a {type(parts).__name__}")
        return parts
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"is damaged: {error}",
            where=str(folder),
            remedy="delete this folder; --resume then uses the checkpoint before it",
        ) from None


def newest(folder: Path) -> Path | None:
    """The checkpoint of the latest step in ``folder``."""
    return max(folder.glob("step-*"), default=None)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest."""
    for old in sorted(folder.glob("step-*"))[:-keep]:
        trash = old.with_name(f"{TEMPORARY_PREFIX}{old.name}")
        old.rename(trash)  # atomically: a kill in between leaves no partial checkpoint
        shutil.rmtree(trash, ignore_errors=True)
