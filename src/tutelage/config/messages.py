"""Messages for the errors that pydantic finds: file, line, key, the given value and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tutelage.config.lines import Key, Place
from tutelage.errors import shorten, suggest

SECRET = re.compile(r"key|secret|passw|auth|credential|bearer|^(api_?|access_?)?token$", re.IGNORECASE)
"""Keys whose value may be a secret, which no message repeats."""


class Misfit(ValueError):
    """A value that does not fit its section, with the key of the section to name."""

    def __init__(self, what: str, key: str) -> None:
        super().__init__(what)
        self.key = key


def inherited(details: ErrorDetails, error: ValidationError) -> bool:
    """Whether a fault of a teacher's training is one of ``train``, or of another member, seen a second time."""
    own = _of_training(details["loc"])
    others = error.errors(include_url=False)
    if own is None:
        return False
    if any(other["loc"] == own for other in others):
        return True
    first = next(other for other in others if _of_training(other["loc"]) == own)
    return first["loc"] != details["loc"] and first["input"] == details["input"]


def _of_training(loc: Key) -> Key | None:
    """What in ``train`` a place in the training of a teacher, or of a member of it, goes back to."""
    if loc[:2] == ("teacher", "train"):
        return loc[1:]
    return loc[3:] if loc[:2] == ("teacher", "members") and loc[3:4] == ("train",) else None


def where_given(name: str, places: Mapping[Key, Place], loc: Key) -> str:
    """The file and line, or the override, that gave ``loc`` or the nearest section around it."""
    own = _of_training(loc)
    for base in [] if own is None or loc in places else [("teacher", "train", *own[1:]), own]:
        if base in places:  # what a teacher's training took over
            loc = base
            break
    for end in range(len(loc), 0, -1):
        place = places.get(loc[:end])
        if place is not None:
            return place if isinstance(place, str) else f"{name}:{place}"
    return name


def _section(root: type[BaseModel], loc: Key, kinds: Mapping[str, type[BaseModel]]) -> type[BaseModel] | None:
    """The class below ``root`` whose field the last part of ``loc`` is."""
    model: Any = root
    space = loc[:2] == ("search", "space")
    if len(loc) > 1 and isinstance(loc[0], str) and loc[0] in kinds:
        model, loc = kinds[loc[0]], loc[1:]
    for i, part in enumerate(loc[:-1]):
        if space and i == 2:  # a key of the recipe, whose class is that of the values
            continue
        if isinstance(part, int):  # an item of a list is of the class of the list's items
            continue
        field = model.model_fields.get(part)
        if field is None:
            return None
        model = next((o for o in _parts(field.annotation) if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if model is None:
            return None
    return cast("type[BaseModel]", model)


def _parts(annotation: Any) -> list[Any]:
    return [annotation, *(part for inner in getattr(annotation, "__args__", ()) for part in _parts(inner))]


def explain(
    details: ErrorDetails,
    root: type[BaseModel],
    name: str,
    places: Mapping[Key, Place],
    kinds: Mapping[str, type[BaseModel]],
) -> str:
    """The message for one error.

    Args:
        details: of the error.
        root: the class that was validated.
        name: of the file, or of the class.
        places: the lines of the keys.
        kinds: the classes of those sections of a recipe that have a ``kind``.
    """
    loc = details["loc"]
    where, key = where_given(name, places, loc), ".".join(str(p) for p in loc)
    given = details["input"]
    given_text = "nothing" if given is None else shorten(given)
    section = _section(root, loc, kinds)
    fields = [f for f in section.model_fields if f != "kind"] if section else []
    match details["type"]:
        case "extra_forbidden":
            last = str(loc[-1])
            value = "a value that is not shown here" if SECRET.search(last) else shorten(given)
            return (
                f"{where}: unknown key {shorten(key)}{suggest(last, fields)}, given {value}\n"
                f"  -> allowed here: {', '.join(fields)}"
            )
        case "missing":
            return f"{where}: {shorten(key)} is missing\n  -> add it; see recipes/digits.yaml for an example"
        case "value_error":
            error = details.get("ctx", {}).get("error")
            if isinstance(error, Misfit):
                where = where_given(name, places, (*loc, error.key))
            what, _, remedy = details["msg"].removeprefix("Value error, ").rpartition("; ")
            return f"{where}: {key + ': ' if key else ''}{what or remedy}" + (f"\n  -> {remedy}" if what else "")
        case "literal_error":
            allowed = str(details.get("ctx", {}).get("expected", ""))
            words = re.findall(r"'([^']*)'", allowed)
            return f"{where}: {key}: given {shorten(given)}{suggest(str(given), words)}\n  -> allowed: {allowed}"
        case "model_type" | "dict_type":
            inside = _section(root, (*loc, ""), kinds)
            allowed = ", ".join(inside.model_fields) if inside else "any"
            return f"{where}: {key}: given {given_text}\n  -> it takes keys and values; keys: {allowed}"
        case _:
            return f"{where}: {key}: given {given_text}\n  -> {details['msg']}"
