"""The recipes of the package."""

import re
from importlib import resources
from importlib.resources.abc import Traversable

from tutelage.errors import ConfigError, suggest


def list_recipes() -> dict[str, str]:
    """The recipes of the package by name, each with one line about it."""
    return {name: _about(file.read_text(encoding="utf-8")) for name, file in _files().items()}


def read_recipe(name: str) -> str:
    """Read a recipe of the package as YAML.

    Raises:
        ConfigError: there is no such recipe.
    """
    files, bare = _files(), name.rpartition("/")[2].removesuffix(".yaml")
    if bare not in files:
        raise ConfigError(
            f"the package has no recipe {name!r}" + suggest(bare, list(files)),
            remedy="`tutelage recipes` lists them",
        )
    return files[bare].read_text(encoding="utf-8")


def _files() -> dict[str, Traversable]:
    folder = resources.files("tutelage") / "recipes"
    return dict(sorted((f.name.removesuffix(".yaml"), f) for f in folder.iterdir() if f.name.endswith(".yaml")))


def _about(text: str) -> str:
    """The first sentence of the comment at the start of a recipe."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#") or line.strip() == "#":
            break
        lines.append(line[1:].strip())
        if line.endswith(":"):
            break
    return re.split(r"\.(?: |$)", " ".join(lines))[0].rstrip(":")
