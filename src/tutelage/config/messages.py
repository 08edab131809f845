"""What pydantic found wrong, in words: file, line, key, what was given and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tutelage.config.base import Misfit, Section, suggest
from tutelage.config.lines import Key, Place
from tutelage.config.methods import FeatureConfig, PairConfig
from tutelage.config.schema import Recipe


def inherited(details: ErrorDetails, error: ValidationError) -> bool:
    """Whether a fault of the teacher's training is one of ``train`` seen a second time."""
    return any(other["loc"] == details["loc"][1:] for other in error.errors(include_url=False))


def where_given(name: str, places: Mapping[Key, Place], loc: Key) -> str:
    """The file and line, or the override, that gave ``loc`` or the nearest section around it."""
    for end in range(len(loc), 0, -1):
        place = places.get(loc[:end])
        if place is not None:
            return place if isinstance(place, str) else f"{name}:{place}"
    if loc[:2] == ("teacher", "train"):  # what the teacher's training takes over from the student's
        return where_given(name, places, loc[1:])
    return name


def _section(loc: Key, method: type[Section] | None = None) -> type[BaseModel] | None:
    """The class whose field the last part of ``loc`` is; ``method`` is that of the recipe's method."""
    model: Any = Recipe
    if loc[:1] == ("method",) and len(loc) > 1:
        if method is not FeatureConfig or loc[1] != "pairs" or len(loc) < 4:
            return method if len(loc) == 2 else None
        return PairConfig if len(loc) == 4 else None
    for part in loc[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None:
            return None
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if model is None:
            return None
    found: type[BaseModel] = model
    return found


def explain(
    details: ErrorDetails, name: str, places: Mapping[Key, Place], method: type[Section] | None = None
) -> str:
    """One fault in words; ``method`` is the class of the recipe's method."""
    loc = details["loc"]
    where, key = where_given(name, places, loc), ".".join(str(p) for p in loc)
    given = details["input"]
    section = _section(loc, method)
    fields = [f for f in section.model_fields if f != "kind"] if section else []
    match details["type"]:
        case "extra_forbidden":
            last = str(loc[-1])
            return (
                f"{where}: unknown key {key!r}{suggest(last, fields)}, given {given!r}\n"
                f"  -> allowed here: {', '.join(fields)}"
            )
        case "missing":
            return f"{where}: {key!r} is missing\n  -> add it; see recipes/digits.yaml for an example"
        case "value_error":
            error = details.get("ctx", {}).get("error")
            if isinstance(error, Misfit):
                where = where_given(name, places, (*loc, error.key))
            what, _, remedy = details["msg"].removeprefix("Value error, ").rpartition("; ")
            return f"{where}: {key + ': ' if key else ''}{what or remedy}" + (f"\n  -> {remedy}" if what else "")
        case "literal_error":
            allowed = str(details.get("ctx", {}).get("expected", ""))
            words = re.findall(r"'([^']*)'", allowed)
            return f"{where}: {key}: given {given!r}{suggest(str(given), words)}\n  -> allowed: {allowed}"
        case "model_type" | "dict_type":
            inside = _section((*loc, ""), method)
            allowed = ", ".join(inside.model_fields) if inside else "any"
            return f"{where}: {key}: given {_shown(given)}\n  -> it takes keys and values; keys: {allowed}"
        case _:
            return f"{where}: {key}: given {_shown(given)}\n  -> {details['msg']}"


def _shown(given: Any) -> str:
    shown = repr(given)
    return "nothing" if given is None else shown if len(shown) < 80 else shown[:77] + "..."
