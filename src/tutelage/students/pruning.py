"""Prunes a transformers model: fewer layers, heads or units, with the teacher's weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tutelage.errors import ConfigError, ModelError, first_line, shorten
from tutelage.students.config_probing import (
    build_from_config,
    config_for_layers,
    copy_weights,
    layer_pattern,
    replace_fields,
    set_layer_kinds,
)
from tutelage.students.depth_check import check_depth
from tutelage.students.embeddings import factorise_embeddings
from tutelage.students.layer_selection import find_layer_stack, require_config, select_layers
from tutelage.students.width_pruning import WeightLayout, find_weight_layout

Units = dict[tuple[str, str], Tensor]
"""Units by role and layer, ascending; hidden units have no layer."""


@dataclass(frozen=True)
class PrunedStudent:
    """A student, and how its weights relate to its teacher's.

    Attributes:
        model: the student, of the teacher's class; it shares no memory with the teacher.
        layers: for each layer of the student the layer of the teacher, counted from 0.
        missing_keys: weights of the student that start random, since the teacher has none for them.
        unexpected_keys: weights of the teacher without a place in the student, weights of removed layers excepted;
            such as the first norm of a ModernBERT layer that becomes the first layer.
    """

    model: nn.Module
    layers: tuple[int, ...]
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()


def prune(
    model: nn.Module, *, layers: int | None = None, map: str | Sequence[int] | None = None,
    importance: Sequence[float] | None = None, width: int | None = None, heads: int | None = None,
    intermediate: int | None = None, embedding: int | None = None, initial: Literal["teacher", "random"] = "teacher",
    seed: int = 0,
) -> PrunedStudent:  # fmt: skip
    """A smaller model of the same class, with a config of its own and the teacher's head.

    The importance of a unit is the norm of all weights that write to it times the norm of all weights that read it.
    Hidden units are the same in all layers; heads and feed-forward units are selected in each layer. A smaller hidden
    size also changes what the layer norms divide by, so such a student is useful only after training.

    Args:
        model: a Hugging Face transformers model with one stack of layers and any head. Not changed.
        layers: number of layers. Default: all, or as many as ``map`` lists.
        map: which layers of the teacher, as in :func:`select_layers`. Default: ``every-other`` if ``layers`` is set.
        importance: for ``map="influence"`` only: a number for each layer, as from :func:`block_influence`.
        width: hidden size. In families whose hidden size is the number of heads times their size, such as BERT, it
            is a multiple of the size of a head and determines the number of heads.
        heads: attention heads, in families whose heads have a size of their own; a multiple of the query heads that
            share a key head.
        intermediate: feed-forward units.
        embedding: width of the token embeddings, in families with a matrix from there to the hidden size: ELECTRA,
            DeBERTa-v2 and others with ``embedding_size``.
        initial: ``teacher``: the teacher's weights; ``random``: the same model with random weights.
        seed: of all weights that are not copied.

    Raises:
        ConfigError: unknown or unsuitable map, a size out of range, an unknown ``initial``.
        ModelError: unsupported kind of model, sizes that the family cannot have, or a family whose layers compute
            something else at another place (see :func:`~tutelage.students.depth_check.check_depth`).

    Reference: Sanh et al., DistilBERT (2019), section 3, for layers; Wang et al., MiniLM (2020), for widths.
    """
    if initial not in ("teacher", "random"):
        raise ConfigError(f"initial is {shorten(initial)}", remedy="use teacher or random")
    path, stack = find_layer_stack(model)
    numbers = _layer_numbers(layers, map, len(stack), importance)
    is_full = numbers == list(range(len(stack)))
    shallow = None if is_full else _shallow_student(model, path, numbers, seed)
    if shallow is not None and initial == "teacher":
        check_depth(model, shallow, numbers)
    config = replace_fields(require_config(model if shallow is None else shallow))
    units: Units = {}
    layout: WeightLayout | None = None
    if (width, heads, intermediate) != (None, None, None):
        layout = find_weight_layout(model)
        shallow = None
        sizes = _set_sizes(config, layout, width, heads, intermediate, type(model).__name__)
        units = _most_important(model, path, layout, sizes)
    student = build_from_config(model, config, seed) if shallow is None else shallow
    missing = copy_weights(
        student, model, lambda name: _teacher_name(name, path, numbers),
        lambda name, value: value if layout is None else _select_units(name, value, path, layout, units),
    )  # fmt: skip
    if embedding is not None:
        student, more = factorise_embeddings(student, embedding, seed)
        missing = [*missing, *more]
    unexpected = _unexpected_keys(model, student, path, numbers)
    if initial == "random":
        student = build_from_config(student, replace_fields(require_config(student)), seed)
        missing, unexpected = list(student.state_dict()), []
    return PrunedStudent(student, tuple(numbers), tuple(missing), tuple(unexpected))


def _shallow_student(model: nn.Module, path: str, layers: list[int], seed: int) -> nn.Module:
    """A student with fewer layers and nothing else changed."""
    family = type(model).__name__
    remedy = "keep all layers, or name a smaller model as student.model"
    try:
        config = config_for_layers(model, layers)
        set_layer_kinds(model, config, layers)
        student = build_from_config(model, config, seed)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{family} has no config for {len(layers)} layers: {first_line(error)}", remedy=remedy
        ) from error
    if len(find_layer_stack(student)[1]) != len(layers):
        raise ModelError(f"num_hidden_layers does not set the number of layers in {path} of {family}", remedy=remedy)
    copy_weights(student, model, lambda name: _teacher_name(name, path, layers), lambda _, value: value)
    return student


def _layer_numbers(
    layers: int | None, map: str | Sequence[int] | None, total: int, importance: Sequence[float] | None
) -> list[int]:
    if importance is not None and map != "influence":
        raise ConfigError(
            f"importance is given, and map is {shorten(map)}", remedy='use map="influence", or remove importance'
        )
    if layers is None and map is None:
        return list(range(total))
    if layers is None:
        if isinstance(map, str):
            raise ConfigError(f"map: {map} without a number of layers", remedy="set layers=, such as half of them")
        layers = len(map or ())
    return select_layers("every-other" if map is None else map, total, layers, importance)


def _teacher_name(name: str, path: str, layers: Sequence[int]) -> str:
    """The teacher's name of a weight of the student."""
    if not name.startswith(f"{path}."):
        return name
    layer, rest = name[len(path) + 1 :].split(".", 1)
    return f"{path}.{layers[int(layer)]}.{rest}"


def _unexpected_keys(teacher: nn.Module, student: nn.Module, path: str, layers: Sequence[int]) -> list[str]:
    """Weights of the teacher without a place in the student, apart from those of removed layers."""
    used = {_teacher_name(name, path, layers) for name in student.state_dict()}
    copied = tuple(f"{path}.{layer}." for layer in layers)
    names = [name for name in teacher.state_dict() if name not in used]
    return [name for name in names if not name.startswith(f"{path}.") or name.startswith(copied)]


def _set_sizes(
    config: Any, layout: WeightLayout, width: int | None, heads: int | None, intermediate: int | None, family: str
) -> dict[str, int]:
    """Set the sizes in ``config``; returns the number of units of each role."""
    hidden, total = int(config.hidden_size), int(config.num_attention_heads)
    units = layout.units["intermediate"]
    given = {"width": (width, hidden), "heads": (heads, total), "intermediate": (intermediate, units)}
    for name, (size, most) in given.items():
        if size is not None and not 1 <= size <= most:
            raise ConfigError(f"{name} is {size}, and the teacher has {most}", remedy=f"use 1 to {most}")
    if layout.tied:
        heads, width = _tied_sizes(layout.head, hidden, heads, width, family)
    width, heads = width or hidden, heads or total
    if heads % layout.group:
        raise ConfigError(
            f"heads is {heads}, and {layout.group} heads share their keys and values in {family}",
            remedy=f"use a multiple of {layout.group}",
        )
    config.hidden_size, config.num_attention_heads = width, heads
    for name in layout.companions:
        setattr(config, name, width)
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = heads // layout.group
    setattr(config, layout.field, intermediate or units)
    shared = heads if layout.tied else heads // layout.group
    return {"hidden": width, "heads": shared, "intermediate": intermediate or units}


def _tied_sizes(head: int, hidden: int, heads: int | None, width: int | None, family: str) -> tuple[int, int]:
    """Heads and width in a family where one determines the other."""
    if width is None and heads is not None and heads * head != hidden:
        raise ModelError(
            f"in {family} the size of a head is hidden size / heads, so {heads} heads of {head} need a hidden size "
            f"of {heads * head}",
            remedy=f"use width={heads * head}, which also sets the number of heads",
        )
    width = hidden if width is None else width
    if width % head:
        below, above = width // head * head, (width // head + 1) * head
        near = " or ".join(str(size) for size in (below, above) if size)
        raise ConfigError(f"width {width} is not a multiple of the heads, each {head} wide", remedy=f"use {near}")
    if heads is not None and heads * head != width:
        raise ConfigError(f"{heads} heads of {head} are not a width of {width}", remedy="leave heads out")
    return width // head, width


def _unit_key(role: str, name: str, path: str) -> tuple[str, str]:
    """Role and layer of the units along a dimension of a weight; hidden units have no layer."""
    has_layer = role != "hidden" and name.startswith(f"{path}.")
    return role, name[len(path) + 1 :].split(".", 1)[0] if has_layer else ""


def _most_important(model: nn.Module, path: str, layout: WeightLayout, sizes: dict[str, int]) -> Units:
    sums: dict[tuple[str, str], list[Tensor | float]] = {}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, x in model.named_parameters():
        for i in range(x.ndim):
            axis = layout.axes.get((layer_pattern(name, path), i))
            if axis is None:
                continue
            others = [j for j in range(x.ndim) if j != i]
            square = x.detach().float().square()
            square = square.sum(others) if others else square
            square = square.view(axis.stacked, layout.units[axis.role], axis.size).sum((0, 2)).cpu()
            reads = i == 1 and id(x) not in tables
            both = sums.setdefault(_unit_key(axis.role, name, path), [0.0, 0.0])
            both[reads] = both[reads] + square
    units: Units = {}
    for key, (writes, reads_) in sums.items():
        weight = torch.as_tensor(writes) * torch.as_tensor(reads_)
        ranked = weight.argsort(descending=True, stable=True)
        units[key] = ranked[: sizes[key[0]]].sort().values
    return units


def _select_units(name: str, value: Tensor, path: str, layout: WeightLayout, units: Units) -> Tensor:
    """The selected units along all dimensions of a weight."""
    for i in range(value.ndim):
        axis = layout.axes.get((layer_pattern(name, path), i))
        if axis is not None:
            selected = units[_unit_key(axis.role, name, path)]
            value = value.index_select(i, axis.positions(selected, layout.units[axis.role]).to(value.device))
    return value
