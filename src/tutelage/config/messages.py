"""Messages for the errors that pydantic finds: file, line, key, the given value and what is allowed."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tutelage.config.lines import Key, Place
from tutelage.errors import shorten, suggest

SECRET = re.compile(r"key|secret|passw|auth|credential|bearer|^(api_?|access_?)?token$", re.IGNORECASE)
"""Keys whose value may be a secret, which no message repeats."""

MAX_PROBLEMS = 20
"""How many problems of a recipe one error lists."""

MAPPING = "a mapping of keys to values"

EXPECTED = {
    "bool_type": "true or false",
    "dict_type": MAPPING,
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "model_attributes_type": MAPPING,
    "model_type": MAPPING,
    "none_required": "null",
    "string_type": "text",
    "too_long": "of at most {max_length} entries",
    "too_short": "of at least {min_length} entries",
    "union_tag_invalid": "a mapping whose 'kind' is one of {expected_tags}",
    "union_tag_not_found": "a mapping with a 'kind'",
}
"""What a value must be, by the type of pydantic's error. A test checks that the table covers all sections."""


class Misfit(ValueError):
    """Values that do not fit their section: pairs of the key in the section and "what is wrong; what to do"."""

    def __init__(self, misfits: list[tuple[str, str]]) -> None:
        self.misfits = misfits
        super().__init__("; ".join(what for _, what in misfits))


@dataclass(frozen=True)
class Source:
    """Where the values of a recipe come from. All sources are equal: they are no part of a recipe's settings.

    Attributes:
        name: of the file.
        places: the line or the override of each key.
    """

    name: str = field(default="recipe", compare=False)
    places: Mapping[Key, Place] = field(default_factory=dict, compare=False)

    def find(self, loc: Key) -> str | None:
        """The file and line, or the override, that gave ``loc`` or the nearest section around it."""
        own = _of_training(loc)
        for base in [] if own is None or loc in self.places else [("teacher", "train", *own[1:]), own]:
            if base in self.places:  # what a teacher's training took over
                loc = base
                break
        for end in range(len(loc), 0, -1):
            place = self.places.get(loc[:end])
            if place is not None:
                return place if isinstance(place, str) else f"{self.name}:{place}"
            inside = (p for key, p in self.places.items() if key[:end] == loc[:end] and isinstance(p, str))
            if override := next(inside, None):
                return override
        return None

    def where(self, loc: Key) -> str:
        """As :meth:`find`; the name of the file for a key that is not given."""
        return self.find(loc) or self.name


def key_parts(key: str) -> Key:
    """The parts of a dotted key; the index of a list is a number."""
    return tuple(int(part) if part.isdecimal() else part for part in key.split(".") if part)


def must_be(details: ErrorDetails) -> str:
    """What the value must be."""
    context = details.get("ctx", {})
    if details["type"] == "literal_error":
        return str(context["expected"]).replace("'", "")
    numbers = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
    expected = EXPECTED.get(details["type"])
    return details["msg"] if expected is None else expected.format(**numbers)


def explain(error: ValidationError, root: type[BaseModel], raw: Any, source: Source) -> str:
    """A message for each problem of ``raw``, which was validated as ``root``."""
    groups: dict[Key, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        groups.setdefault(_loc(details, raw), []).append(details)
    problems: list[str] = []
    for loc, group in groups.items():
        is_other_branch = any(other[: len(loc)] == loc and other != loc for other in groups)  # of a union of types
        if not is_other_branch and not _is_inherited(loc, group[0], groups):
            problems += _explain_key(loc, group, root, raw, source)
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"... and {len(problems) - MAX_PROBLEMS} more problems"]
    return "\n".join(problems)


def _loc(details: ErrorDetails, raw: Any) -> Key:
    """The key of an error, without the names of union members that pydantic puts in between."""
    parts: list[str | int] = []
    for part in details["loc"]:
        is_key = part in raw if isinstance(raw, Mapping) else isinstance(raw, list) and isinstance(part, int)
        if is_key:
            parts.append(part)
            raw = _item(raw, part)
    return (*parts, details["loc"][-1]) if details["type"] == "missing" else tuple(parts)


def _item(raw: Any, part: str | int) -> Any:
    try:
        return raw[part]
    except (LookupError, TypeError):
        return None


def _is_inherited(loc: Key, details: ErrorDetails, groups: Mapping[Key, list[ErrorDetails]]) -> bool:
    """Whether a fault of a teacher's training is one of ``train``, or of another member, seen a second time."""
    own = _of_training(loc)
    if own is None:
        return False
    first = next(other for other in groups if _of_training(other) == own)
    return own in groups or (first != loc and groups[first][0]["input"] == details["input"])


def _of_training(loc: Key) -> Key | None:
    """What in ``train`` a place in the training of a teacher, or of a member of it, goes back to."""
    if loc[:2] == ("teacher", "train"):
        return loc[1:]
    return loc[3:] if loc[:2] == ("teacher", "members") and loc[3:4] == ("train",) else None


def _options(annotation: Any, raw: Any) -> list[Any]:
    """The types that an annotation allows for ``raw``, which selects among sections by its ``kind``."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _options(get_args(annotation)[0], raw)
    if origin not in (Union, UnionType):
        return [annotation]
    options = [one for part in get_args(annotation) for one in _options(part, raw)]
    kind = _item(raw, "kind")
    of_kind = [one for one in options if _is_section(one) and _kind(one) == kind]
    return of_kind if kind is not None and of_kind else options


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _kind(section: type[BaseModel]) -> Any:
    kind = section.model_fields.get("kind")
    return None if kind is None else next(iter(get_args(kind.annotation)), None)


def _section(annotation: Any, loc: Key, raw: Any) -> type[BaseModel] | None:
    """The class of the section at ``loc`` below ``annotation``."""
    for option in _options(annotation, raw):
        if not loc:
            if _is_section(option):
                return option
            continue
        if _is_section(option) and loc[0] in option.model_fields:
            below = option.model_fields[loc[0]].annotation
        elif get_origin(option) in (list, dict):
            below = get_args(option)[-1]
        else:
            continue
        return _section(below, loc[1:], _item(raw, loc[0]))
    return None


def _find_keys(name: str, root: type[BaseModel], raw: Any) -> list[str]:
    """The dotted keys of a recipe that end in ``name``, of the shortest length; of given sections if possible."""
    level: list[tuple[str, type[BaseModel], Any, bool]] = [("", root, raw, True)]
    keys: dict[bool, list[str]] = {True: [], False: []}
    while level and not keys[True]:
        below = []
        for prefix, section, given, is_given in level:
            for key, info in section.model_fields.items():
                if key == name:
                    keys[is_given].append(prefix + key)
                inner = _item(given, key)
                in_use = is_given and (inner is not None or info.default_factory is not None)
                options = [option for option in _options(info.annotation, inner) if _is_section(option)]
                below += [(f"{prefix}{key}.", option, inner, in_use) for option in options]
        level = below
    shortest = min((key.count(".") for key in keys[False]), default=0)
    return keys[True] or list(dict.fromkeys(key for key in keys[False] if key.count(".") == shortest))


def _explain_key(
    loc: Key, group: list[ErrorDetails], root: type[BaseModel], raw: Any, source: Source
) -> Iterator[str]:
    """The messages for the errors at one key."""
    where, key, details = source.where(loc), ".".join(map(str, loc)), group[0]
    given = "empty" if details["input"] is None else shorten(details["input"])
    match details["type"]:
        case "extra_forbidden":
            last, section = str(loc[-1]), _section(root, loc[:-1], raw)
            fields = [f for f in section.model_fields if f != "kind"] if section else []
            value = "a value that is not shown here" if SECRET.search(last) else given
            elsewhere = _find_keys(last, root, raw)
            near = f" (did you mean {' or '.join(map(repr, elsewhere))}?)" if elsewhere else suggest(last, fields)
            yield (
                f"{where}: unknown key {shorten(key)}{near}, given {value}\n"
                f"  -> allowed here: {', '.join(fields)}"
            )  # fmt: skip
        case "missing":
            yield f"{where}: {shorten(key)} is missing\n  -> add it; see recipes/digits.yaml for an example"
        case "invalid_key":
            yield f"{where}: {key}: a key must be text\n  -> put it in quotes"
        case "value_error":
            error = details.get("ctx", {}).get("error")
            for inner, text in error.misfits if isinstance(error, Misfit) else [("", str(error))]:
                full = (*loc, *key_parts(inner))
                what, _, remedy = text.rpartition("; ")
                name, verb = ".".join(map(str, full)), (what or remedy).startswith(("is ", "has ", "needs "))
                yield (
                    f"{source.where(full)}: {name}{'' if not name else ' ' if verb else ': '}{what or remedy}"
                    + (f"\n  -> {remedy}" if what else "")
                )  # fmt: skip
        case _:
            words = [w for d in group if d["type"] == "literal_error" for w in must_be(d).split(" or ")]
            allowed = [word for part in words for word in part.split(", ")]
            near = suggest(details["input"], allowed) if isinstance(details["input"], str) else ""
            expected = " or ".join(dict.fromkeys(map(must_be, group))).replace(
                "a whole number or a number", "a number"
            )
            section = _section(root, loc, raw)
            if section is not None and MAPPING in expected:
                expected += f"; keys: {', '.join(section.model_fields)}"
            is_choice = all(d["type"] == "literal_error" for d in group)
            yield f"{where}: {key} is {given}{near}\n  -> {'allowed:' if is_choice else 'it must be'} {expected}"
