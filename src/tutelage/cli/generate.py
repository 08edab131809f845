"""The commands that ask an endpoint: ``tutelage generate`` and ``tutelage judge``."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli.base import Overrides, RecipeArgument, say
from tutelage.errors import Interrupted


def generate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder. Default: runs/NAME-generate.", show_default=False)
    ] = None,
) -> None:
    """Ask an endpoint for text within a budget, and write what is good as data; the same command goes on."""
    from tutelage.config import load_generation

    loaded = load_generation(recipe, overrides or [])
    from tutelage.generation import generate as carry_out

    try:
        made = carry_out(loaded, out=out)
    except Interrupted as stop:
        raise _go_on(stop, "generate", recipe, overrides, out) from None
    found, spent = made.summary, made.summary["spent"]
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in found["rejected"].items())
    cost = f", {spent['cost']:.4f} spent" if "cost" in spent else ""
    say(
        f"{found['kept']:,} conversations kept" + (f"; not kept: {dropped}" if dropped else "") + "\n"
        f"{found['calls']:,} calls now, {spent['requests']:,} in all, {spent['tokens']:,} tokens{cost}\n"
        f"data: {made.path / 'data'}\ncard: {made.path / 'README.md'}"
    )


def judge(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder. Default: runs/NAME-judge.", show_default=False)
    ] = None,
) -> None:
    """Let models answer held-out prompts, and an endpoint say whose answers are better, in both orders."""
    from tutelage.config import load_judgement

    loaded = load_judgement(recipe, overrides or [])
    from tutelage import api

    try:
        judged = api.judge(loaded, out=out)
    except Interrupted as stop:
        raise _go_on(stop, "judge", recipe, overrides, out) from None
    for found in judged.summary["pairs"]:
        first, second = found["pair"]
        rate = "no verdict" if found["rate"] is None else f"{found['rate']:.1%}"
        say(f"{first} against {second}: {rate}, {found['wins']} won, {found['ties']} tied, {found['losses']} lost")
    for page in (judged.path, *judged.runs):
        say(f"page: {page / 'report.html'}")


def _go_on(
    stop: Interrupted, command: str, recipe: Path, overrides: list[str] | None, out: Path | None
) -> Interrupted:
    """The same stop, with the command to go on with, without an endpoint's login."""
    said = [re.sub(r"//[^/\s]*@", "//", text) for text in overrides or []]
    words = ["tutelage", command, str(recipe), *said, *(["--out", str(out)] if out else [])]
    return Interrupted(stop.what, remedy=f"go on with: {shlex.join(words)}")
