"""What several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Keys of the recipe to override: method.temperature=8 seed=1",
        show_default=False,
    ),
]


def say(text: str) -> None:
    """A line, or several, on standard output."""
    sys.stdout.write(text + "\n")
