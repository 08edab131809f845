"""A new model from a config, and the weights of another copied into it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import ModelError


def build_from_config(model: nn.Module, config: Any, seed: int = 0) -> nn.Module:
    """A model of the same class with random weights, in the precision, on the device and in the mode of ``model``.

    Raises:
        ModelError: transformers refuses the config.
    """
    try:
        type(config).from_dict(config.to_dict())  # as it will be loaded
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            new: Any = type(model)(config)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be built so: {' '.join(str(error).split())}",
            remedy="choose other sizes; what is said comes from transformers",
        ) from error
    first = next(model.parameters())
    new = new.to(first.device).train(model.training)
    for p in new.parameters():  # and no buffer: the frequencies of rotary positions need their full precision
        p.data = p.data.to(first.dtype)
    if getattr(model, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(model.generation_config)
    built_: nn.Module = new
    return built_


def copy_weights(
    student: nn.Module, teacher: nn.Module, source: Callable[[str], str], chosen: Callable[[str, Tensor], Tensor]
) -> list[str]:
    """Copy the teacher's weights into the student, and name the student's that have none.

    Args:
        student: changed in place.
        teacher: not changed; nothing is shared with it.
        source: a name of the student's -> the name of the teacher's.
        chosen: a name of the teacher's and its value -> the part of it that is copied.

    Raises:
        ModelError: a part that is not as large as its place.
    """
    theirs, fresh = teacher.state_dict(), []
    with torch.no_grad():
        for name, place in student.state_dict().items():
            value = theirs.get(source(name))
            if value is None:
                fresh.append(name)
                continue
            part = chosen(source(name), value)
            if part.shape != place.shape:
                raise ModelError(
                    f"{name} of the student is {list(place.shape)}, and {list(part.shape)} of its teacher's "
                    f"{list(value.shape)} were chosen",
                    remedy="cut a model whose weights are of the sizes that its config says",
                )
            place.copy_(part)
    return fresh
