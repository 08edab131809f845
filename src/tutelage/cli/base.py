"""Arguments and helpers of several commands."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tutelage.errors import Interrupted

option = partial(typer.Option, show_default=False)
argument = partial(typer.Argument, show_default=False)

RecipeArgument = Annotated[Path, argument(metavar="RECIPE", help="A YAML recipe.")]
Overrides = Annotated[
    list[str] | None,
    argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to override: method.temperature=8 seed=1"),
]


def say(text: str) -> None:
    """Print to standard output."""
    sys.stdout.write(text + "\n")


def with_resume_command(stop: Interrupted, *words: object) -> Interrupted:
    """The same interruption, whose remedy is the command that resumes; words that are ``None`` are left out."""
    command = shlex.join(str(word) for word in ("tutelage", *words) if word is not None)
    return Interrupted(stop.what, remedy=f"go on with: {command}")


def flag(name: str, value: Any) -> tuple[object, ...]:
    """``--name value``, or nothing where there is no value."""
    return (f"--{name}", value) if value is not None else ()
