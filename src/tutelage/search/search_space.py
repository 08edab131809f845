"""What a search may set: keys of a recipe with their ranges and values, checked before anything is trained."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tutelage.config import LOGIT_LOSSES, KeySpace, Recipe, SearchConfig, build_recipe
from tutelage.config.lines import parse_yaml
from tutelage.config.methods import SoftLabelOptions
from tutelage.errors import ConfigError, nearest

ABSENT = object()
"""What a key of a free mapping is that is not given."""

MOST_CHECKED = 256
"""With more combinations of ends and values than this, a sample of so many is checked."""

DIGITS = 4
"""To which what is suggested is rounded, so that recipes are readable."""

MEASURED = {
    "data.classes", "data.path", "data.source", "data.split_seed", "data.test", "data.validation", "baseline", "name",
    "search", "seed", "seeds",
}  # fmt: skip
"""Keys that decide what is measured; trials that differ in them could not be compared."""

OF_TEACHER = {
    "augment", "cache", "checkpoint", "members", "model", "options", "train", "trained",
}  # fmt: skip
"""Keys of the teacher that make it another; all trials have the same."""


@dataclass(frozen=True)
class SearchDimension:
    """A key and what it may be.

    Attributes:
        key: dotted, of the recipe.
        low: of a range.
        high: of a range, included.
        log: whether the range is even on a logarithmic scale.
        step: of the range; ``None`` for everything between.
        whole: whether the range has whole numbers only.
        values: to choose from, where it is no range.
        own: what the recipe itself has there; :data:`ABSENT` where it has nothing.
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

    def holds(self, value: Any) -> bool:
        """Whether ``value`` can be suggested, up to rounding."""
        if self.values is not None:
            return value in self.values
        if not isinstance(value, int | float) or isinstance(value, bool) or not self.low <= value <= self.high:
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return math.isclose(steps, round(steps), abs_tol=1e-9) and (not self.whole or value == int(value))

    def rounded(self, value: Any) -> Any:
        """``value`` as a person would write it; of a range still within it."""
        if self.values is not None or value == self.own:
            return value
        if self.whole:
            return int(value)
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def to_dict(self) -> dict[str, Any]:
        """What ``search.json`` says of it."""
        own = None if self.own is ABSENT else self.own
        if self.values is not None:
            return {"key": self.key, "values": list(self.values), "own": own}
        return {
            "key": self.key, "low": self.low, "high": self.high, "log": self.log, "step": self.step,
            "whole": self.whole, "own": own,
        }  # fmt: skip


def asked(recipe: Recipe, keys: Iterable[str] = (), trials: int | None = None) -> SearchConfig:
    """The search that a recipe and a command line ask for, with its space spelled out.

    Args:
        recipe: whose ``search`` is the base.
        keys: ``KEY=LOW:HIGH``, ``KEY=LOW:HIGH:log`` or ``KEY=a,b,c``, in place of the recipe's space.
        trials: in place of the recipe's.

    Raises:
        ConfigError: a key is not of these forms, or given twice.
    """
    config = recipe.search or SearchConfig()
    changed: dict[str, Any] = {} if trials is None else {"trials": trials}
    space: dict[str, Any] = {}
    for text in keys:
        key, what = _parsed(text)
        if key in space:
            raise ConfigError(f"{key} is given twice", where=f"--key {text}", remedy="keep one of the two")
        space[key] = what
    if space or not config.space:
        changed["space"] = space or usual_space(recipe)
    raw = {**config.model_dump(mode="json", exclude_none=True), **changed}
    base = recipe.model_dump(mode="json", exclude_none=True)
    found = build_recipe({**base, "search": raw}, name="--key" if space else "search").search
    assert found is not None
    return found


def _parsed(text: str) -> tuple[str, Any]:
    """The key of ``KEY=LOW:HIGH[:log]`` or ``KEY=a,b,c``, and its part of ``search.space``."""
    key, equals, given = text.partition("=")
    ends = given.split(":")
    where = f"--key {text}"
    remedy = "KEY=LOW:HIGH, KEY=LOW:HIGH:log, or KEY=a,b,c, as in --key method.temperature=1:20:log"
    if not equals or not given or not all(key.split(".")):
        raise ConfigError("does not say what the key may be", where=where, remedy=remedy)
    numbers = [_number(end) for end in ends[:2]]
    if len(numbers) == 2 and None not in numbers:
        if ends[2:] not in ([], ["log"]):
            raise ConfigError(f"{':'.join(ends[2:])!r} follows the range", where=where, remedy=remedy)
        return key, {"low": numbers[0], "high": numbers[1], "log": len(ends) == 3}
    values = parse_yaml(f"values: [{given}]", where)[0]["values"]
    if not isinstance(values, list) or len(values) < 2:
        raise ConfigError(
            "one value is nothing to choose from", where=where,
            remedy=f"{remedy}; to set it for all trials, override the recipe: {text}",
        )  # fmt: skip
    return key, values


def _number(text: str) -> int | float | None:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return None


def usual_space(recipe: Recipe) -> dict[str, Any]:
    """Temperature and alpha, as far as the recipe's method has them.

    Raises:
        ConfigError: it has neither.
    """
    method = recipe.method
    space: dict[str, Any] = {}
    if isinstance(method, SoftLabelOptions) and LOGIT_LOSSES[method.soft].temperature is not None:
        space["method.temperature"] = {"low": 1, "high": 20, "log": True}
    if "alpha" in type(method).model_fields:
        space["method.alpha"] = {"low": 0.0, "high": 1.0}
    return space


def dimensions(recipe: Recipe, space: Mapping[str, KeySpace]) -> list[SearchDimension]:
    """The space of a search over a recipe.

    Raises:
        ConfigError: a key that the recipe does not have (with the nearest), or that is the same in all trials.
    """
    found = []
    for key, one in space.items():
        if why := _fixed(key):
            raise ConfigError(f"{key} {why}", where="search.space", remedy="leave it out")
        own = _own(recipe, key)
        if one.values is not None:
            found.append(SearchDimension(key, values=tuple(one.values), own=own))
            continue
        assert one.low is not None
        assert one.high is not None
        integers = all(isinstance(v, int) for v in (one.low, one.high, 0 if one.step is None else one.step))
        whole = integers and (one.step is not None or not _takes_fractions(recipe, key))
        found.append(SearchDimension(key, one.low, one.high, one.log, one.step, whole, own=own))
    return found


def _fixed(key: str) -> str | None:
    """Why a key is the same in all trials; ``None`` where it need not be."""
    first, _, rest = key.partition(".")
    if key in MEASURED or first in MEASURED:
        return "decides what is measured, and trials that differ in it cannot be compared"
    if first == "teacher" and rest.partition(".")[0] in OF_TEACHER:
        return "makes another teacher, and all trials learn from the same"
    return None


def _own(recipe: Recipe, key: str) -> Any:
    """What the recipe has at ``key``; raises :class:`ConfigError` where it can have nothing."""
    value: Any = recipe
    free = False
    for part in key.split("."):
        if isinstance(value, BaseModel):
            declared = part in type(value).model_fields
            if not declared and type(value).model_config.get("extra") != "allow":
                raise _unknown(recipe, key)
            value = getattr(value, part, ABSENT)
        elif isinstance(value, Mapping):
            free, value = True, value.get(part, ABSENT)
        elif value is None or value is ABSENT:
            free, value = True, ABSENT
        else:
            raise _unknown(recipe, key)
    if isinstance(value, BaseModel):
        raise ConfigError(
            f"{key} is a section, not a value", where="search.space",
            remedy=f"name a key in it: {', '.join(f'{key}.{name}' for name in type(value).model_fields)}",
        )  # fmt: skip
    if value is None and key == "method.temperature" and isinstance(recipe.method, SoftLabelOptions):
        return LOGIT_LOSSES[recipe.method.soft].temperature or ABSENT
    return ABSENT if free and value is None else value


def _unknown(recipe: Recipe, key: str) -> ConfigError:
    known = [k for k in _known(recipe) if not _fixed(k)]
    last = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    close = last or nearest(key, known, 1)
    return ConfigError(
        f"the recipe has no key {key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""),
        where="search.space",
        remedy="keys are dotted, as in method.temperature or train.optimizer.lr; docs/recipes.md lists them",
    )


def _known(section: BaseModel, prefix: str = "") -> Iterator[str]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _known(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _takes_fractions(recipe: Recipe, key: str) -> bool:
    """Whether the class of the key's section declares it as a number that need not be whole."""
    section: Any = recipe
    *path, last = key.split(".")
    for part in path:
        section = getattr(section, part, None)
    field = type(section).model_fields.get(last) if isinstance(section, BaseModel) else None
    return field is not None and float in _parts(field.annotation)


def _parts(annotation: Any) -> list[Any]:
    return [annotation, *(part for inner in getattr(annotation, "__args__", ()) for part in _parts(inner))]


def with_values(base: Mapping[str, Any], values: Mapping[str, Any]) -> Recipe:
    """The resolved recipe ``base`` with these values at these keys.

    Raises:
        ConfigError: the recipe refuses them.
    """
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return build_recipe(copy.deepcopy(dict(base)), name=str(base["name"]), overrides=overrides)


def check_values(base: Mapping[str, Any], space: Sequence[SearchDimension]) -> None:
    """Let the recipe judge every end and value of the space, each alone and then together with the others'.

    Raises:
        ConfigError: it refuses one.
    """
    alone = [{d.key: value} for d in space for value in d.ends()]
    together = [dict(zip((d.key for d in space), all_, strict=True)) for all_ in _sampled(space)]
    for values in [*alone, *together]:
        try:
            with_values(base, values)
        except ConfigError as error:
            shown = ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
            raise ConfigError(
                f"the recipe refuses {shown}\n{error}", where="search.space", remedy="make the space smaller"
            ) from None


def _sampled(space: Sequence[SearchDimension]) -> list[tuple[Any, ...]]:
    each = [d.ends() for d in space]
    if math.prod(len(ends) for ends in each) <= MOST_CHECKED:
        return list(itertools.product(*each))
    draw = random.Random(0)
    return [tuple(draw.choice(ends) for ends in each) for _ in range(MOST_CHECKED)]


def own_values(space: Sequence[SearchDimension]) -> dict[str, Any] | None:
    """The recipe's own values, where all lie in the space: the first trial, which the others must beat."""
    if all(d.own is not ABSENT and d.holds(d.own) for d in space):
        return {d.key: d.own for d in space}
    return None
