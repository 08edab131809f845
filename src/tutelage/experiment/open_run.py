"""Choosing, opening and locking the folder of a run. Nothing that is there is ever overwritten."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tutelage.config import differing_keys
from tutelage.engine import RunDirectory
from tutelage.errors import Interrupted, RunDirectoryError, TutelageError
from tutelage.files import try_lock, wrap_write_errors, write_text
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
    changed = [k for k in differing_keys(before, config) if k not in FREE_TO_CHANGE]
    if changed:
        differences = [f"{k} (then {_value_at(before, k)}, now {_value_at(config, k)})" for k in changed[:5]]
        raise RunDirectoryError(
            f"was started with other settings: {', '.join(differences)}" + (" ..." if len(changed) > 5 else ""),
            where=str(path),
            remedy="resume with the same recipe and overrides, or choose another --out",
        )


def read_config(file: Path, remedy: str) -> dict[str, Any]:
    """The settings in a ``config.yaml``."""
    try:
        config = load_yaml(file.read_text(encoding="utf-8"))[0]
        if not isinstance(config, dict):
            raise ValueError("it holds no settings")
        return config
    except (OSError, ValueError, yaml.YAMLError) as error:
        what = f"cannot be read: {str(error).splitlines()[0]}"
        raise RunDirectoryError(what, where=str(file), remedy=remedy) from None


def _value_at(config: Mapping[str, Any], key: str) -> str:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
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
            write_text(run.config, config_yaml)
        try:
            yield run
        except TutelageError as error:
            # A run that failed before it computed anything frees its name; --resume finds what was stopped.
            if fresh and not isinstance(error, Interrupted) and {p.name for p in path.iterdir()} <= INITIAL_FILES:
                shutil.rmtree(path)
            raise
    finally:
        os.close(lock)
