"""YAML with the line of every key."""

from collections.abc import Iterator
from typing import Any

import yaml

from tutelage.errors import ConfigError, shorten
from tutelage.safe_yaml import load_yaml

Key = tuple[str | int, ...]
Place = int | str
"""Where a value was given: a line of the file, or an override."""


def _lines(node: yaml.Node | None, seen_nodes: set[int], at: Key = ()) -> Iterator[tuple[Key, int]]:
    if node is None:
        return
    yield at, node.start_mark.line + 1
    if id(node) in seen_nodes:  # an alias: what is in it has its line already
        return
    seen_nodes.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise ConfigError(
                    f"{shorten(name)} is given twice, first on line {seen[name]}",
                    where=str(line),
                    remedy="keep one of the two",
                )
            seen[name] = line
            yield from _lines(value, seen_nodes, (*at, name))
            yield (*at, name), line  # the key's own line wins over its value's
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _lines(item, seen_nodes, (*at, i))


def yaml_remedy(problem: str) -> str:
    """What to do about a problem that the YAML parser reports."""
    if "undefined alias" in problem:
        return "write the value out, define it with &NAME before, or quote a text that starts with *"
    if "']'" in problem or "'}'" in problem:
        return "close the bracket: [1, 2] or {key: value}"
    return "check indentation, colons and quotes; a text with ': ' or ' #' needs quotes"


def parse_yaml(text: str, name: str) -> tuple[dict[str, Any], dict[Key, int]]:
    """The mapping in ``text`` and the line of each of its keys.

    Raises:
        ConfigError: not YAML, not a mapping, or a key twice.
    """
    try:
        raw, node = load_yaml(text)
        lines = dict(_lines(node, set()))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"not YAML: {problem}", where=where, remedy=yaml_remedy(problem)) from None
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{name}:{error.where}", remedy=error.remedy) from None
    except RecursionError:
        raise ConfigError("is nested too deeply", where=name, remedy="a recipe has four levels at most") from None
    except (ValueError, AttributeError, TypeError, LookupError) as error:  # of an explicit tag, or a number too long
        raise ConfigError(
            f"not YAML: {shorten(str(error))}",
            where=name,
            remedy="write values without tags such as !!int, and shorter numbers",
        ) from None
    if raw is None:
        raise ConfigError("the recipe is empty", where=name, remedy="`tutelage run recipes/digits.yaml` shows one")
    if not isinstance(raw, dict) or not all(isinstance(k, str) for k in raw):
        raise ConfigError(
            f"a recipe is a mapping of keys to values, not {'a ' + type(raw).__name__}",
            where=name,
            remedy="start from recipes/digits.yaml",
        )
    return raw, lines
