"""The run directory: all files that a report or a resumed run needs. docs/architecture.md lists them.

Each file is written atomically, or line by line, so that a crash loses nothing.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

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
        """The stored decision ``what``; if there is none, store ``now``. A resumed run gets the same decision."""
        path = self.path / "decisions.json"
        known: dict[str, bool] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if what not in known and self.writes:
            write_text(path, json.dumps({**known, what: now}, indent=1) + "\n")
        return known.get(what, now)

    def model(self, training: str) -> Path:
        """Folder of a finished training's model."""
        return self.path / "models" / training

    def json_file(self, kind: Literal["judged", "samples", "similarity"], name: str) -> Path:
        """A judgement of the student, samples of the test split, or the class similarities of a model."""
        return self.path / kind / f"{name}.json"

    def export(self, model: Path) -> None:
        """Copy the finished model in the folder ``model`` to the run's ``student``."""
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
        """Remove the incomplete files of a killed process."""
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
