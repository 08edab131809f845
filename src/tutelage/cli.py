"""The command line. It imports torch only once there is something to compute."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tutelage.errors import Interrupted, TutelageError

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Knowledge distillation: a teacher that is too big becomes a student that is small, fast and yours.",
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Keys of the recipe to override: method.temperature=8 seed=1",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="The run directory. Default: the first free of runs/NAME, runs/NAME-2 ...", show_default=False),
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from tutelage import __version__

        _print(__version__)
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that directory.")] = False,
) -> None:
    """Train teacher (if it has no weights), student alone and student distilled; compare."""
    from tutelage.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from tutelage import api

    try:
        finished = api.run(loaded, out=out, resume=resume)
    except Interrupted as stop:
        words = [
            "tutelage",
            "run",
            str(recipe),
            *(overrides or []),
            *(["--out", str(out)] if out else []),
            "--resume",
        ]
        raise Interrupted(stop.what, remedy=f"go on with: {shlex.join(words)}") from None
    if api.is_main():
        _show(finished.summary, finished.path)


@app.command()
def doctor(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Load everything, run one batch, and print what will go wrong before it does."""
    from tutelage.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from tutelage.workflows.doctor import examine

    findings = examine(loaded)
    marks = {"ok": "[green]ok  [/]", "note": "[yellow]note[/]", "bad": "[red]bad [/]"}
    from rich.console import Console
    from rich.markup import escape

    console = Console(soft_wrap=True)
    for finding in findings:
        console.print(f"{marks[finding.level]} {escape(finding.topic)}: {escape(finding.text)}", highlight=False)
        if finding.remedy:
            console.print(f"       -> {escape(finding.remedy)}", highlight=False)
    if any(f.level == "bad" for f in findings):
        raise typer.Exit(2)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """One HTML page for one run, or several side by side."""
    from tutelage.reports import write_report

    _print(f"report: {write_report(runs, out)}")


def _show(summary: dict[str, Any], path: Path) -> None:
    from rich.console import Console

    from tutelage.reports import final_table, verdict

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print()
    console.print(_table(final_table(summary), console.width))
    console.print(verdict(summary), highlight=False, markup=False)
    console.print(f"student: {path / 'student'}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report:  {path / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def _table(rows: list[dict[str, Any]], width: int) -> Table:
    """A row for each model where the terminal is wide enough, else a column for each."""
    from rich import box
    from rich.table import Table

    titles = {
        "accuracy": "accuracy", "last": "last epoch", "agreement": "agreement", "kl": "KL to teacher",
        "ece": "ECE", "parameters": "parameters", "latency": "latency",
    }  # fmt: skip
    models = [[str(row["name"]), *(str(row.get(key, "")) for key in titles)] for row in rows]
    lines = [["", *titles.values()], *models]
    if sum(max(len(cell) for cell in column) + 2 for column in zip(*lines, strict=True)) > width:
        lines = [list(column) for column in zip(*lines, strict=True)]
    table = Table(box=box.SIMPLE_HEAD)
    for i, title in enumerate(lines[0]):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    for line in lines[1:]:
        table.add_row(*line)
    return table


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _fail(error: TutelageError, code: int) -> NoReturn:
    sys.stderr.write(f"tutelage: {error}\n")
    sys.stderr.flush()
    sys.exit(code)


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's mistake is one message and exit code 2, an interruption 130."""
    command: Callable[..., Any] = app
    try:
        command(args)
    except Interrupted as stop:
        _fail(stop, 130)
    except TutelageError as error:
        _fail(error, 2)
    except KeyboardInterrupt:
        sys.stderr.write("tutelage: stopped at once; --resume goes on from the last checkpoint\n")
        sys.exit(130)
