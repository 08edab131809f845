"""The commands that send requests to an endpoint: ``tutelage generate`` and ``tutelage judge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli.base import Overrides, RecipeArgument, flag, say, with_resume_command
from tutelage.errors import Interrupted


def generate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder. Default: runs/NAME-generate.", show_default=False)
    ] = None,
) -> None:
    """Generate text with an endpoint within a budget, filter it, and write it as data.

    The same command continues an interrupted run.
    """
    from tutelage.config import load_endpoint_recipe

    loaded = load_endpoint_recipe(recipe, overrides or [], "generate")
    from tutelage import generation

    try:
        result = generation.generate(loaded, out=out)
    except Interrupted as stop:
        raise with_resume_command(stop, "generate", recipe, *(overrides or []), *flag("out", out)) from None
    summary, spent = result.summary, result.summary["spent"]
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in summary["rejected"].items())
    cost = f", {spent['cost']:.4f} spent" if "cost" in spent else ""
    say(
        f"{summary['kept']:,} conversations accepted" + (f"; rejected: {rejected}" if rejected else "") + "\n"
        f"{summary['calls']:,} calls now, {spent['requests']:,} in all, {spent['tokens']:,} tokens{cost}\n"
        f"data: {result.path / 'data'}\ncard: {result.path / 'README.md'}"
    )


def judge(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder. Default: runs/NAME-judge.", show_default=False)
    ] = None,
) -> None:
    """Generate answers of several models to held-out prompts, and let an endpoint compare them in both orders."""
    from tutelage.config import load_endpoint_recipe

    loaded = load_endpoint_recipe(recipe, overrides or [], "judge")
    from tutelage import api

    try:
        result = api.judge(loaded, out=out)
    except Interrupted as stop:
        raise with_resume_command(stop, "judge", recipe, *(overrides or []), *flag("out", out)) from None
    for pair in result.summary["pairs"]:
        first, second = pair["pair"]
        rate = "no verdict" if pair["rate"] is None else f"{pair['rate']:.1%}"
        say(f"{first} against {second}: {rate}, {pair['wins']} won, {pair['ties']} tied, {pair['losses']} lost")
    for folder in (result.path, *result.runs):
        say(f"page: {folder / 'report.html'}")
