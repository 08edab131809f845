"""Which layers of a transformer its student begins with, and how much each layer does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.data.batch import Batch
from tutelage.errors import ConfigError, DataError, ModelError, nearest, require
from tutelage.students.projectors import device_of, eval_no_grad

# The stack -------------------------------------------------------------------------------------------


def config_of(model: nn.Module) -> Any:
    """The configuration of a Hugging Face transformers model.

    Raises:
        ModelError: another kind of model.
    """
    require("transformers", "text", "a student that is cut from a transformers model")
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__} is not a Hugging Face transformers model",
            remedy="a student is cut from a model with a config, such as one from AutoModel.from_pretrained",
        )
    return model.config


def layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and modules of the layers: the one list of ``config.num_hidden_layers`` modules, each with weights.

    Raises:
        ModelError: not a transformers model; no such list; several of them; or layers that share weights.
    """
    config = config_of(model)
    family = type(model).__name__
    count = getattr(config, "num_hidden_layers", None)
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    shown = ", ".join(f"{path}: {len(m)}" for path, m in lists.items() if len(m) > 1) or "none"
    if not isinstance(count, int):
        raise ModelError(
            f"the config of {family} has no num_hidden_layers",
            remedy="cut its text model, which has a config of its own",
        )
    found = {
        path: m
        for path, m in lists.items()
        if len(m) == count and all(next(layer.parameters(), None) is not None for layer in m)
    }
    found = {path: m for path, m in found.items() if not any(path.startswith(f"{other}.") for other in found)}
    if getattr(config, "is_encoder_decoder", False) or len(found) > 1:
        raise ModelError(
            f"{family} has several stacks of layers ({shown})",
            remedy="use a model with one stack, an encoder or a decoder",
        )
    if not found:
        raise ModelError(
            f"{family} says num_hidden_layers {count}, and has no list of that many layers (lists: {shown})",
            remedy="models whose layers share their weights, such as ALBERT, have no layer to leave out; set "
            "num_hidden_layers in their config instead",
        )
    ((path, stack),) = found.items()
    weights = [id(p) for layer in stack for p in layer.parameters()]
    if len(set(weights)) < len(weights):
        raise ModelError(
            f"layers of {family} share weights ({path})",
            remedy="use a teacher whose layers have weights of their own",
        )
    return path, stack


# Maps ------------------------------------------------------------------------------------------------


def _every_other(teacher: int, student: int, importance: Sequence[float] | None) -> list[int]:
    if 2 * student - 1 > teacher:
        raise ConfigError(
            f"map every-other: {student} layers need a teacher of {2 * student - 1}, and this one has {teacher}",
            remedy=f"use at most {(teacher + 1) // 2} layers, or map: linspace",
        )
    return [2 * i for i in range(student)]


def _first(teacher: int, student: int, importance: Sequence[float] | None) -> list[int]:
    return list(range(student))


def _last(teacher: int, student: int, importance: Sequence[float] | None) -> list[int]:
    return list(range(teacher - student, teacher))


def _linspace(teacher: int, student: int, importance: Sequence[float] | None) -> list[int]:
    gaps = max(student - 1, 1)
    return [(2 * i * (teacher - 1) + gaps) // (2 * gaps) for i in range(student)]  # rounded, in integers


def _influence(teacher: int, student: int, importance: Sequence[float] | None) -> list[int]:
    if importance is None or len(importance) != teacher:
        given = "none" if importance is None else f"{len(importance)}"
        raise ConfigError(
            f"map influence needs a number for each of the teacher's {teacher} layers, {given} given",
            remedy="importance=block_influence(teacher, batches)",
        )
    ranked = sorted(range(teacher), key=lambda layer: (-importance[layer], layer))
    return sorted(ranked[:student])


LAYER_MAPS: dict[str, Callable[[int, int, Sequence[float] | None], list[int]]] = {
    "every-other": _every_other,
    "first": _first,
    "influence": _influence,
    "last": _last,
    "linspace": _linspace,
}
"""By name: (layers of the teacher, of the student, importance of each of the teacher's) -> the teacher's layers."""


def select_layers(
    map: str | Sequence[int], teacher_layers: int, student_layers: int, importance: Sequence[float] | None = None
) -> list[int]:
    """For each layer of the student, from the first, the layer of the teacher that it is a copy of, counted from 0.

    Args:
        map: ``every-other``: W_S,l = W_T,2l, so layers 0, 2, 4 ... of the teacher; ``first``; ``last``; ``linspace``:
            evenly from the first to the last, rounded, which of 12 layers to 6 is 0, 2, 4, 7, 9, 11, those of
            DistilBERT's published code; ``influence``: the layers of highest importance, in their order; or the
            layers themselves, in any order and more than once if need be.
        teacher_layers: how many layers the teacher has.
        student_layers: how many the student gets.
        importance: for ``influence``, a number for each layer of the teacher; :func:`block_influence` gives them.

    Raises:
        ConfigError: unknown map, more layers than there are, a layer out of range, no importance.

    Reference: Sanh et al., DistilBERT (2019), section 3; Men et al., ShortGPT (2024), equation 1.
    """
    if not isinstance(map, str):
        return _listed([int(layer) for layer in map], teacher_layers, student_layers)
    if map not in LAYER_MAPS:
        near = nearest(map, list(LAYER_MAPS), 1)
        raise ConfigError(
            f"unknown layer map {map!r}" + (f", is {near[0]!r} meant?" if near else ""),
            remedy=f"allowed: {', '.join(LAYER_MAPS)}, or a list of layers",
        )
    if not 1 <= student_layers <= teacher_layers:
        raise ConfigError(
            f"{student_layers} layers cannot be taken from a teacher of {teacher_layers}",
            remedy=f"use 1 to {teacher_layers} layers",
        )
    return LAYER_MAPS[map](teacher_layers, student_layers, importance)


def _listed(layers: list[int], teacher: int, student: int) -> list[int]:
    if len(layers) != student or not layers:
        raise ConfigError(
            f"the map lists {len(layers)} layers, and the student has {student}",
            remedy="list a layer of the teacher for each layer of the student",
        )
    wrong = [layer for layer in layers if not 0 <= layer < teacher]
    if wrong:
        raise ConfigError(
            f"the map lists layer {', '.join(map(str, wrong))}, and the teacher has {teacher}",
            remedy=f"layers count from 0 to {teacher - 1}",
        )
    return layers


# Influence -------------------------------------------------------------------------------------------


def block_influence(model: nn.Module, batches: Iterable[Batch | Mapping[str, Tensor]]) -> list[float]:
    """How much each layer changes what goes through it: 1 - cosine(input, output), the mean over tokens.

    Args:
        model: a transformers model; run in evaluation mode, without autograd.
        batches: each a :class:`~tutelage.data.Batch` or the model's arguments by name. Positions whose
            ``attention_mask`` is 0 do not count.

    Returns:
        A number from 0 (changes no direction) to 2 for each layer, first to last.

    Raises:
        ModelError: no stack of layers.
        DataError: no batches, or none with a position that counts.

    Reference: Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (2024).
    """
    _, stack = layer_stack(model)
    sums, counts = [0.0] * len(stack), [0.0] * len(stack)
    mask: list[Tensor | None] = [None]

    def hook(layer: int) -> Callable[..., None]:
        def seen(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
            outputs = output if isinstance(output, Tensor) else output[0]
            change = 1 - F.cosine_similarity(inputs.float(), outputs.float(), dim=-1)
            counted = torch.ones_like(change) if mask[0] is None else mask[0].to(change).expand_as(change)
            sums[layer] += float((change * counted).sum())
            counts[layer] += float(counted.sum())

        return seen

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(stack)]
    try:
        with eval_no_grad(model):
            for batch in batches:
                inputs = batch.inputs if isinstance(batch, Batch) else batch
                named = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
                named = {k: v.to(device_of(model)) for k, v in named.items() if k != "labels"}
                mask[0] = named.get("attention_mask")
                model(**named)
    finally:
        for handle in handles:
            handle.remove()
    if not all(counts):
        raise DataError(
            "no batch has a token that counts", remedy="give batches of real texts; a few hundred texts do"
        )
    return [total / count for total, count in zip(sums, counts, strict=True)]
