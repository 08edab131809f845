"""The commands that take a recipe, and ``tutelage report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tutelage.cli import base
from tutelage.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from rich.table import Table

CACHE_ACTIONS = ("verify", "info", "compact")


def run(
    recipe: base.RecipeArgument,
    overrides: base.Overrides = None,
    out: Annotated[
        Path | None, base.option(help="The run directory. Default: the first free of runs/NAME, runs/NAME-2 ...")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in that directory.")] = False,
) -> None:
    """Train the teacher (if it has no weights), the baseline student and the distilled student; compare them."""
    from tutelage.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from tutelage import api

    try:
        result = api.run(loaded, out=out, resume=resume)
    except Interrupted as stop:
        raise base.with_resume_command(
            stop, "run", recipe, *(overrides or []), *base.flag("out", out), "--resume"
        ) from None
    if api.is_main():
        _show(result.summary, result.path)
    api.leave()


def search(
    recipe: base.RecipeArgument,
    overrides: base.Overrides = None,
    trials: Annotated[int | None, base.option(min=1, help="Number of trials. Default: search.trials, 20.")] = None,
    key: Annotated[
        list[str] | None,
        base.option(
            metavar="KEY=LOW:HIGH[:log]|KEY=a,b,c",
            help="A key and its range or values, instead of the recipe's search space; repeatable.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that run trials in parallel.")] = 1,
    out: Annotated[
        Path | None, base.option(help="The folder of the search. Default: the first free of runs/NAME-search, ...")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the search in that folder.")] = False,
) -> None:
    """Search hyperparameters on the validation split; compare the best ones with the recipe on the test split."""
    from tutelage.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from tutelage import api
    from tutelage.reports import search_verdict

    try:
        result = api.run_search(loaded, trials=trials, keys=key or (), workers=workers, out=out, resume=resume)
    except Interrupted as stop:
        keys = [word for one in key or [] for word in ("--key", one)]
        parallel = base.flag("workers", workers) if workers > 1 else ()
        words = [*(overrides or []), *base.flag("trials", trials), *keys, *parallel, *base.flag("out", out)]
        raise base.with_resume_command(stop, "search", recipe, *words, "--resume") from None
    path = result.path
    base.say(f"\n{search_verdict(result.summary)}\nbest:   {path / 'best.yaml'}\nreport: {path / 'search.html'}")


def cache(
    what: Annotated[str, typer.Argument(metavar="RECIPE|verify|info|compact", help="A recipe, or an action on DIR.")],
    rest: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...|DIR", help="Overrides, or the folder of a cache.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder of the cache. Default: the one that runs of the recipe use.")
    ] = None,
) -> None:
    """Precompute the teacher's outputs for a recipe; verify, inspect or compact a cache."""
    if what in CACHE_ACTIONS:
        if len(rest or []) != 1 or out is not None:
            raise ConfigError(f"tutelage cache {what} takes one folder", remedy=f"tutelage cache {what} DIR")
        from tutelage.experiment.fill_cache import cache_compaction, cache_description, cache_verification

        action = {"verify": cache_verification, "info": cache_description, "compact": cache_compaction}[what]
        base.say(action(Path((rest or [])[0])))
        return
    from tutelage.config import load_recipe

    loaded = load_recipe(what, rest or [])
    from tutelage.api import leave
    from tutelage.experiment.fill_cache import fill_cache

    with loaded.locating():
        filled = fill_cache(loaded, out=out)
    rate = filled.computed / filled.seconds if filled.seconds else 0.0
    base.say(
        f"{filled.path}: {filled.rows:,} rows, {filled.computed:,} of them computed now in {filled.seconds:.0f} s "
        f"({rate:,.0f} per second)"
    )
    leave()


def lab(
    ids: Annotated[
        list[str] | None,
        base.argument(
            metavar="[ID]... [KEY=VALUE]...", help="Experiments, and overrides of the recipe they start from."
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Run all experiments.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="List the experiments and exit.")] = False,
    budget: Annotated[
        Literal["small", "full"], typer.Option(help="small (takes minutes; its results are not reliable) or full.")
    ] = "full",
    seeds: Annotated[int | None, base.option(min=1, help="Seeds of each arm. Default: from the budget.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that train arms in parallel.")] = 1,
    out: Annotated[Path, typer.Option(help="The folder of the lab.")] = Path("runs/lab"),
    resume: Annotated[bool, typer.Option("--resume", help="Resume the lab in that folder.")] = False,
) -> None:
    """Test claims from the literature by experiment, and report which hold."""
    given = ids or []
    from tutelage import lab as experiments

    if listed:
        for name, claim in experiments.CLAIMS.items():
            base.say(f"{name}: {claim.claim}")
        return
    names = [word for word in given if "=" not in word]
    overrides = [word for word in given if "=" in word]
    try:
        result = experiments.run_lab(
            names, every=every, budget=budget, seeds=seeds, overrides=overrides, out=out, resume=resume, jobs=jobs
        )
    except Interrupted as stop:
        words = [*given, "--all" if every else None, "--budget", budget, *base.flag("seeds", seeds)]
        raise base.with_resume_command(stop, "lab", *words, "--jobs", jobs, "--out", out, "--resume") from None
    for name, experiment in result["experiments"].items():
        base.say(f"{name}: {experiment['verdict']}")
        for statement in experiment["statements"]:
            base.say(f"  {statement['statement']}: {experiments.measurement(statement)}, {statement['verdict']}")
    base.say(f"page: {out / 'lab.html'}")


def report(
    runs: Annotated[list[Path], base.argument(metavar="RUN...", help="Folders of runs, searches and judgements.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one HTML page about one run, or about several side by side."""
    from tutelage.reports import write_report

    base.say(f"report: {write_report(runs, out)}")


def doctor(recipe: base.RecipeArgument, overrides: base.Overrides = None) -> None:
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


def generate(
    recipe: base.RecipeArgument,
    overrides: base.Overrides = None,
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
        raise base.with_resume_command(stop, "generate", recipe, *(overrides or []), *base.flag("out", out)) from None
    summary, spent = result.summary, result.summary["spent"]
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in summary["rejected"].items())
    cost = f", {spent['cost']:.4f} spent" if "cost" in spent else ""
    base.say(
        f"{summary['kept']:,} conversations accepted" + (f"; rejected: {rejected}" if rejected else "") + "\n"
        f"{summary['calls']:,} calls now, {spent['requests']:,} in all, {spent['tokens']:,} tokens{cost}\n"
        f"data: {result.path / 'data'}\ncard: {result.path / 'README.md'}"
    )


def judge(
    recipe: base.RecipeArgument,
    overrides: base.Overrides = None,
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
        raise base.with_resume_command(stop, "judge", recipe, *(overrides or []), *base.flag("out", out)) from None
    for pair in result.summary["pairs"]:
        first, second = pair["pair"]
        rate = "no verdict" if pair["rate"] is None else f"{pair['rate']:.1%}"
        base.say(f"{first} against {second}: {rate}, {pair['wins']} won, {pair['ties']} tied, {pair['losses']} lost")
    for folder in (result.path, *result.runs):
        base.say(f"page: {folder / 'report.html'}")


def _show(summary: dict[str, Any], path: Path) -> None:
    from tutelage.reports import final_table, multistage_table, verdict
    from tutelage.reports.results import metric_of
    from tutelage.reports.task_figures import task_figures

    console = base.wide_console(120)
    console.print()
    many = "workflow" in summary
    console.print(
        _table(multistage_table(summary) if many else final_table(summary), console.width, metric_of(summary))
    )
    if not many and (figures := task_figures(summary)):
        console.print(base.grid([["", *figures.columns], *figures.rows], 1, no_wrap=True))
    console.print(summary["verdict"] if many else verdict(summary), highlight=False, markup=False)
    console.print(f"student: {path / 'student'}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report:  {path / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def _table(rows: list[dict[str, Any]], width: int, metric: str = "accuracy") -> Table:
    """One row per model; in a narrow terminal one column per model."""
    from tutelage.reports.formatting import ABSENT
    from tutelage.reports.results import METRIC_LABELS, NEEDS_TEACHER

    titles = {
        "accuracy": METRIC_LABELS.get(metric, metric), "last": "last epoch", "agreement": "agreement",
        "kl": "KL to teacher",
        "ece": "ECE", "parameters": "parameters", "latency": "latency",
        "over": "difference, points",
    }  # fmt: skip
    titles = {key: title for key, title in titles.items() if any(key in row for row in rows)}
    if all(row.get("agreement", ABSENT) == row.get("kl", ABSENT) == ABSENT for row in rows):  # there is no teacher
        titles = {key: title for key, title in titles.items() if key not in NEEDS_TEACHER}
    models = [[str(row["name"]), *(str(row.get(key, "")) for key in titles)] for row in rows]
    lines = [["", *titles.values()], *models]
    if sum(max(len(cell) for cell in column) + 2 for column in zip(*lines, strict=True)) > width:
        lines = [list(column) for column in zip(*lines, strict=True)]
    return base.grid(lines, 1, no_wrap=True)
