"""A student cut from a transformers model: fewer layers, fewer heads, narrower, with the teacher's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tutelage.errors import ConfigError, ModelError
from tutelage.students.config_probing import config_for_layers, layer_pattern, replace_fields
from tutelage.students.embeddings import factorise_embeddings
from tutelage.students.layer_selection import config_of, layer_stack, select_layers
from tutelage.students.weight_transfer import build_from_config, copy_weights
from tutelage.students.width_pruning import WeightLayout, find_weight_layout

Units = dict[tuple[str, str], Tensor]
"""Units by role and layer, ascending; hidden units have no layer."""


@dataclass(frozen=True)
class PrunedStudent:
    """A student, and what became of its teacher's weights.

    Attributes:
        model: the student, of the teacher's class, sharing no memory with it.
        layers: for each of its layers the layer of the teacher, counted from 0.
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

    What is kept of a width is what weighs most: for each unit the norm of all that writes to it times the norm of all
    that reads it, so that a unit with either at zero goes first. Hidden units are the same in all layers; heads and
    feed-forward units are chosen in each. Fewer layers, heads or feed-forward units only leave something out; a
    smaller hidden size also moves what the layer norms divide by, so such a student needs training to be of use.

    Args:
        model: a Hugging Face transformers model with one stack of layers, with any head. Not changed.
        layers: number of layers; ``None``: all, or as many as ``map`` lists.
        map: which of the teacher's layers, as in :func:`select_layers`; ``None``: ``every-other`` where ``layers`` is
            given.
        importance: for ``map="influence"``, and only there: a number for each layer, as of :func:`block_influence`.
        width: hidden size. Where the family makes it the number of heads times their size, as BERT does, a multiple
            of the size of a head, and heads become fewer with it.
        heads: attention heads, for families whose heads have a size of their own; with fewer key and value heads,
            a multiple of the query heads that share one.
        intermediate: units of the feed-forward layers.
        embedding: width of the token embeddings, which a matrix brings to the hidden size, for families that have
            such a matrix: ELECTRA, DeBERTa-v2 and others with ``embedding_size``.
        initial: ``random``: the same model with weights drawn by ``seed``, nothing of the teacher's.
        seed: of all weights that are not copied.

    Raises:
        ConfigError: unknown map or one that does not fit, a size out of range, an unknown ``initial``.
        ModelError: not such a model, a family whose widths cannot be found, or sizes that it cannot have.

    Reference: Sanh et al., DistilBERT (2019), section 3, for layers; Wang et al., MiniLM (2020), for the widths that
    such students have.
    """
    if initial not in ("teacher", "random"):
        raise ConfigError(f"initial is {initial!r}", remedy="use teacher or random")
    path, stack = layer_stack(model)
    chosen = _layers(layers, map, len(stack), importance)
    config = (
        config_for_layers(model, chosen) if chosen != list(range(len(stack))) else replace_fields(config_of(model))
    )
    units: Units = {}
    parts: WeightLayout | None = None
    if (width, heads, intermediate) != (None, None, None):
        parts = find_weight_layout(model)
        units = _kept(model, path, parts, _sizes(config, parts, width, heads, intermediate, type(model).__name__))
    student = build_from_config(model, config, seed)

    def source(name: str) -> str:
        return _renumbered(name, path, chosen)

    def part(name: str, value: Tensor) -> Tensor:
        return value if parts is None else _selected(name, value, path, parts, units)

    fresh = copy_weights(student, model, source, part)
    if embedding is not None:
        student, more = factorise_embeddings(student, embedding, seed)
        fresh = [*fresh, *more]
    left = _left(model, student, path, chosen)
    if initial == "random":
        return PrunedStudent(
            build_from_config(student, replace_fields(config_of(student)), seed),
            tuple(chosen),
            tuple(student.state_dict()),
            (),
        )
    return PrunedStudent(student, tuple(chosen), tuple(fresh), tuple(left))


def _layers(
    layers: int | None, map: str | Sequence[int] | None, total: int, importance: Sequence[float] | None
) -> list[int]:
    if importance is not None and map != "influence":
        raise ConfigError(f"importance is given, and map is {map!r}", remedy='use map="influence", or leave it out')
    if layers is None and map is None:
        return list(range(total))
    if layers is None:
        if isinstance(map, str):
            raise ConfigError(f"map: {map} without a number of layers", remedy="say layers=, such as half of them")
        layers = len(map or ())
    return select_layers("every-other" if map is None else map, total, layers, importance)


def _renumbered(name: str, path: str, layers: Sequence[int]) -> str:
    """A name of the student's as the teacher has it."""
    if not name.startswith(f"{path}."):
        return name
    layer, rest = name[len(path) + 1 :].split(".", 1)
    return f"{path}.{layers[int(layer)]}.{rest}"


def _left(teacher: nn.Module, student: nn.Module, path: str, layers: Sequence[int]) -> list[str]:
    """Names of the teacher's without a place in the student, but for whole layers that are left out."""
    used = {_renumbered(name, path, layers) for name in student.state_dict()}
    kept = {f"{path}.{layer}." for layer in layers}
    names = [name for name in teacher.state_dict() if name not in used]
    return [name for name in names if not name.startswith(f"{path}.") or any(name.startswith(k) for k in kept)]


# Widths ----------------------------------------------------------------------------------------------


def _sizes(
    config: Any, parts: WeightLayout, width: int | None, heads: int | None, intermediate: int | None, family: str
) -> dict[str, int]:
    """How many units of each role are kept; ``config`` is changed to say so."""
    hidden, total = int(config.hidden_size), int(config.num_attention_heads)
    for name, size, most in (
        ("width", width, hidden), ("heads", heads, total), ("intermediate", intermediate, parts.units["intermediate"])
    ):  # fmt: skip
        if size is not None and not 1 <= size <= most:
            raise ConfigError(f"{name} is {size}, and the teacher has {most}", remedy=f"use 1 to {most}")
    if parts.tied:
        heads, width = _tied(parts.head, hidden, heads, width, family)
    width, heads = width or hidden, heads or total
    if heads % parts.group:
        raise ConfigError(
            f"heads is {heads}, and {parts.group} heads share their keys and values in {family}",
            remedy=f"use a multiple of {parts.group}",
        )
    config.hidden_size, config.num_attention_heads = width, heads
    for name in parts.companions:
        setattr(config, name, width)
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = heads // parts.group
    setattr(config, parts.field, intermediate or parts.units["intermediate"])
    return {
        "hidden": width,
        "heads": heads if parts.tied else heads // parts.group,
        "intermediate": intermediate or parts.units["intermediate"],
    }


def _tied(head: int, hidden: int, heads: int | None, width: int | None, family: str) -> tuple[int, int]:
    """Heads and width where one follows from the other."""
    if width is None and heads is not None and heads * head != hidden:
        raise ModelError(
            f"{family} makes the size of a head hidden size / heads, so {heads} heads of {head} need a hidden size "
            f"of {heads * head}",
            remedy=f"use width={heads * head}, which takes as many heads out",
        )
    width = hidden if width is None else width
    if width % head:
        below, above = width // head * head, (width // head + 1) * head
        near = " or ".join(str(size) for size in (below, above) if size)
        raise ConfigError(f"width {width} is no whole number of heads, each {head} wide", remedy=f"use {near}")
    if heads is not None and heads * head != width:
        raise ConfigError(f"{heads} heads of {head} are not a width of {width}", remedy="leave heads out")
    return width // head, width


def _layer_of(name: str, path: str) -> str:
    return name[len(path) + 1 :].split(".", 1)[0] if name.startswith(f"{path}.") else ""


def _kept(model: nn.Module, path: str, parts: WeightLayout, sizes: dict[str, int]) -> Units:
    """The units of highest importance."""
    sums: dict[tuple[str, str], list[Tensor | float]] = {}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, x in model.named_parameters():
        for i in range(x.ndim):
            axis = parts.axes.get((layer_pattern(name, path), i))
            if axis is None:
                continue
            others = [j for j in range(x.ndim) if j != i]
            square = x.detach().float().square()
            square = square.sum(others) if others else square
            square = square.view(axis.stacked, parts.units[axis.role], axis.size).sum((0, 2)).cpu()
            reads = i == 1 and id(x) not in tables
            layer = "" if axis.role == "hidden" else _layer_of(name, path)
            both = sums.setdefault((axis.role, layer), [0.0, 0.0])
            both[reads] = both[reads] + square
    units: Units = {}
    for (role, layer), (writes, reads_) in sums.items():
        weight = torch.as_tensor(writes) * torch.as_tensor(reads_)
        ranked = weight.argsort(descending=True, stable=True)
        units[role, layer] = ranked[: sizes[role]].sort().values
    return units


def _selected(name: str, value: Tensor, path: str, parts: WeightLayout, units: Units) -> Tensor:
    """The kept units along all dimensions of a weight."""
    for i in range(value.ndim):
        axis = parts.axes.get((layer_pattern(name, path), i))
        if axis is not None:
            kept = units[axis.role, "" if axis.role == "hidden" else _layer_of(name, path)]
            value = value.index_select(i, axis.positions(kept, parts.units[axis.role]).to(value.device))
    return value
