"""Builds a model from a config and copies the weights of another model into it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import ModelError


def build_from_config(model: nn.Module, config: Any, seed: int = 0) -> nn.Module:
    """A model of the same class with random weights, in the dtype, on the device and in the mode of ``model``."""
    try:
        type(config).from_dict(config.to_dict())  # the config must also load
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            new: Any = type(model)(config)
    except Exception as error:
        raise ModelError(
            f"transformers cannot build {type(model).__name__} with these sizes: {' '.join(str(error).split())}",
            remedy="choose other sizes",
        ) from error
    first = next(model.parameters())
    new = new.to(first.device).train(model.training)
    for p in new.parameters():  # not buffers: the frequencies of rotary positions need their full precision
        p.data = p.data.to(first.dtype)
    if getattr(model, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(model.generation_config)
    student: nn.Module = new
    return student


def copy_weights(
    student: nn.Module, teacher: nn.Module, source: Callable[[str], str], select: Callable[[str, Tensor], Tensor]
) -> list[str]:
    """Copy the teacher's weights into the student; returns the student's names that the teacher does not have.

    ``source`` maps a name of the student to a name of the teacher; ``select`` maps that name and its value to the
    part to copy.
    """
    theirs, missing = teacher.state_dict(), []
    with torch.no_grad():
        for name, destination in student.state_dict().items():
            value = theirs.get(source(name))
            if value is None:
                missing.append(name)
                continue
            part = select(source(name), value)
            if part.shape != destination.shape:
                raise ModelError(
                    f"{name} of the student has shape {list(destination.shape)}, and the part of the teacher's "
                    f"{list(value.shape)} has {list(part.shape)}",
                    remedy="use a teacher whose weights have the sizes that its config states",
                )
            destination.copy_(part)
    return missing
