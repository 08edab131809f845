"""``tutelage run``: chooses, opens and locks a run directory, and runs the experiment of a recipe in it."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tutelage.config import Recipe, differing_keys, dump_recipe
from tutelage.config.own_paths import read_own_paths, write_own_paths
from tutelage.data import Data
from tutelage.engine import Accelerator, RunDirectory, broadcast_from_main, build_accelerator, open_trackers
from tutelage.errors import ConfigError, Interrupted, RunDirectoryError, TutelageError
from tutelage.experiment.checks import warn_of_precision
from tutelage.experiment.compare import compare
from tutelage.experiment.recipe_source import load_data, recipe_spec
from tutelage.experiment.spec import RunContext
from tutelage.files import try_lock, wrap_write_errors, write_text
from tutelage.interrupts import catch_interrupts
from tutelage.progress import Terminal
from tutelage.safe_yaml import load_yaml

FREE_TO_CHANGE = {
    "train.trackers", "train.log_every", "train.keep_checkpoints", "data.workers", "teacher.train.trackers",
    "search.trials", "samples", "samples.predictions", "samples.generations", "samples.max_new_tokens",
}  # fmt: skip
"""Keys that may differ when a run is resumed: they do not change what it computes."""

INITIAL_FILES = {"config.yaml", "run.lock"}
"""What a run writes before it computes anything."""


def choose_run_directory(out: str | Path | None, name: str, resume: bool) -> Path:
    """The run's folder: ``out``, or the newest (to resume) or first free of runs/NAME, runs/NAME-2 ..."""
    if out is None:
        taken = sorted(
            (int(m.group(1) or 1), p)
            for p in Path("runs").glob(f"{name}*")
            if (m := re.fullmatch(re.escape(name) + r"(?:-(\d+))?", p.name)) and (p.is_file() or holds_something(p))
        )
        if resume and taken:
            return taken[-1][1]
        return Path("runs") / (name if not taken else f"{name}-{taken[-1][0] + 1}")
    path = Path(out)
    with wrap_write_errors(path):
        if path.exists() and not path.is_dir():
            raise RunDirectoryError("is a file", where=str(path), remedy="choose another --out")
    if holds_something(path) and not resume:
        if (path / "config.yaml").exists():
            raise RunDirectoryError(
                "holds a run already",
                where=str(path),
                remedy="add --resume (in Python: resume=True) to go on with it, or choose another --out (out=)",
            )
        raise RunDirectoryError("is not empty", where=str(path), remedy="choose an empty or new folder as --out")
    return path


def holds_something(path: Path) -> bool:
    """Whether ``path`` is a folder that is not empty."""
    with wrap_write_errors(path):
        return path.is_dir() and any(path.iterdir())


def check_same(path: Path, config: Mapping[str, Any], resume: bool) -> None:
    """Raise :class:`RunDirectoryError` when the run in ``path`` was started from other settings, or there is none."""
    stored = path / "config.yaml"
    if not stored.exists():
        if resume:
            raise RunDirectoryError("there is no run to resume", where=str(path), remedy="leave --resume out")
        return
    before = read_config(stored, "the run cannot go on without its settings: choose another --out")
    changed = [k for k in differing_settings(path, before, config) if k not in FREE_TO_CHANGE]
    if changed:
        differences = [f"{k} (then {_value_at(before, k)}, now {_value_at(config, k)})" for k in changed[:5]]
        raise RunDirectoryError(
            f"was started with other settings: {', '.join(differences)}" + (" ..." if len(changed) > 5 else ""),
            where=str(path),
            remedy="resume with the same recipe and overrides, or choose another --out",
        )


def differing_settings(path: Path, before: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ. A file of a search, lab or workflow that holds the run in ``path`` is the same
    file after the whole folder was moved, renamed, or named from another working directory."""
    holders, keys = _holders(path), differing_keys(before, config)
    return [k for k in keys if not (holders and _is_same(_find(before, k), _find(config, k), str(holders[-1])))]


def _holders(path: Path) -> list[Path]:
    """The folders of searches, labs and workflows that hold ``path``; the outermost last."""
    return [folder for folder in path.resolve().parents if (folder / "run.lock").is_file()]


def own_paths_yaml(text: str, folder: Path) -> str:
    """Settings as YAML for a file in ``folder``, with relative paths to files of this run and of what holds it."""
    config = write_own_paths(load_yaml(text)[0], folder, [folder, *_holders(folder)][-1])
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _is_same(before: Any, now: Any, root: str) -> bool:
    """Whether two values are equal, where paths below ``root`` may have been written for another place of it."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return before.keys() == now.keys() and all(_is_same(before[k], now[k], root) for k in now)
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(_is_same(x, y, root) for x, y in zip(before, now, strict=True))
    if before == now or not (isinstance(before, str) and isinstance(now, str)):
        return bool(before == now)
    scheme = "hf:" if now.startswith("hf:") else ""
    below = os.path.relpath(os.path.realpath(now.removeprefix(scheme)), root).split(os.sep)
    if below[0] in (os.pardir, os.curdir) or not before.startswith(scheme):
        return False
    return before.removeprefix(scheme).split(os.sep)[-len(below) :] == below


def read_config(file: Path, remedy: str) -> dict[str, Any]:
    """The settings in a ``config.yaml``."""
    try:
        config = load_yaml(file.read_text(encoding="utf-8"))[0]
        if not isinstance(config, dict):
            raise ValueError("it holds no settings")
        settings: dict[str, Any] = read_own_paths(config, file.parent)
        return settings
    except (OSError, ValueError, yaml.YAMLError) as error:
        what = f"cannot be read: {str(error).splitlines()[0]}"
        raise RunDirectoryError(what, where=str(file), remedy=remedy) from None


def _find(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _value_at(config: Mapping[str, Any], key: str) -> str:
    value = _find(config, key)
    return "not set" if value is None else str(value)


@contextmanager
def open_run_directory(
    path: Path, config_yaml: str, *, resume: bool, main: bool, patience: float = 0.0
) -> Iterator[RunDirectory]:
    """Open the run directory, and lock it against a second writer during the block.

    Args:
        patience: seconds to wait for another process that writes to it.
    """
    run = RunDirectory(path, writes=main)
    if not main:
        yield run
        return
    check_same(path, load_yaml(config_yaml)[0], resume)
    with wrap_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / "run.lock", os.O_CREAT | os.O_RDWR)
    try:
        deadline = time.monotonic() + patience
        while not try_lock(lock):
            if time.monotonic() >= deadline:
                raise RunDirectoryError(
                    "another process is writing to it", where=str(path), remedy="wait for it, or choose another --out"
                )
            time.sleep(0.1)
        run.sweep()
        fresh = not run.config.exists()
        if fresh:
            write_text(run.config, own_paths_yaml(config_yaml, path))
        try:
            yield run
        except TutelageError as error:
            # A run that failed before it computed anything frees its name; --resume finds what was stopped.
            if fresh and not isinstance(error, Interrupted) and {p.name for p in path.iterdir()} <= INITIAL_FILES:
                shutil.rmtree(path)
            raise
    finally:
        os.close(lock)


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and its summary."""

    path: Path
    summary: dict[str, Any]


def run_recipe(
    recipe: Recipe, *, out: str | Path | None = None, resume: bool = False, terminal: Terminal | None = None
) -> RunResult:
    """Train the teacher if it has no weights, the baseline student and the distilled student, and compare them."""
    if recipe.workflow is not None:
        raise ConfigError(
            f"run_recipe does not run workflows, and this recipe has {recipe.workflow.kind!r}",
            where="workflow",
            remedy="call tutelage.api.run, or remove workflow from the recipe",
        )
    path, accelerator, terminal = set_up_run(recipe, out, resume, terminal)
    return run_on_data(recipe, None, path, resume=resume, terminal=terminal, accelerator=accelerator)


def set_up_run(
    recipe: Recipe, out: str | Path | None, resume: bool, terminal: Terminal | None
) -> tuple[Path, Accelerator, Terminal]:
    """The run directory, the same for all processes; this process's accelerator; and where it shows progress."""
    accelerator = build_accelerator(recipe.train.precision, list(recipe.train.trackers))
    path = broadcast_from_main(accelerator, lambda: choose_run_directory(out, recipe.name, resume))
    terminal = (terminal or Terminal()).only_on(accelerator.is_main_process)
    warn_of_precision(accelerator, terminal)
    return path, accelerator, terminal


def run_on_data(
    recipe: Recipe,
    data: Data | None,
    path: Path,
    *,
    resume: bool,
    terminal: Terminal,
    accelerator: Accelerator | None = None,
) -> RunResult:
    """:func:`run_recipe` in the folder ``path``, on loaded data; ``None`` loads the recipe's."""
    accelerator = accelerator or build_accelerator(recipe.train.precision, list(recipe.train.trackers))
    with open_run_directory(path, dump_recipe(recipe), resume=resume, main=accelerator.is_main_process) as run:
        if run.summary.exists():
            terminal.say(f"{path} is finished; showing its results")
            return RunResult(path, read_summary(run.summary))
        processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
        terminal.say(f"run directory: {path}{processes}")
        data = data or load_data(recipe, terminal)
        for line in getattr(data, "notes", ()):
            terminal.say(line)
        tracked = open_trackers(accelerator, path / "trackers", {"recipe": dump_recipe(recipe)})
        with catch_interrupts(terminal.say) as should_stop, tracked:
            summary = compare(recipe_spec(recipe, data), RunContext(accelerator, run, terminal, should_stop))
    return RunResult(path, summary)


def read_summary(path: Path) -> dict[str, Any]:
    """The ``summary.json`` of a finished run or workflow."""
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirectoryError(
            f"is damaged: {error}", where=str(path), remedy="delete this file; --resume then writes it again"
        ) from None
    return summary
