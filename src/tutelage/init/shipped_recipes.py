"""The recipes that come with the package."""

from __future__ import annotations

import re
from importlib import resources
from importlib.resources.abc import Traversable

from tutelage.errors import ConfigError, suggest


def list_recipes() -> dict[str, str]:
    """What each shipped recipe does, in one line, by name."""
    return {name: _about(file.read_text(encoding="utf-8")) for name, file in _files().items()}


def read_recipe(name: str) -> str:
    """The YAML of a shipped recipe.

    Args:
        name: as :func:`list_recipes` lists it; ``recipes/NAME.yaml`` will do too.

    Raises:
        ConfigError: there is none of that name; names the nearest.
    """
    files, bare = _files(), name.rpartition("/")[2].removesuffix(".yaml")
    if bare not in files:
        raise ConfigError(
            f"no shipped recipe is called {name!r}" + suggest(bare, list(files)),
            remedy="`tutelage recipes` lists them",
        )
    return files[bare].read_text(encoding="utf-8")


def _files() -> dict[str, Traversable]:
    folder = resources.files("tutelage") / "recipes"
    found = {f.name.removesuffix(".yaml"): f for f in folder.iterdir() if f.name.endswith(".yaml")}
    return dict(sorted(found.items()))


def _about(text: str) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#") or line.strip() == "#":
            break
        lines.append(line[1:].strip())
        if line.endswith(":"):
            break
    return re.split(r"\.(?: |$)", " ".join(lines))[0].rstrip(":")
