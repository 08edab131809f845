"""The run directory: everything a person or a report needs, written so that a crash loses nothing.

::

    config.yaml     the resolved recipe
    metrics.jsonl   one line for each log point and evaluation of every training
    summary.json    what the run found; written at the end
    report.html     the same to look at
    student/        the exported student
    models/         each finished training's model and its result
    similarity/     how alike the classes are to the teacher and to each finished model
    checkpoints/    the last states of each training
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tutelage.errors import REFUSALS, RunDirectoryError, refusal

DRAFT = ".tutelage-tmp."
"""How the names of files and folders begin that are not complete yet."""

_ROOM = "free some space, then go on with --resume"
_REMEDIES = dict.fromkeys(REFUSALS, "choose another --out") | {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EACCES: "choose another --out, or fix the folder's permissions",
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write at ``path`` into a :class:`RunDirectoryError`."""
    try:
        yield
    except RunDirectoryError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the path and the disk")
        raise RunDirectoryError(f"cannot be written: {refusal(error)}", where=str(path), remedy=remedy) from error
    except Exception as error:
        # safetensors reports the system's refusal as an error of its own
        if type(error).__name__ == "SafetensorError" and "os error" in str(error).lower():
            full = "28" in str(error) or "space" in str(error)
            reason = REFUSALS[errno.ENOSPC] if full else str(error)
            remedy = _ROOM if full else "check the path and the disk"
            raise RunDirectoryError(f"cannot be written: {reason}", where=str(path), remedy=remedy) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: to a temporary name, synced, then renamed."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{DRAFT}{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at ``path`` complete, synced, in one rename, or not at all."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{DRAFT}{path.name}."))
        try:
            yield draft
            for file in draft.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
            draft.chmod(0o755)
            old = None
            if path.exists():
                old = path.with_name(f"{DRAFT}{path.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            draft.rename(path)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


class RunDirectory:
    """Paths and files of one run.

    Args:
        path: the folder; made if absent.
        writes: whether this process writes (the main one of several).
    """

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def summary(self) -> Path:
        """What the run found."""
        return self.path / "summary.json"

    @property
    def metrics(self) -> Path:
        """The log of every training."""
        return self.path / "metrics.jsonl"

    def checkpoints(self, training: str) -> Path:
        """Folder of a training's checkpoints."""
        return self.path / "checkpoints" / training

    def decided(self, what: str, now: bool) -> bool:
        """``now``, or what was decided when the run began: a resumed one computes the same."""
        path = self.path / "decisions.json"
        known: dict[str, bool] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if what not in known and self.writes:
            write_text(path, json.dumps({**known, what: now}, indent=1) + "\n")
        return known.get(what, now)

    def model(self, training: str) -> Path:
        """Folder of a finished training's model."""
        return self.path / "models" / training

    def similarity(self, training: str) -> Path:
        """How alike the classes are to a finished training's model."""
        return self.path / "similarity" / f"{training}.json"

    def export(self, model: Path) -> None:
        """Make the finished model in that folder the run's student."""
        with new_folder(self.path / "student") as folder:
            shutil.copytree(model, folder, ignore=shutil.ignore_patterns("result.json"), dirs_exist_ok=True)

    def result(self, training: str) -> dict[str, Any] | None:
        """What a finished training found; ``None`` while it is not finished."""
        path = self.model(training) / "result.json"
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunDirectoryError(
                f"is damaged: {error}",
                where=str(path),
                remedy=f"delete {path.parent}; --resume then trains this model again",
            ) from None
        return found

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to the metrics."""
        if self.writes:
            with explained(self.metrics):
                self.path.mkdir(parents=True, exist_ok=True)
                with open(self.metrics, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")

    def rewind(self, training: str, step: int) -> None:
        """Forget what was logged of a training after ``step``, before it goes on from there."""
        if self.writes and self.metrics.exists():
            kept = [
                text
                for text in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
                if (line := _parsed(text)) is not None and not (line["training"] == training and line["step"] > step)
            ]
            write_text(self.metrics, "".join(text + "\n" for text in kept))

    def sweep(self) -> None:
        """Remove what a killed process left half-written."""
        for folder in (
            self.path,
            self.path / "models",
            self.path / "similarity",
            *(self.path / "checkpoints").glob("*"),
        ):
            if folder.is_dir():
                for draft in folder.glob(f"{DRAFT}*"):
                    shutil.rmtree(draft, ignore_errors=True) if draft.is_dir() else draft.unlink(missing_ok=True)


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line: dict[str, Any] = json.loads(text)
        return line if isinstance(line, dict) and {"training", "step"} <= line.keys() else None
    except ValueError:  # the last line of a killed process may be cut short
        return None
