"""Reads YAML without expanding aliases that would fill the memory."""

import re
from typing import Any

import yaml

from tutelage.errors import ConfigError


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
