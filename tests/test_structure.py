"""The shape of the package: no import circle, and small functions, rooms and classes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
PACKAGE = SRC / "tutelage"
FILES = sorted(PACKAGE.rglob("*.py"))

MOST_LINES_OF_A_FUNCTION = 80
MOST_LINES_OF_A_ROOM = 5_500
MOST_LINES = 48_000
"""Of the package: 39,905 without what was added since. Raise it for new capability alone."""
MOST_FIELDS = 12


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere: at the top, in functions and for types alone."""
    targets = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                targets.add(inner if inner in MODULES else node.module)
    return {name for name in targets if name in MODULES} - {module_of(path)}


GRAPH = {name: imports_of(path) for name, path in MODULES.items()}
LAZY_ENTRY = "tutelage"
"""The package itself loads its rooms by name when they are used, and submodules import nothing from it but rooms."""


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = []
            while True:
                group.append(stack.pop())
                if group[-1] == name:
                    break
            if len(group) > 1:
                groups.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return groups


def test_no_modules_import_each_other_in_a_circle() -> None:
    without_entry = {name: targets - {LAZY_ENTRY} for name, targets in GRAPH.items() if name != LAZY_ENTRY}
    assert circles(without_entry) == []


def test_a_circle_would_be_noticed() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def rooms() -> dict[str, int]:
    """Lines of each folder below the package."""
    lines: dict[str, int] = {}
    for path in FILES:
        room = path.relative_to(PACKAGE).parts[0]
        lines[room] = lines.get(room, 0) + len(path.read_text(encoding="utf-8").splitlines())
    return lines


def test_no_room_and_no_package_grows_too_large() -> None:
    lines = rooms()
    assert {room: n for room, n in lines.items() if n >= MOST_LINES_OF_A_ROOM} == {}
    assert sum(lines.values()) <= MOST_LINES


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def functions() -> list[tuple[str, int]]:
    """Every function with its lines of code."""
    return [
        (f"{module_of(path)}.{node.name}", code_lines(node))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_no_function_is_longer_than_a_screen_or_two() -> None:
    assert [(name, n) for name, n in functions() if n > MOST_LINES_OF_A_FUNCTION] == []


def fields(node: ast.ClassDef) -> int:
    """Fields of a class: annotated in its body, or assigned to ``self`` in it."""
    annotated = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assigned = {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute)
        and isinstance(n.ctx, ast.Store)
        and isinstance(n.value, ast.Name)
        and n.value.id == "self"
    }
    return len(annotated | assigned)


@pytest.mark.parametrize("room", ["experiment"])
def test_classes_of_the_experiment_are_small(room: str) -> None:
    large = {
        f"{module_of(path)}.{node.name}": fields(node)
        for path in (PACKAGE / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and fields(node) > MOST_FIELDS
    }
    assert large == {}


if __name__ == "__main__":
    print("lines", sum(rooms().values()), dict(sorted(rooms().items(), key=lambda item: -item[1])))
    print("circles", circles({name: targets - {LAZY_ENTRY} for name, targets in GRAPH.items() if name != LAZY_ENTRY}))
    print("long functions", sorted((n, name) for name, n in functions() if n > MOST_LINES_OF_A_FUNCTION))
