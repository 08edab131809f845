"""Which dimension of which weight counts what: found from the config and by running, without a list of names.

A model of two layers is built again and again on torch's meta device, each time with one number of its config
changed: a dimension that grows with ``intermediate_size`` counts units of the feed-forward layers, whatever the
family calls them. Where a family makes the hidden size also the number of heads times their size, projections into
heads are told from other square matrices by what they are given: they share the tensor that they read. The result is
put to the proof: with the units of a kind in another order along all dimensions that were found, a model with random
weights must give what it gave before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tutelage.errors import ModelError
from tutelage.students.config_probing import (
    Key,
    Shape,
    field_of,
    layer_pattern,
    probe_config,
    random_model,
    replace_fields,
    run_model,
    shape_changes,
    size_fields,
    weight_shapes,
)  # fmt: skip

COMBINATIONS = 64
"""Readings of a layer that are tried at most."""


class Axis(NamedTuple):
    """What a dimension counts.

    Attributes:
        role: ``hidden``, ``heads`` or ``intermediate``.
        size: how many consecutive numbers belong to one unit: of a head its size, else 1.
        stacked: how many blocks of all units follow each other, as in a joint projection to query, key and value.
    """

    role: str
    size: int = 1
    stacked: int = 1

    def positions(self, kept: Tensor, units: int) -> Tensor:
        """Where the ``kept`` of ``units`` units stand along the dimension."""
        inner = (kept[:, None] * self.size + torch.arange(self.size)).flatten()
        return torch.cat([inner + block * units * self.size for block in range(self.stacked)])


class WeightLayout(NamedTuple):
    """What is known of a model's widths.

    Attributes:
        axes: what each dimension counts, where it is one of the three roles.
        units: how many units each role has.
        head: the size of a head.
        group: how many query heads share a key head.
        tied: whether the hidden size is the number of heads times their size.
        field: the config's name of the number of feed-forward units.
        companions: fields of the config that must follow the hidden size.
    """

    axes: dict[Key, Axis]
    units: dict[str, int]
    head: int
    group: int
    tied: bool
    field: str
    companions: tuple[str, ...]


# Reading a model -------------------------------------------------------------------------------------


def find_weight_layout(model: nn.Module) -> WeightLayout:
    """What each dimension of a model's weights counts.

    Raises:
        ModelError: the widths of this family cannot be found, or what was found does not hold.
    """
    kind, config, path = probe_config(model)
    family = kind.__name__
    before = _patterned(weight_shapes(kind, config), path, family)
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    head = int(getattr(config, "head_dim", None) or hidden // heads)
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    group = heads // shared
    more_heads = {"num_attention_heads": heads + group}
    if hasattr(config, "num_key_value_heads"):
        more_heads["num_key_value_heads"] = shared + 1
    compare = _comparer(kind, config, path, before)
    by_heads = compare(**more_heads)
    tied = not by_heads or any(g <= 0 or g % head for g in by_heads.values())
    companions = _companions(kind, config, hidden, head, compare)
    wider = {"hidden_size": hidden + head, **dict.fromkeys(companions, hidden + head)}
    by_hidden = compare(**wider, **(more_heads if tied else {}))
    if not by_hidden:
        raise ModelError(f"the hidden size of {family} cannot be changed", remedy="cut its depth: layers=...")
    apart = set(by_hidden) | (set() if tied else set(by_heads or {}))
    field, by_units = _feed_forward(config, path, apart, compare, family)
    fixed = {key: Axis("intermediate", 1, g) for key, g in by_units.items()}
    readings = (
        _tied_readings(kind, config, path, by_hidden, head)
        if tied
        else _plain_readings(by_hidden, by_heads or {}, head, group)
    )
    units = {"hidden": hidden, "heads": heads if tied else shared, "intermediate": int(getattr(config, field))}
    wrong: list[str] = []
    for reading in itertools.islice(readings, COMBINATIONS):
        axes = {**fixed, **reading}
        wrong = _violations(kind, config, path, axes, units)
        if not wrong:
            return WeightLayout(axes, units, head, group, tied, field, companions)
    raise ModelError(
        f"how {family} lays out its {' and '.join(wrong)} was not found: in another order it gives other outputs",
        remedy="cut its depth, layers=..., which needs no such knowledge",
    )


def _patterned(found: Mapping[str, Shape] | None, stack: str, family: str) -> dict[str, Shape]:
    if found is None:
        raise ModelError(f"{family} cannot be built from its config", remedy="cut a model that transformers can load")
    merged: dict[str, Shape] = {}
    for name, shape in found.items():
        if merged.setdefault(layer_pattern(name, stack), shape) != shape:
            raise ModelError(f"layers of {family} differ in size ({name})", remedy="cut its depth only: layers=...")
    return merged


def _comparer(
    kind: type[nn.Module], config: Any, path: str, before: dict[str, Shape]
) -> Callable[..., dict[Key, int] | None]:
    def compare(**numbers: int) -> dict[Key, int] | None:
        try:
            found = weight_shapes(kind, replace_fields(config, **numbers))
            return None if found is None else shape_changes(before, _patterned(found, path, kind.__name__))
        except Exception:  # noqa: BLE001  configs refuse numbers in ways of their own
            return None

    return compare


def _companions(kind: type[nn.Module], config: Any, hidden: int, head: int, compare: Any) -> tuple[str, ...]:
    """Fields that equal the hidden size and cannot differ from it: without them the model fails, or is another."""
    own, found = field_of(config, "hidden_size"), []
    for name, value in size_fields(config).items():
        if value != hidden or name == own:
            continue
        changed = compare(**{name: hidden + head})
        if changed is None:
            found.append(name)
        elif changed:
            found += [] if _runs(kind, replace_fields(config, **{name: hidden + head})) else [name]
        elif name.endswith("hidden_size"):  # of a head that this model is without
            found.append(name)
    return tuple(found)


def _runs(kind: type[nn.Module], config: Any) -> bool:
    try:
        run_model(random_model(kind, config))
    except Exception:  # noqa: BLE001  sizes that do not fit fail in many ways
        return False
    return True


def _feed_forward(config: Any, path: str, apart: set[Key], compare: Any, family: str) -> tuple[str, dict[Key, int]]:
    """The one field that changes dimensions inside of layers only, and none that heads or hidden size change."""
    known = {field_of(config, name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
    found = {}
    for name, value in size_fields(config).items():
        changed = {} if name in known else compare(**{name: value + 1})
        if changed and not apart & set(changed) and all(key[0].startswith(f"{path}.*.") for key in changed):
            found[name] = changed
    if len(found) != 1:
        shown = ", ".join(found) or "none"
        raise ModelError(
            f"the feed-forward width of {family} is not one number of its config (found: {shown})",
            remedy="cut its depth only: layers=...",
        )
    return next(iter(found.items()))


def _plain_readings(
    by_hidden: dict[Key, int], by_heads: dict[Key, int], head: int, group: int
) -> Iterator[dict[Key, Axis]]:
    """Where heads have a size of their own: what grows with the one, and what with the other."""
    fixed = {key: Axis("hidden", 1, g // head) for key, g in by_hidden.items()}
    yield {**fixed, **{key: Axis("heads", g) for key, g in by_heads.items()}}
    yield {**fixed, **{key: Axis("heads", head * group, g // (head * group)) for key, g in by_heads.items()}}


def _tied_readings(
    kind: type[nn.Module], config: Any, path: str, by_hidden: dict[Key, int], head: int
) -> Iterator[dict[Key, Axis]]:
    """Where heads and hidden size grow together: the likeliest reading of a layer first."""
    fixed = {key: Axis("hidden") for key in by_hidden}
    joint = [key for key, g in by_hidden.items() if g > head]
    square, reads_shared = _square(kind, config, path, by_hidden, head)
    into, out_of, neither = ({0: "heads", 1: "hidden"}, {0: "hidden", 1: "heads"}, {0: "hidden", 1: "hidden"})
    orders = [[into] if m in reads_shared else [out_of, into, neither] for m in square]
    layouts = [lambda g: Axis("heads", head, g // head), lambda g: Axis("heads", g, 1)] if joint else [None]
    for layout, *roles in itertools.product(layouts, *orders):
        reading = dict(fixed)
        if layout is not None:
            reading.update({key: layout(by_hidden[key]) for key in joint})
        for module, role in zip(square, roles, strict=True):
            for i in (0, 1):
                reading[f"{module}.weight", i] = _axis(role[i], head)
            if (f"{module}.bias", 0) in fixed:
                reading[f"{module}.bias", 0] = _axis(role[0], head)
        yield reading


def _axis(role: str, head: int) -> Axis:
    return Axis("heads", head) if role == "heads" else Axis("hidden")


def _square(
    kind: type[nn.Module], config: Any, path: str, by_hidden: dict[Key, int], head: int
) -> tuple[list[str], set[str]]:
    """Modules of a layer whose weight is of hidden size both ways, and those of them that share what they read."""
    model = random_model(kind, config)
    square: list[str] = []
    given: dict[int, set[str]] = {}
    tensors: list[Tensor] = []  # held, so that no two have the same id
    handles = []
    for name, module in model.named_modules():
        m = layer_pattern(f"{name}.", path).removesuffix(".")
        weight = getattr(module, "weight", None)
        if not name.startswith(f"{path}.0.") or not isinstance(weight, Tensor) or weight.ndim != 2:
            continue
        if by_hidden.get((f"{m}.weight", 0)) != head or by_hidden.get((f"{m}.weight", 1)) != head:
            continue
        square.append(m)

        def seen(module: nn.Module, args: Any, kwargs: Any, m: str = m) -> None:
            x = next(iter(args or kwargs.values()))
            tensors.append(x)
            given.setdefault(id(x), set()).add(m)

        handles.append(module.register_forward_pre_hook(seen, with_kwargs=True))
    try:
        run_model(model)
    except Exception as error:
        raise ModelError(
            f"{kind.__name__} does not run on token ids alone: {error}", remedy="cut its depth only: layers=..."
        ) from error
    for handle in handles:
        handle.remove()
    return square, {m for readers in given.values() if len(readers) > 1 for m in readers}


# The proof -------------------------------------------------------------------------------------------


def _violations(
    kind: type[nn.Module], config: Any, path: str, axes: dict[Key, Axis], units: dict[str, int]
) -> list[str]:
    """Roles whose units cannot stand in another order without changing what the model gives."""
    model = random_model(kind, config)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    before = run_model(model)
    wrong = []
    for role, count in units.items():
        noise = torch.Generator().manual_seed(2)
        common = torch.randperm(count, generator=noise)
        orders: dict[str, Tensor] = {}
        changed = {}
        for name, x in state.items():
            layer = name[len(path) + 1 :].split(".")[0] if name.startswith(f"{path}.") else ""
            if layer not in orders:
                orders[layer] = torch.randperm(count, generator=noise)
            order = common if role == "hidden" else orders[layer]
            for i in range(x.ndim):
                axis = axes.get((layer_pattern(name, path), i))
                if axis is not None and axis.role == role:
                    if len(order) * axis.size * axis.stacked != x.shape[i]:
                        return [role]
                    x = x.index_select(i, axis.positions(order, count))
            changed[name] = x
        model.load_state_dict(changed)
        after = run_model(model)
        if not all(_same(a, b, common, role) for a, b in zip(before, after, strict=True)):
            wrong.append(role)
    return wrong


def _same(before: Tensor, after: Tensor, order: Tensor, role: str) -> bool:
    """Equal, or equal in the new order of hidden units where the output is made of these."""
    tolerance = 1e-3 * float(before.abs().max())
    if float((before - after).abs().max()) <= tolerance:
        return True
    moved = role == "hidden" and before.shape[-1] == len(order)
    return moved and float((before[..., order] - after).abs().max()) <= tolerance
