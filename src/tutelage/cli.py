"""The command line. It imports torch only once there is something to compute."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from tutelage import cli_deploy, cli_start
from tutelage.errors import BudgetSpent, ConfigError, Interrupted, TutelageError

if TYPE_CHECKING:
    from rich.table import Table

    from tutelage.workflows.inspect import Survey

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


for command in (cli_start.init, cli_start.recipes, cli_deploy.bench, cli_deploy.export, cli_deploy.predict):
    app.command()(command)


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
    api.leave()


@app.command()
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
        searched = api.search(loaded, trials=trials, keys=key or (), workers=workers, out=out, resume=resume)
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
    _print(f"\n{found_words(searched.found)}\nbest:   {path / 'best.yaml'}\nreport: {path / 'search.html'}")


@app.command()
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
    from tutelage.workflows.generate import generate as carry_out

    try:
        made = carry_out(loaded, out=out)
    except Interrupted as stop:
        raise _go_on(stop, "generate", recipe, overrides, out) from None
    found, spent = made.summary, made.summary["spent"]
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in found["rejected"].items())
    cost = f", {spent['cost']:.4f} spent" if "cost" in spent else ""
    _print(
        f"{found['kept']:,} conversations kept" + (f"; not kept: {dropped}" if dropped else "") + "\n"
        f"{found['calls']:,} calls now, {spent['requests']:,} in all, {spent['tokens']:,} tokens{cost}\n"
        f"data: {made.path / 'data'}\ncard: {made.path / 'README.md'}"
    )


@app.command()
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
        _print(f"{first} against {second}: {rate}, {found['wins']} won, {found['ties']} tied, {found['losses']} lost")
    for page in (judged.path, *judged.runs):
        _print(f"page: {page / 'report.html'}")


def _go_on(
    stop: Interrupted, command: str, recipe: Path, overrides: list[str] | None, out: Path | None
) -> Interrupted:
    """The same stop, with the command to go on with, without an endpoint's login."""
    said = [re.sub(r"//[^/\s]*@", "//", text) for text in overrides or []]
    words = ["tutelage", command, str(recipe), *said, *(["--out", str(out)] if out else [])]
    return Interrupted(stop.what, remedy=f"go on with: {shlex.join(words)}")


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
def taps(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A recipe, a model as recipes name it (resnet, timm:resnet18), or a folder that a run exported.",
            show_default=False,
        ),
    ],
    of: Annotated[
        str | None, typer.Option(help="Of a recipe: student or teacher; default both.", show_default=False)
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Of one example, such as 3x64x64, or 16 tokens. Default: the model's.", show_default=False),
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes. Default: 10.", show_default=False)] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "-o", "--option", metavar="KEY=VALUE", show_default=False,
            help="An option of the model, or a key of the recipe to override; repeatable.",
        ),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(help="Levels of modules to show. Default: all.", show_default=False, min=1)
    ] = None,
) -> None:  # fmt: skip
    """Print a model's modules with their output shapes: what a method's pairs can name."""
    from tutelage.config import load_recipe

    if Path(model).is_file() or model.endswith((".yaml", ".yml")):
        refused = [key for key, given in (("--shape", shape), ("--classes", classes)) if given is not None]
        if refused:
            raise ConfigError(f"{refused[0]} is for a model; a recipe's data decides", remedy="leave it out")
        if of not in (None, "student", "teacher"):
            raise ConfigError(f"--of {of}: a recipe has no such model", remedy="allowed: student, teacher")
        recipe = load_recipe(model, option or [])
        from tutelage.workflows.inspect import survey_recipe
        from tutelage.workflows.series import first_stage

        surveys = survey_recipe(first_stage(recipe), (of,) if of else ("student", "teacher"))
    else:
        if of is not None:
            raise ConfigError(f"--of {of} is for recipes, and {model} is none", remedy="leave it out")
        size, options = _size(shape), _options(option or [])
        from tutelage.workflows.inspect import survey_model

        surveys = [survey_model(model, size=size, classes=classes, options=options)]
    _show_taps(surveys, depth)


def _size(shape: str | None) -> tuple[int, ...] | None:
    if shape is None:
        return None
    parts = shape.lower().split("x")
    if len(parts) not in (1, 3) or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ConfigError(
            f"--shape {shape} is no shape of one example",
            remedy="CHANNELSxHEIGHTxWIDTH of an image, such as 3x64x64, or a number of tokens, such as 16",
        )
    return tuple(int(p) for p in parts)


def _options(given: list[str]) -> dict[str, Any]:
    from tutelage.config.lines import parse_yaml

    options: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError("not of the form key=value", where=f"-o {text}", remedy="for example -o blocks=3")
        options |= parse_yaml(f"{key}: {value}", f"-o {text}")[0]
    return options


def _show_taps(surveys: list[Survey], depth: int | None) -> None:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    console = Console(soft_wrap=True)
    for survey in surveys:
        auto = {path: size for size, path in survey.stages.items()}
        trees: dict[str, Tree] = {}
        console.print(Text.assemble((survey.title, "bold"), f"  on {survey.inputs}"))
        for node in survey.nodes:
            parent, _, name = node.path.rpartition(".")
            level = node.path.count(".") + 1 if node.path else 0
            if depth is not None and level > depth:
                continue
            ran = node.calls > 0
            plain = len(node.outputs) == 1 and not node.outputs[0][0]
            line = Text.assemble((name or "(the model)", "bold" if ran else "dim"), ("  " + node.kind, "dim"))
            if plain:
                line.append("  " + node.outputs[0][1], "cyan")
            if node.calls > 1:
                line.append(f"  x{node.calls}", "yellow")
            if node.parameters:
                line.append(f"  {node.parameters:,}", "dim")
            if not ran:
                line.append("  did not run", "dim yellow")
            if level == depth and node.inside:
                line.append(f"  +{node.inside} inside", "dim")
            if node.path in auto:
                line.append("  auto {}x{}".format(*auto[node.path]), "green")
            tree = trees[parent].add(line) if node.path else Tree(line, guide_style="dim")
            trees[node.path] = tree
            for key, text in () if plain else node.outputs:
                tree.add(Text.assemble((key, "magenta"), ("  " + text, "cyan")))
        console.print(trees[""])
        found = ", ".join("{} ({}x{})".format(path, *size) for path, size in auto.items())
        console.print(
            Text(
                f"pairs: auto would take {found}"
                if found
                else "pairs: auto finds no feature maps here: name the taps"
            )
        )
        console.print()
    if len(surveys) == 2:
        both = [size for size in surveys[0].stages if size in surveys[1].stages]
        found = ", ".join("{} with {} ({}x{})".format(*(s.stages[size] for s in surveys), *size) for size in both)
        console.print(
            Text(f"pairs: auto would pair {found}" if found else "pairs: auto would find no resolution in both")
        )


CACHE_ACTIONS = ("verify", "info", "compact")


@app.command()
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
        from tutelage.workflows.caching import compacted, described, verified

        action = {"verify": verified, "info": described, "compact": compacted}[what]
        _print(action(Path((rest or [])[0])))
        return
    from tutelage.config import load_recipe

    loaded = load_recipe(what, rest or [])
    from tutelage.api import leave
    from tutelage.workflows.caching import fill

    filled = fill(loaded, out=out)
    rate = filled.computed / filled.seconds if filled.seconds else 0.0
    _print(
        f"{filled.path}: {filled.rows:,} rows, {filled.computed:,} of them computed now in {filled.seconds:.0f} s "
        f"({rate:,.0f} a second)"
    )
    leave()


@app.command()
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
            _print(f"{name}: {claim.claim}")
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
        _print(f"{name}: {experiment['verdict']}")
        for part in experiment["parts"]:
            _print(f"  {part['says']}: {room.measured(part)}, {part['verdict']}")
    _print(f"page: {out / 'lab.html'}")


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, searches and judgements.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """One HTML page for one run, or several side by side."""
    from tutelage.reports import write_report

    _print(f"report: {write_report(runs, out)}")


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


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


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
