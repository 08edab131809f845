"""The package has one vocabulary: no class name twice, and none of the coinages that it once had.

``python tests/test_names.py [PATH ...]`` lists what is left of them, file by file.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

IDENTIFIERS = {
    # renamed classes
    "AheadTeacher", "Alike", "Anatomy", "Compared", "Crossed", "Desk", "Fitted", "Found", "Judged", "Link", "Rounded",
    "Said", "Sight", "Site", "Sloped", "Soft", "SoftObjective", "Trainee", "Watcher",
    # renamed functions, attributes and variables
    "aligns", "apprentice", "ask_ahead", "asks_ahead", "beginning", "desk", "said", "trainee", "untaught",
    # participles in the place of nouns and verbs
    "adapted", "asked", "built", "drawn", "fitted", "found", "kept", "made", "served", "shown", "taught", "told",
    "written",
}  # fmt: skip
"""Names that code must not define, assign or take as a parameter."""

KEYS = {
    "rounded", "max_new", "max_prompt", "first", "near", "speed", "replay", "reuse", "objective",
}  # fmt: skip
"""Keys that recipes and summaries had."""

FILES = {
    "objectives", "deploy", "start", "workflows", "setting", "teaching", "training", "finished", "showcase",
    "samples", "suggest", "space", "pool", "stop", "folder", "desk", "wave", "pace", "faults",
    "verdicts", "links", "hard", "ahead", "watcher", "recompute", "axes", "slopes", "crossed", "found", "written",
}  # fmt: skip
"""Names of files and folders, without their suffix."""

PHRASES = (
    r"teachers?'s? word\b", r"\bits word\b", r"\btheir word\b", r"\bone word of\b", r"\basked? ahead\b",
    r"\bapprentice", r"\bspeaks? as one\b", r"\bthe lecture's claims\b", r"\bvariant: lecture\b",
    r"\bheeds?\b", r"\btrainees?\b",
    r"\bthe desk\b", r"\bas in eight bits\b", r"\brounded student", r"\bstudent alone\b", r"\btaught by\b",
    r"\bis asked\b", r"\bare asked\b", r"\bsays of a\b", r"\bteacher says\b", r"\bmade anew\b", r"\balike\b",
    r"\bbesides\b", r"\bunder its eyes\b", r"\bthe lecture\b",
)  # fmt: skip
"""Phrases, in docs, messages, docstrings and pages."""


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that a module defines, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.value.lineno, node.arg


def coinages(path: Path) -> Iterator[tuple[int, str]]:
    """What is left of the old words in one file."""
    if path.stem in FILES and path.suffix == ".py":
        yield 0, f"file name {path.name}"
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        tree = ast.parse(text)
        for line, name in names_in(tree):
            if name.lstrip("_") in IDENTIFIERS:
                yield line, f"name {name}"
        if path.parent.name == "config" or path.parent.parent.name == "config":
            for node in ast.walk(tree):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in KEYS:
                    yield node.lineno, f"key {node.target.id}"
    elif path.suffix in {".yaml", ".yml"}:
        for number, line in enumerate(text.splitlines(), 1):
            match = re.match(r"\s*-?\s*(\w+):", line)
            if match and match.group(1) in KEYS:
                yield number, f"key {match.group(1)}"
    for number, line in enumerate(text.splitlines(), 1):
        for phrase in PHRASES:
            if match := re.search(phrase, line, re.IGNORECASE):
                yield number, f"phrase {match.group(0)!r}"


def sources(paths: list[Path] | None = None) -> Iterator[Path]:
    """The files that readers meet."""
    roots = paths or [ROOT / name for name in ("src", "docs", "README.md", "recipes")]
    for root in roots:
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            if path.suffix in {".py", ".md", ".yaml", ".yml", ".jinja", ".html", ".js"} and path.name != "log.md":
                yield path


def class_names() -> dict[str, list[str]]:
    """Public classes of the package by name."""
    classes = defaultdict(list)
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(str(path.relative_to(ROOT)))
    return classes


def test_no_two_public_classes_have_one_name() -> None:
    twice = {name: paths for name, paths in class_names().items() if len(paths) > 1}
    assert not twice


def test_no_coinage_is_left() -> None:
    left = [f"{p.relative_to(ROOT)}:{line}: {what}" for p in sources() for line, what in coinages(p)]
    assert not left, "\n".join(left[:50])


if __name__ == "__main__":
    total = 0
    for source in sources([Path(p).resolve() for p in sys.argv[1:]] or None):
        for line, what in coinages(source):
            total += 1
            print(f"{source}:{line}: {what}")
    print(f"{total} left; classes twice: { {k: v for k, v in class_names().items() if len(v) > 1} }")
