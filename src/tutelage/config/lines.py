"""YAML 1.2 with the line of every key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from tutelage.errors import ConfigError, shorten

Key = tuple[str | int, ...]
Place = int | str
"""Where a value was given: a line of the file, or an override."""


class Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-3 is a number, and 'no', 'on' and 'off' are words."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in pairs if tag not in (
        "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp",
    )]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}  # fmt: skip
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$", re.I), list("tTfF"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+"
               r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)  # fmt: skip


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


MAX_ALIASED_NODES = 5000
"""How many nodes the aliases of a document may add to it."""


def _check_aliases(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """The number of nodes below and with ``node`` once aliases are expanded; ``sizes`` remembers that of each node.

    Raises:
        ConfigError: aliases add more than :data:`MAX_ALIASED_NODES` nodes, or a node contains itself.
    """
    line = str(node.start_mark.line + 1)
    remedy = "write the values out, or use fewer aliases (&name, *name)"
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise ConfigError("an alias refers to a value that contains the alias itself", where=line, remedy=remedy)
        return size
    sizes[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_check_aliases(child, sizes) for child in children)
    if size > MAX_ALIASED_NODES + len(sizes):
        raise ConfigError(
            f"the aliases in this value expand to more than {MAX_ALIASED_NODES} nodes", where=line, remedy=remedy
        )
    sizes[id(node)] = size
    return size


def load_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML document, and its nodes; aliases are counted before they are expanded.

    Raises:
        ConfigError: too many nodes by aliases; its ``where`` is the line.
        yaml.YAMLError: not YAML.
        RecursionError: nested too deeply.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        _check_aliases(node, {})
        return loader.construct_document(node), node
    finally:
        loader.dispose()


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
        raise ConfigError(
            f"not YAML: {problem}", where=where, remedy="check indentation, colons and quotes near that line"
        ) from None
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
