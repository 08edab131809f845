"""Finds what each dimension of a weight counts, from the config and test runs, without a list of model families.

A model of two layers is built on torch's meta device several times, each time with one config number changed: a
dimension that grows with ``intermediate_size`` counts feed-forward units, whatever the family calls them. In families
whose hidden size is also the number of heads times their size, projections into heads are the square matrices that
read the same tensor. The result is verified: with the units of a role permuted along all their dimensions, a model
with random weights must have the same outputs.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tutelage.errors import ModelError
from tutelage.students.config_probing import (
    Key,
    Probe,
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

MAX_CANDIDATES = 64
"""Candidate layouts of a layer that are verified at most."""


class Axis(NamedTuple):
    """What a dimension counts."""

    role: str  # hidden, heads or intermediate
    size: int = 1  # consecutive numbers of one unit: the size of a head, else 1
    stacked: int = 1  # consecutive blocks of all units, as in a joint projection to query, key and value

    def positions(self, selected: Tensor, units: int) -> Tensor:
        """The positions along the dimension of the ``selected`` of ``units`` units."""
        inner = (selected[:, None] * self.size + torch.arange(self.size)).flatten()
        return torch.cat([inner + block * units * self.size for block in range(self.stacked)])


class WeightLayout(NamedTuple):
    """The widths of a model."""

    axes: dict[Key, Axis]
    units: dict[str, int]  # number of units of each role
    head: int  # size of a head
    group: int  # number of query heads that share a key head
    tied: bool  # whether the hidden size is the number of heads times their size
    field: str  # the config's name for the number of feed-forward units
    companions: tuple[str, ...]  # fields of the config that must equal the hidden size


def find_weight_layout(model: nn.Module) -> WeightLayout:
    """What each dimension of a model's weights counts; raises :class:`ModelError` if it cannot be found."""
    probe = probe_config(model)
    config, family = probe.config, probe.kind.__name__
    before = _by_pattern(weight_shapes(probe.kind, config), probe)
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    head = int(getattr(config, "head_dim", None) or hidden // heads)
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    group = heads // shared
    more_heads = {"num_attention_heads": heads + group}
    if hasattr(config, "num_key_value_heads"):
        more_heads["num_key_value_heads"] = shared + 1

    def compare(**fields: int) -> dict[Key, int] | None:
        """The dimensions that change with fields of the config; ``None`` if the model cannot be built."""
        try:
            after = weight_shapes(probe.kind, replace_fields(config, **fields))
            return None if after is None else shape_changes(before, _by_pattern(after, probe))
        except Exception:  # noqa: BLE001  configs raise different errors
            return None

    by_heads = compare(**more_heads)
    tied = not by_heads or any(g <= 0 or g % head for g in by_heads.values())
    companions = _companions(probe, hidden, head, compare)
    wider = {"hidden_size": hidden + head, **dict.fromkeys(companions, hidden + head)}
    by_hidden = compare(**wider, **(more_heads if tied else {}))
    if not by_hidden:
        raise ModelError(f"the hidden size of {family} cannot be changed", remedy="prune its depth only: layers=...")
    apart = set(by_hidden) | (set() if tied else set(by_heads or {}))
    field, by_units = _feed_forward(probe, apart, compare)
    fixed = {key: Axis("intermediate", 1, g) for key, g in by_units.items()}
    if tied:
        candidates = _tied_candidates(probe, by_hidden, head)
    else:
        candidates = _separate_candidates(by_hidden, by_heads or {}, head, group)
    units = {"hidden": hidden, "heads": heads if tied else shared, "intermediate": int(getattr(config, field))}
    wrong: list[str] = []
    for candidate in itertools.islice(candidates, MAX_CANDIDATES):
        axes = {**fixed, **candidate}
        wrong = _violations(probe, axes, units)
        if not wrong:
            return WeightLayout(axes, units, head, group, tied, field, companions)
    raise ModelError(
        f"cannot find how {family} lays out its {' and '.join(wrong)}: a permutation of them changes its outputs",
        remedy="prune its depth only: layers=...",
    )


def _by_pattern(all_shapes: Mapping[str, Shape] | None, probe: Probe) -> dict[str, Shape]:
    family = probe.kind.__name__
    if all_shapes is None:
        raise ModelError(f"{family} cannot be built from its config", remedy="use a model that transformers can load")
    merged: dict[str, Shape] = {}
    for name, shape in all_shapes.items():
        if merged.setdefault(layer_pattern(name, probe.path), shape) != shape:
            raise ModelError(f"layers of {family} differ in size ({name})", remedy="prune its depth only: layers=...")
    return merged


def _companions(probe: Probe, hidden: int, head: int, compare: Any) -> tuple[str, ...]:
    """Fields that must equal the hidden size, else the model fails or changes."""
    own, companions = field_of(probe.config, "hidden_size"), []
    for name, value in size_fields(probe.config).items():
        if value != hidden or name == own:
            continue
        changed = compare(**{name: hidden + head})
        must_equal = changed is None or name.endswith("hidden_size")  # of a head that this model does not have
        if changed:
            try:
                run_model(random_model(probe.kind, replace_fields(probe.config, **{name: hidden + head})))
                must_equal = False
            except Exception:  # noqa: BLE001  models raise different errors
                must_equal = True
        companions += [name] * must_equal
    return tuple(companions)


def _feed_forward(probe: Probe, apart: set[Key], compare: Any) -> tuple[str, dict[Key, int]]:
    """The only field that changes dimensions of layers, and none that heads or hidden size change."""
    config = probe.config
    known = {field_of(config, name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
    matches = {}
    for name, value in size_fields(config).items():
        changed = {} if name in known else compare(**{name: value + 1})
        if changed and not apart & set(changed) and all(key[0].startswith(f"{probe.path}.*.") for key in changed):
            matches[name] = changed
    if len(matches) != 1:
        raise ModelError(
            f"the feed-forward width of {probe.kind.__name__} is not one number of its config (candidates: "
            f"{', '.join(matches) or 'none'})",
            remedy="prune its depth only: layers=...",
        )
    return next(iter(matches.items()))


def _separate_candidates(
    by_hidden: dict[Key, int], by_heads: dict[Key, int], head: int, group: int
) -> Iterator[dict[Key, Axis]]:
    """Candidate layouts of a family whose heads have a size of their own."""
    fixed = {key: Axis("hidden", 1, g // head) for key, g in by_hidden.items()}
    yield {**fixed, **{key: Axis("heads", g) for key, g in by_heads.items()}}
    yield {**fixed, **{key: Axis("heads", head * group, g // (head * group)) for key, g in by_heads.items()}}


def _tied_candidates(probe: Probe, by_hidden: dict[Key, int], head: int) -> Iterator[dict[Key, Axis]]:
    """Candidate layouts of a family whose heads and hidden size grow together, the likeliest first."""
    axes = {"heads": Axis("heads", head), "hidden": Axis("hidden")}
    fixed = {key: Axis("hidden") for key in by_hidden}
    joint = [key for key, g in by_hidden.items() if g > head]
    square, reads_shared = _square(probe, by_hidden, head)
    into, out_of, neither = ({0: "heads", 1: "hidden"}, {0: "hidden", 1: "heads"}, {0: "hidden", 1: "hidden"})
    orders = [[into] if m in reads_shared else [out_of, into, neither] for m in square]
    layouts = [lambda g: Axis("heads", head, g // head), lambda g: Axis("heads", g, 1)] if joint else [None]
    for layout, *roles in itertools.product(layouts, *orders):
        candidate = dict(fixed)
        if layout is not None:
            candidate.update({key: layout(by_hidden[key]) for key in joint})
        for module, role in zip(square, roles, strict=True):
            for i in (0, 1):
                candidate[f"{module}.weight", i] = axes[role[i]]
            if (f"{module}.bias", 0) in fixed:
                candidate[f"{module}.bias", 0] = axes[role[0]]
        yield candidate


def _square(probe: Probe, by_hidden: dict[Key, int], head: int) -> tuple[list[str], set[str]]:
    """Modules of a layer with a hidden x hidden weight, and those of them that read the same tensor."""
    model = random_model(probe.kind, probe.config)
    square: list[str] = []
    readers: dict[int, set[str]] = {}
    tensors: list[Tensor] = []  # references, so that no two have the same id
    handles = []
    for name, module in model.named_modules():
        m = layer_pattern(f"{name}.", probe.path).removesuffix(".")
        weight = getattr(module, "weight", None)
        if not name.startswith(f"{probe.path}.0.") or not isinstance(weight, Tensor) or weight.ndim != 2:
            continue
        if by_hidden.get((f"{m}.weight", 0)) != head or by_hidden.get((f"{m}.weight", 1)) != head:
            continue
        square.append(m)

        def record(module: nn.Module, args: Any, kwargs: Any, m: str = m) -> None:
            x = next(iter(args or kwargs.values()))
            tensors.append(x)
            readers.setdefault(id(x), set()).add(m)

        handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
    try:
        run_model(model)
    except Exception as error:
        raise ModelError(
            f"{probe.kind.__name__} does not run on token ids alone: {error}",
            remedy="prune its depth only: layers=...",
        ) from error
    for handle in handles:
        handle.remove()
    return square, {m for modules in readers.values() if len(modules) > 1 for m in modules}


def _violations(probe: Probe, axes: dict[Key, Axis], units: dict[str, int]) -> list[str]:
    """Roles whose permutation changes the outputs of the model."""
    path = probe.path
    model = random_model(probe.kind, probe.config)
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
    """Whether outputs are equal, up to the order of hidden units if they consist of hidden units."""
    tolerance = 1e-3 * float(before.abs().max())
    if float((before - after).abs().max()) <= tolerance:
        return True
    moved = role == "hidden" and before.shape[-1] == len(order)
    return moved and float((before[..., order] - after).abs().max()) <= tolerance
