"""The run directory: every file that a report or a resumed run needs, written so that a crash loses nothing.

::

    config.yaml     the resolved recipe
    metrics.jsonl   one line for each log point and evaluation of every training
    summary.json    the figures; written at the end
    report.html     the same as a page
    student/        the exported student
    models/         each finished training's model and its result
    similarity/     class similarities of the teacher and of each finished model
    samples/        single samples of the test split, with predictions of teacher and students
    judged/         answers of the student with their judgements
    checkpoints/    the last checkpoints of each training
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.errors import RunDirectoryError
from tutelage.files import TEMPORARY_PREFIX, atomic_folder, wrap_write_errors, write_text


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        self.config, self.summary, self.metrics = (
            self.path / name for name in ("config.yaml", "summary.json", "metrics.jsonl")
        )

    def checkpoints(self, training: str) -> Path:
        """Folder of a training's checkpoints."""
        return self.path / "checkpoints" / training

    def keep_decision(self, what: str, now: bool) -> bool:
        """The stored decision ``what``; without one ``now``, which is stored. A resumed run computes the same."""
        path = self.path / "decisions.json"
        known: dict[str, bool] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if what not in known and self.writes:
            write_text(path, json.dumps({**known, what: now}, indent=1) + "\n")
        return known.get(what, now)

    def model(self, training: str) -> Path:
        """Folder of a finished training's model."""
        return self.path / "models" / training

    def similarity(self, training: str) -> Path:
        """The class similarities of a finished training's model."""
        return self.path / "similarity" / f"{training}.json"

    def samples(self, kind: str) -> Path:
        """Single samples of the test split, with predictions of teacher and students."""
        return self.path / "samples" / f"{kind}.json"

    def judged(self, name: str) -> Path:
        """A judgement of the run's student."""
        return self.path / "judged" / f"{name}.json"

    def export(self, model: Path) -> None:
        """Make the finished model in that folder the run's student."""
        with atomic_folder(self.path / "student") as folder:
            shutil.copytree(model, folder, ignore=shutil.ignore_patterns("result.json"), dirs_exist_ok=True)

    def result(self, training: str) -> dict[str, Any] | None:
        """The result of a finished training; ``None`` before that."""
        path = self.model(training) / "result.json"
        if not path.exists():
            return None
        try:
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunDirectoryError(
                f"is damaged: {error}",
                where=str(path),
                remedy=f"delete {path.parent}; --resume then trains this model again",
            ) from None
        return result

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to the metrics."""
        if self.writes:
            with wrap_write_errors(self.metrics):
                self.path.mkdir(parents=True, exist_ok=True)
                with open(self.metrics, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")

    def rewind(self, training: str, step: int) -> None:
        """Remove a training's lines after ``step``, before it continues from there."""
        if self.writes and self.metrics.exists():
            lines = [
                text
                for text in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
                if (line := _parsed(text)) is not None and not (line["training"] == training and line["step"] > step)
            ]
            write_text(self.metrics, "".join(text + "\n" for text in lines))

    def sweep(self) -> None:
        """Remove partial files of a killed process."""
        parts = (self.path / name for name in (".", "models", "similarity", "samples", "judged"))
        for folder in (*parts, *(self.path / "checkpoints").glob("*")):
            if folder.is_dir():
                for draft in folder.glob(f"{TEMPORARY_PREFIX}*"):
                    shutil.rmtree(draft, ignore_errors=True) if draft.is_dir() else draft.unlink(missing_ok=True)


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line: dict[str, Any] = json.loads(text)
        return line if isinstance(line, dict) and {"training", "step"} <= line.keys() else None
    except ValueError:  # the last line of a killed process may be cut short
        return None
