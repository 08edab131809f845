"""``tutelage doctor``."""

from __future__ import annotations

import typer

from tutelage.cli.base import Overrides, RecipeArgument


def doctor(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe before a run: load everything, run a few steps, and report problems."""
    from tutelage.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from rich.console import Console
    from rich.markup import escape

    from tutelage.cli.doctor_checks import examine

    findings = examine(loaded)
    marks = {"ok": "[green]ok  [/]", "note": "[yellow]note[/]", "bad": "[red]bad [/]"}
    console = Console(soft_wrap=True)
    for finding in findings:
        console.print(f"{marks[finding.level]} {escape(finding.topic)}: {escape(finding.text)}", highlight=False)
        if finding.remedy:
            console.print(f"       -> {escape(finding.remedy)}", highlight=False)
    if any(f.level == "bad" for f in findings):
        raise typer.Exit(2)
