"""The space of a search: keys of a recipe with their ranges and values, checked before anything is trained."""

import copy
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tutelage.config import LOGIT_LOSSES, KeySpace, Recipe, SearchConfig, SoftLabelOptions, build_recipe
from tutelage.config.lines import parse_yaml
from tutelage.errors import ConfigError, nearest

ABSENT = object()
"""The value of an optional key of a free mapping that the recipe does not have."""

MAX_CHECKED = 256
"""With more combinations of ends and values, a random sample of this size is checked."""

DIGITS = 4
"""Suggested values are rounded to so many significant digits, so that recipes are readable."""

FIXED = {
    "data.classes", "data.path", "data.source", "data.split_seed", "data.test", "data.validation", "baseline", "name",
    "search", "seed", "seeds",
}  # fmt: skip
"""Keys that decide what is measured: trials that differ in them cannot be compared."""

FIXED_OF_TEACHER = {
    "augment", "cache", "checkpoint", "members", "model", "options", "train", "trainable", "trained",
}  # fmt: skip
"""Keys of the teacher that make another one: all trials have the same teacher."""


@dataclass(frozen=True)
class SearchDimension:
    """A key and its range or values.

    Attributes:
        step: of the range; ``None`` for a continuous one.
        whole: whether the range has integers only.
        own: the recipe's own value; :data:`ABSENT` if it has none.
    """

    key: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    whole: bool = False
    values: tuple[Any, ...] | None = None
    own: Any = ABSENT

    def ends(self) -> tuple[Any, ...]:
        """The values to choose from, or both ends of the range."""
        return self.values if self.values is not None else (self.low, self.high)

    def contains(self, value: Any) -> bool:
        """Whether ``value`` can be suggested, up to rounding."""
        if self.values is not None:
            return value in self.values
        if not isinstance(value, int | float) or isinstance(value, bool) or not self.low <= value <= self.high:
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return math.isclose(steps, round(steps), abs_tol=1e-9) and (not self.whole or value == int(value))

    def round(self, value: Any) -> Any:
        """``value`` rounded, and still within its range."""
        if self.values is not None or value == self.own:
            return value
        if self.whole:
            return int(value)
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def to_dict(self) -> dict[str, Any]:
        """The dimension for ``search.json``."""
        own = None if self.own is ABSENT else self.own
        if self.values is not None:
            return {"key": self.key, "values": list(self.values), "own": own}
        names = ("key", "low", "high", "log", "step", "whole")
        return {**{name: getattr(self, name) for name in names}, "own": own}


def resolve_search(recipe: Recipe, keys: Iterable[str] = (), trials: int | None = None) -> SearchConfig:
    """The search of a recipe and a command line, with its space.

    Args:
        keys: ``KEY=LOW:HIGH``, ``KEY=LOW:HIGH:log`` or ``KEY=a,b,c``, in place of the recipe's space.
    """
    config = recipe.search or SearchConfig()
    changes: dict[str, Any] = {} if trials is None else {"trials": trials}
    space: dict[str, Any] = {}
    for text in keys:
        key, values = _parse_key(text)
        if key in space:
            raise ConfigError(f"{key} is given twice", where=f"--key {text}", remedy="keep one of the two")
        space[key] = values
    if space or not config.space:
        changes["space"] = space or default_space(recipe)
    section = {**config.model_dump(mode="json", exclude_none=True), **changes}
    base = recipe.model_dump(mode="json", exclude_none=True)
    search = build_recipe({**base, "search": section}, name="--key" if space else "search").search
    assert search is not None
    return search


def _parse_key(text: str) -> tuple[str, Any]:
    """The key of ``KEY=LOW:HIGH[:log]`` or ``KEY=a,b,c``, and its entry of ``search.space``."""
    key, equals, given = text.partition("=")
    parts = given.split(":")
    where = f"--key {text}"
    remedy = "KEY=LOW:HIGH, KEY=LOW:HIGH:log, or KEY=a,b,c, as in --key method.temperature=1:20:log"
    if not equals or not given or not all(key.split(".")):
        raise ConfigError("gives no range and no values for the key", where=where, remedy=remedy)
    ends = [_number(part) for part in parts[:2]]
    if len(ends) == 2 and None not in ends:
        if parts[2:] not in ([], ["log"]):
            raise ConfigError(f"{':'.join(parts[2:])!r} follows the range", where=where, remedy=remedy)
        return key, {"low": ends[0], "high": ends[1], "log": len(parts) == 3}
    values = parse_yaml(f"values: [{given}]", where)[0]["values"]
    if not isinstance(values, list) or len(values) < 2:
        raise ConfigError(
            "a search needs at least two values", where=where,
            remedy=f"{remedy}; to set one value for all trials, override the recipe: {text}",
        )  # fmt: skip
    return key, values


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def default_space(recipe: Recipe) -> dict[str, Any]:
    """Temperature and alpha, as far as the recipe's method has them."""
    method = recipe.method
    space: dict[str, Any] = {}
    if isinstance(method, SoftLabelOptions) and LOGIT_LOSSES[method.soft].temperature is not None:
        space["method.temperature"] = {"low": 1, "high": 20, "log": True}
    if "alpha" in type(method).model_fields:
        space["method.alpha"] = {"low": 0.0, "high": 1.0}
    return space


def build_dimensions(recipe: Recipe, space: Mapping[str, KeySpace]) -> list[SearchDimension]:
    """The dimensions of a search over a recipe."""
    dimensions = []
    for key, one in space.items():
        if why := _why_fixed(key):
            raise ConfigError(f"{key} {why}", where="search.space", remedy="leave it out")
        own = _own_value(recipe, key)
        if one.values is not None:
            dimensions.append(SearchDimension(key, values=tuple(one.values), own=own))
            continue
        assert one.low is not None
        assert one.high is not None
        integers = all(isinstance(v, int) for v in (one.low, one.high, 0 if one.step is None else one.step))
        whole = integers and (one.step is not None or not _accepts_floats(recipe, key))
        dimensions.append(SearchDimension(key, one.low, one.high, one.log, one.step, whole, own=own))
    return dimensions


def _why_fixed(key: str) -> str | None:
    """Why a key must be the same in all trials, if it must."""
    first, _, rest = key.partition(".")
    if key in FIXED or first in FIXED:
        return "decides what is measured, and trials that differ in it cannot be compared"
    if first == "teacher" and rest.partition(".")[0] in FIXED_OF_TEACHER:
        return "changes the teacher, and all trials must share one teacher"
    return None


def _own_value(recipe: Recipe, key: str) -> Any:
    """The recipe's value of ``key``; raises :class:`ConfigError` if there is no such key."""
    value: Any = recipe
    is_free = False
    for part in key.split("."):
        if isinstance(value, BaseModel):
            is_declared = part in type(value).model_fields
            if not is_declared and type(value).model_config.get("extra") != "allow":
                raise _unknown_key(recipe, key)
            value = getattr(value, part, ABSENT)
        elif isinstance(value, Mapping):
            is_free, value = True, value.get(part, ABSENT)
        elif value is None or value is ABSENT:
            is_free, value = True, ABSENT
        else:
            raise _unknown_key(recipe, key)
    if isinstance(value, BaseModel):
        raise ConfigError(
            f"{key} is a section, not a value", where="search.space",
            remedy=f"name a key in it: {', '.join(f'{key}.{name}' for name in type(value).model_fields)}",
        )  # fmt: skip
    if value is None and key == "method.temperature" and isinstance(recipe.method, SoftLabelOptions):
        return LOGIT_LOSSES[recipe.method.soft].temperature or ABSENT
    return ABSENT if is_free and value is None else value


def _unknown_key(recipe: Recipe, key: str) -> ConfigError:
    known = [k for k in _keys(recipe) if not _why_fixed(k)]
    same_name = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same_name or nearest(key, known, 1)
    return ConfigError(
        f"the recipe has no key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""), where="search.space",
        remedy="keys are dotted, as in method.temperature or train.optimizer.lr; docs/recipes.md lists them",
    )  # fmt: skip


def _keys(section: BaseModel, prefix: str = "") -> Iterator[str]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _accepts_floats(recipe: Recipe, key: str) -> bool:
    """Whether the key is declared as a number that need not be an integer."""
    section: Any = recipe
    *path, last = key.split(".")
    for part in path:
        section = getattr(section, part, None)
    field = type(section).model_fields.get(last) if isinstance(section, BaseModel) else None
    return field is not None and float in _types(field.annotation)


def _types(annotation: Any) -> list[Any]:
    return [annotation, *(part for inner in getattr(annotation, "__args__", ()) for part in _types(inner))]


def with_values(base: Mapping[str, Any], values: Mapping[str, Any]) -> Recipe:
    """The resolved recipe ``base`` with these values at these keys."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return build_recipe(copy.deepcopy(dict(base)), name=str(base["name"]), overrides=overrides)


def check_values(base: Mapping[str, Any], space: Sequence[SearchDimension]) -> None:
    """Build the recipe with every end and value of the space, each alone and in combinations."""
    single = [{d.key: value} for d in space for value in d.ends()]
    ends, generator = {d.key: d.ends() for d in space}, random.Random(0)
    if math.prod(map(len, ends.values())) <= MAX_CHECKED:
        combined = [dict(zip(ends, row, strict=True)) for row in itertools.product(*ends.values())]
    else:
        combined = [{key: generator.choice(each) for key, each in ends.items()} for _ in range(MAX_CHECKED)]
    for values in [*single, *combined]:
        try:
            with_values(base, values)
        except ConfigError as error:
            text = ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
            raise ConfigError(
                f"the recipe refuses {text}\n{error}", where="search.space", remedy="make the space smaller"
            ) from None


def recipe_values(space: Sequence[SearchDimension]) -> dict[str, Any] | None:
    """The recipe's own values, if all are in the space: they are the first trial."""
    if all(d.own is not ABSENT and d.contains(d.own) for d in space):
        return {d.key: d.own for d in space}
    return None
