"""The command line. Commands import torch only when they compute."""

import re
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from tutelage.cli import export, init, run, taps
from tutelage.cli.base import say
from tutelage.errors import BudgetSpent, ConfigError, Interrupted, TutelageError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Knowledge distillation: train a small student model from a large teacher model.",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
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
    run.generate,
    run.judge,
    run.doctor,
    taps.taps,
    run.cache,
    run.lab,
    run.report,
):
    app.command()(command)


def _fail(error: object, code: int) -> NoReturn:
    sys.stderr.write(f"tutelage: {error}\n")
    sys.stderr.flush()
    sys.exit(code)


def main(args: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 2 after a user's mistake, 3 after a spent budget, 130 after a stop."""
    command: Callable[..., Any] = app
    for word in sys.argv[1:] if args is None else args:
        if re.match(r"-+[a-z_]+\.", word):
            bare = word.lstrip("-")
            example = bare if "=" in bare else f"{bare}=VALUE"
            _fail(ConfigError(f"{word} is no option", remedy=f"keys of a recipe have no dashes: {example}"), 2)
    try:
        command(args)
    except Interrupted as stop:
        _fail(stop, 130)
    except BudgetSpent as end:
        _fail(end, 3)
    except TutelageError as error:
        _fail(error, 2)
    except KeyboardInterrupt:
        _fail("stopped at once; --resume continues from the last checkpoint", 130)
