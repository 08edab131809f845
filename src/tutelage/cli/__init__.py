"""The command line. It imports torch only once there is something to compute."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from tutelage.cli import doctor, export, generate, init, run, taps
from tutelage.cli.base import say
from tutelage.errors import BudgetSpent, Interrupted, TutelageError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Knowledge distillation: a teacher that is too big becomes a student that is small, fast and yours.",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from tutelage import __version__

        say(__version__)
        raise typer.Exit


for command in (
    init.init,
    init.recipes,
    export.bench,
    export.export,
    export.predict,
    run.run,
    run.search,
    generate.generate,
    generate.judge,
    doctor.doctor,
    taps.taps,
    run.cache,
    run.lab,
    run.report,
):
    app.command()(command)


def _fail(error: TutelageError, code: int) -> NoReturn:
    sys.stderr.write(f"tutelage: {error}\n")
    sys.stderr.flush()
    sys.exit(code)


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's mistake is one message and exit code 2, a spent budget 3, a stop 130."""
    command: Callable[..., Any] = app
    try:
        command(args)
    except Interrupted as stop:
        _fail(stop, 130)
    except BudgetSpent as end:
        _fail(end, 3)
    except TutelageError as error:
        _fail(error, 2)
    except KeyboardInterrupt:
        sys.stderr.write("tutelage: stopped at once; --resume goes on from the last checkpoint\n")
        sys.exit(130)
