"""The commands that train: ``tutelage run``, ``search``, ``cache`` and ``lab``; and ``report``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tutelage.cli.base import Overrides, RecipeArgument, say
from tutelage.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from rich.table import Table

CACHE_ACTIONS = ("verify", "info", "compact")


def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run directory. Default: the first free of runs/NAME, runs/NAME-2 ...", show_default=False
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that directory.")] = False,
) -> None:
    """Train teacher (if it has no weights), baseline student and distilled student; compare."""
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
    api.leave()


def search(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Settings to try. Default: the recipe's, 20.", show_default=False)
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=LOW:HIGH[:log]|KEY=a,b,c", show_default=False,
            help="A key and what it may be, in place of the recipe's space; repeatable.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that each run a trial at a time.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder. Default: the first free of runs/NAME-search, ...", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in that folder.")] = False,
) -> None:  # fmt: skip
    """Try settings of a recipe, choose on validation, and test the chosen against the recipe once."""
    from tutelage.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from tutelage import api
    from tutelage.reports import found_words

    try:
        searched = api.run_search(loaded, trials=trials, keys=key or (), workers=workers, out=out, resume=resume)
    except Interrupted as stop:
        words = [
            *("tutelage", "search", str(recipe), *(overrides or [])),
            *(["--trials", str(trials)] if trials else []),
            *(word for one in key or [] for word in ("--key", one)),
            *(["--workers", str(workers)] if workers > 1 else []),
            *(["--out", str(out)] if out else []),
            "--resume",
        ]
        raise Interrupted(stop.what, remedy=f"go on with: {shlex.join(words)}") from None
    path = searched.path
    say(f"\n{found_words(searched.found)}\nbest:   {path / 'best.yaml'}\nreport: {path / 'search.html'}")


def cache(
    what: Annotated[
        str, typer.Argument(metavar="RECIPE|verify|info|compact", help="A recipe, or what to do with DIR.")
    ],
    rest: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...|DIR", help="Overrides, or the folder of a cache.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder of the cache. Default: the one that the recipe's runs use.")
    ] = None,
) -> None:
    """Ask a recipe's teacher once and keep its word on disk; or check, describe and join a cache."""
    if what in CACHE_ACTIONS:
        if len(rest or []) != 1 or out is not None:
            raise ConfigError(f"tutelage cache {what} takes one folder", remedy=f"tutelage cache {what} DIR")
        from tutelage.experiment.caching import compacted, described, verified

        action = {"verify": verified, "info": described, "compact": compacted}[what]
        say(action(Path((rest or [])[0])))
        return
    from tutelage.config import load_recipe

    loaded = load_recipe(what, rest or [])
    from tutelage.api import leave
    from tutelage.experiment.caching import fill

    filled = fill(loaded, out=out)
    rate = filled.computed / filled.seconds if filled.seconds else 0.0
    say(
        f"{filled.path}: {filled.rows:,} rows, {filled.computed:,} of them computed now in {filled.seconds:.0f} s "
        f"({rate:,.0f} a second)"
    )
    leave()


def lab(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]... [KEY=VALUE]...", help="Experiments; keys of the recipe that all start from.",
                       show_default=False),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All experiments.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="List the experiments and stop.")] = False,
    budget: Annotated[Literal["small", "full"], typer.Option(help="small (minutes, no evidence) or full.")] = "full",
    seeds: Annotated[int | None, typer.Option(help="Seeds an arm. Default: the budget's.", min=1,
                                              show_default=False)] = None,
    jobs: Annotated[int, typer.Option(help="Processes that each train an arm.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="The lab's folder.")] = Path("runs/lab"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the lab in that folder.")] = False,
) -> None:  # fmt: skip
    """Measure the lecture's claims, and say which hold."""
    given = ids or []
    from tutelage import lab as room

    if listed:
        for name, claim in room.CLAIMS.items():
            say(f"{name}: {claim.claim}")
        return
    names = [word for word in given if "=" not in word]
    overrides = [word for word in given if "=" in word]
    try:
        found = room.run_lab(
            names, every=every, budget=budget, seeds=seeds, overrides=overrides, out=out, resume=resume, jobs=jobs
        )  # fmt: skip
    except Interrupted as stop:
        words = ["tutelage", "lab", *given, *(["--all"] if every else []), "--budget", budget]
        words += ["--seeds", str(seeds)] if seeds else []
        words += ["--jobs", str(jobs), "--out", str(out), "--resume"]
        raise Interrupted(stop.what, remedy=f"go on with: {shlex.join(words)}") from None
    for name, experiment in found["experiments"].items():
        say(f"{name}: {experiment['verdict']}")
        for part in experiment["parts"]:
            say(f"  {part['says']}: {room.measured(part)}, {part['verdict']}")
    say(f"page: {out / 'lab.html'}")


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, searches and judgements.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """One HTML page for one run, or several side by side."""
    from tutelage.reports import write_report

    say(f"report: {write_report(runs, out)}")


def _show(summary: dict[str, Any], path: Path) -> None:
    from rich.console import Console

    from tutelage.reports import final_table, verdict, workflow_table
    from tutelage.reports.metric import metric_of

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print()
    many = "workflow" in summary
    console.print(
        _table(workflow_table(summary) if many else final_table(summary), console.width, metric_of(summary))
    )
    console.print(summary["verdict"] if many else verdict(summary), highlight=False, markup=False)
    console.print(f"student: {path / 'student'}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report:  {path / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def _table(rows: list[dict[str, Any]], width: int, metric: str = "accuracy") -> Table:
    """A row for each model where the terminal is wide enough, else a column for each."""
    from rich import box
    from rich.table import Table

    from tutelage.reports.metric import TITLES
    from tutelage.reports.wording import ABSENT, OF_TEACHER

    titles = {
        "accuracy": TITLES.get(metric, metric), "last": "last epoch", "agreement": "agreement", "kl": "KL to teacher",
        "ece": "ECE", "parameters": "parameters", "latency": "latency",
        "over": "difference, points",
    }  # fmt: skip
    titles = {key: title for key, title in titles.items() if any(key in row for row in rows)}
    if all(row.get("agreement", ABSENT) == row.get("kl", ABSENT) == ABSENT for row in rows):  # there is no teacher
        titles = {key: title for key, title in titles.items() if key not in OF_TEACHER}
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
