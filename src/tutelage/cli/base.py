"""Arguments and helpers of several commands."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tutelage.errors import Interrupted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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
    """The same interruption, whose remedy is the command that resumes, without an endpoint's login.

    Words that are ``None`` are left out.
    """
    safe = [re.sub(r"//[^/\s]*@", "//", str(word)) for word in ("tutelage", *words) if word is not None]
    return Interrupted(stop.what, remedy=f"continue with: {shlex.join(safe)}")


def wide_console(width: int) -> Console:
    """A rich console; without a terminal ``width`` columns wide."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=width)


def grid(rows: Sequence[Sequence[str]], left: int, **column: Any) -> Table:
    """A rich table; the first row is the head, and the first ``left`` columns are aligned to the left."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for i, title in enumerate(rows[0]):
        table.add_column(title, justify="right" if i >= left else "left", **column)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def flag(name: str, value: Any) -> tuple[object, ...]:
    """``--name value``, or nothing where there is no value."""
    return (f"--{name}", value) if value is not None else ()
