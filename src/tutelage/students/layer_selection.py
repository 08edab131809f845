"""Which layers of a transformer its student starts with, and how much each layer changes its input."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.data.batch import Batch
from tutelage.errors import ConfigError, DataError, ModelError, nearest, require, shorten
from tutelage.students.projectors import device_of, eval_no_grad


def require_config(model: nn.Module) -> Any:
    """The config of a Hugging Face transformers model; raises :class:`ModelError` for other models."""
    require("transformers", "text", "a student that is pruned from a transformers model")
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__} is not a Hugging Face transformers model",
            remedy="use a model with a config, such as one from AutoModel.from_pretrained",
        )
    return model.config


def find_layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and modules of the layers: the only list with ``config.num_hidden_layers`` modules, each with weights."""
    config = require_config(model)
    family = type(model).__name__
    count = getattr(config, "num_hidden_layers", None)
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    listing = ", ".join(f"{path}: {len(m)}" for path, m in lists.items() if len(m) > 1) or "none"
    if not isinstance(count, int):
        raise ModelError(
            f"the config of {family} has no num_hidden_layers",
            remedy="prune its text model, which has a config of its own",
        )
    stacks = {
        path: m for path, m in lists.items() if len(m) == count and all(any(True for _ in x.parameters()) for x in m)
    }
    stacks = {path: m for path, m in stacks.items() if not any(path.startswith(f"{other}.") for other in stacks)}
    if getattr(config, "is_encoder_decoder", False) or len(stacks) > 1:
        raise ModelError(
            f"{family} has several stacks of layers ({listing})",
            remedy="use a model with one stack, an encoder or a decoder",
        )
    if not stacks:
        raise ModelError(
            f"{family} has num_hidden_layers {count}, and no list with that many layers (lists: {listing})",
            remedy="models whose layers share their weights, such as ALBERT, have no layer to remove; set "
            "num_hidden_layers in their config instead",
        )
    ((path, stack),) = stacks.items()
    weights = [id(p) for layer in stack for p in layer.parameters()]
    if len(set(weights)) < len(weights):
        raise ModelError(
            f"layers of {family} share weights ({path})",
            remedy="use a teacher whose layers have weights of their own",
        )
    return path, stack


LAYER_MAPS = ("every-other", "first", "influence", "last", "linspace")
"""Names of layer maps; see :func:`select_layers`."""


def select_layers(
    map: str | Sequence[int], teacher_layers: int, student_layers: int, importance: Sequence[float] | None = None
) -> list[int]:
    """For each layer of the student the layer of the teacher that it copies, counted from 0.

    Args:
        map: ``every-other``: W_S,l = W_T,2l, so layers 0, 2, 4 ... of the teacher; ``first``; ``last``; ``linspace``:
            evenly spaced from the first to the last, rounded, so 0, 2, 4, 7, 9, 11 for 12 to 6 layers, as in
            DistilBERT's published code; ``influence``: the layers of highest importance, in their order; or a list of
            layers in any order, with repetitions if desired.
        teacher_layers: number of layers of the teacher.
        student_layers: number of layers of the student.
        importance: for ``influence``, a number for each layer of the teacher, as from :func:`block_influence`.

    Raises:
        ConfigError: unknown map, more layers than there are, a layer out of range, or no importance.

    Reference: Sanh et al., DistilBERT (2019), section 3; Men et al., ShortGPT (2024), equation 1.
    """
    teacher, student = teacher_layers, student_layers
    if not isinstance(map, str):
        if len(map) != student or not len(map):
            raise ConfigError(
                f"the map lists {len(map)} layers, and the student has {student}",
                remedy="list a layer of the teacher for each layer of the student",
            )
        layers = [int(layer) for layer in map]
        if wrong := [str(layer) for layer in layers if not 0 <= layer < teacher]:
            raise ConfigError(
                f"the map lists layer {', '.join(wrong)}, and the teacher has {teacher}",
                remedy=f"layers count from 0 to {teacher - 1}",
            )
        return layers
    if map not in LAYER_MAPS:
        near = nearest(map, list(LAYER_MAPS), 1)
        raise ConfigError(
            f"unknown layer map {shorten(map)}" + (f", is {near[0]!r} meant?" if near else ""),
            remedy=f"allowed: {', '.join(LAYER_MAPS)}, or a list of layers",
        )
    if not 1 <= student <= teacher:
        raise ConfigError(
            f"{student} layers cannot be taken from a teacher of {teacher}", remedy=f"use 1 to {teacher} layers"
        )
    if map == "every-other":
        if 2 * student - 1 > teacher:
            raise ConfigError(
                f"map every-other: {student} layers need a teacher of {2 * student - 1}, and this one has {teacher}",
                remedy=f"use at most {(teacher + 1) // 2} layers, or map: linspace",
            )
        return [2 * i for i in range(student)]
    if map == "influence":
        if importance is None or len(importance) != teacher:
            raise ConfigError(
                f"map influence needs a number for each of the teacher's {teacher} layers, and importance has "
                f"{'none' if importance is None else len(importance)}",
                remedy="pass importance=block_influence(teacher, batches)",
            )
        return sorted(sorted(range(teacher), key=lambda i: (-importance[i], i))[:student])
    if map == "linspace":
        gaps = max(student - 1, 1)
        return [(2 * i * (teacher - 1) + gaps) // (2 * gaps) for i in range(student)]  # rounded, in integers
    return list(range(student) if map == "first" else range(teacher - student, teacher))


def block_influence(model: nn.Module, batches: Iterable[Batch | Mapping[str, Tensor]]) -> list[float]:
    """How much each layer changes its input: 1 - cosine(input, output), averaged over tokens.

    Args:
        model: a transformers model; it runs in evaluation mode, without autograd.
        batches: each a :class:`~tutelage.data.Batch`, or the model's arguments by name. Positions with
            ``attention_mask`` 0 do not count.

    Returns:
        A number from 0 (same direction) to 2 for each layer.

    Raises:
        ModelError: no stack of layers.
        DataError: no batches, or none with a position that counts.

    Reference: Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (2024).
    """
    _, stack = find_layer_stack(model)
    sums, counts = [0.0] * len(stack), [0.0] * len(stack)
    mask: list[Tensor | None] = [None]

    def hook(layer: int) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
            outputs = output if isinstance(output, Tensor) else output[0]
            change = 1 - F.cosine_similarity(inputs.float(), outputs.float(), dim=-1)
            counted = torch.ones_like(change) if mask[0] is None else mask[0].to(change).expand_as(change)
            sums[layer] += float((change * counted).sum())
            counts[layer] += float(counted.sum())

        return record

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
            "no batch has a counted token", remedy="give batches of real texts; a few hundred texts are enough"
        )
    return [total / count for total, count in zip(sums, counts, strict=True)]
