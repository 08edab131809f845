"""Reading run directories: every file checked, every fault named with its remedy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tutelage.errors import DataError, RunDirectoryError
from tutelage.reports.metric import judged, judged_line, metric_of
from tutelage.reports.samples import JUDGED, judged_of, judgement_of, samples_of, written_of

COPY_WHOLE = "a report needs the whole run directory: copy all of it"


@dataclass(frozen=True)
class Run:
    """What a finished run left.

    Attributes:
        label: what the page calls it: the folder's name, or its path where two folders have the same name.
        path: the run directory.
        summary: of ``summary.json``.
        metrics: the lines of ``metrics.jsonl``.
        config: the text of ``config.yaml``.
        similarity: how alike the classes are to each model, by its name; empty in runs before there was such a file.
        samples: what teacher and students say of single samples of the test split.
        written: what they go on with, where they are language models.
        judged: what judges said of the student's answers.
    """

    label: str
    path: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    config: str
    similarity: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, Any] | None = None
    written: dict[str, Any] | None = None
    judged: list[dict[str, Any]] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        """``baseline`` (where it was trained) and ``distilled``."""
        return [arm for arm in ("baseline", "distilled") if arm in self.summary["students"]]


@dataclass(frozen=True)
class Series:
    """What a finished workflow of several runs left.

    Attributes:
        label: as of :class:`Run`.
        path: its folder.
        summary: of ``summary.json``.
        config: the text of ``config.yaml``.
    """

    label: str
    path: Path
    summary: dict[str, Any]
    config: str


@dataclass(frozen=True)
class Judgement:
    """What ``tutelage judge`` left.

    Attributes:
        label: as of :class:`Run`.
        path: its folder.
        found: of ``judged.json``.
        config: the text of ``config.yaml``.
    """

    label: str
    path: Path
    found: dict[str, Any]
    config: str


def read_runs(paths: Sequence[Path]) -> list[Run | Series | Judgement]:
    """The runs, the workflows and the judgements in ``paths``, each once.

    Raises:
        RunDirectoryError: there is none, it is not finished, or a file of it is missing.
        DataError: no path is given, or a file is not what a run writes.
    """
    folders = list({Path(p).resolve(): Path(p) for p in paths}.values())
    if not folders:
        raise DataError("no run directory is given", remedy="name one or several, as in runs/digits")
    names = [_name(p.resolve()) for p in folders]
    return [_read_run(p, name if names.count(name) == 1 else str(p)) for p, name in zip(folders, names, strict=True)]


def _name(path: Path) -> str:
    """A folder's name; of one within a search, with that of the search."""
    return f"{path.parent.name}/{path.name}" if (path.parent / "search.json").is_file() else path.name


def _read_run(path: Path, label: str) -> Run | Series | Judgement:
    if not path.is_dir():
        raise RunDirectoryError("there is no such run directory", where=str(path), remedy="check the path")
    if (path / JUDGED).is_file():
        return Judgement(label, path, judgement_of(path), read_text(path / "config.yaml"))
    if not (path / "summary.json").exists():
        if (path / "lab.json").exists():
            raise RunDirectoryError(
                "is a lab, which has a page of its own: lab.html",
                where=str(path),
                remedy=f"leave it out, or name its arms: {path}/arms/*",
            )
        if not (path / "config.yaml").exists():
            raise RunDirectoryError(
                "is not a run directory: it has no config.yaml and no summary.json",
                where=str(path),
                remedy="name the folder that `tutelage run` wrote",
            )
        raise RunDirectoryError(
            "has no summary.json: the run is not finished",
            where=str(path),
            remedy=f"go on with --resume (and --out {path}), then report",
        )
    summary = _read_summary(path / "summary.json")
    if "workflow" in summary:
        return Series(label, path, summary, read_text(path / "config.yaml"))
    return Run(
        label=label,
        path=path,
        summary=summary,
        metrics=_read_metrics(path / "metrics.jsonl", metric_of(summary)),
        config=read_text(path / "config.yaml"),
        similarity={file.stem: _read_similarity(file) for file in sorted((path / "similarity").glob("[!.]*.json"))},
        samples=samples_of(path),
        written=written_of(path),
        judged=judged_of(path),
    )


def read_text(file: Path) -> str:
    """The text of a file of a run.

    Raises:
        RunDirectoryError: it is missing, or cannot be read.
        DataError: it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunDirectoryError("is missing", where=str(file), remedy=COPY_WHOLE) from None
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text ({error.reason})", where=str(file), remedy=COPY_WHOLE) from None
    except OSError as error:
        raise RunDirectoryError(
            f"cannot be read: {error.strerror}", where=str(file), remedy="check the file and its permissions"
        ) from error


def _read_summary(file: Path) -> dict[str, Any]:
    again = "remove it and go on with --resume: the run's trainings are kept, and the summary is written again"
    try:
        found: dict[str, Any] = json.loads(read_text(file))
    except ValueError as error:
        raise DataError(f"is not JSON ({error})", where=str(file), remedy=again) from None
    found = judged(found) if isinstance(found, dict) else found
    try:
        (WorkflowSummary if isinstance(found, dict) and "workflow" in found else Summary).model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(k) for k in first["loc"]) or "the file"
        raise DataError(f"{key}: {first['msg']}", where=str(file), remedy=again) from None
    return found


def _read_metrics(file: Path, metric: str) -> list[dict[str, Any]]:
    texts = read_text(file).split("\n")
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            line = judged_line(line, metric) if isinstance(line, dict) else line
            Line.model_validate(line)
        except ValueError as error:
            if number == len(texts):  # a killed process cuts its last line short, before the line break
                break
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise DataError(
                f"is not a line of metrics ({why})",
                where=f"{file}, line {number}",
                remedy="remove the line: only its points are lost",
            ) from None
        lines.append(line)
    return lines


def _read_similarity(file: Path) -> dict[str, Any]:
    try:
        found = Similarity.model_validate_json(read_text(file))
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise DataError(
            f"is not what a run writes ({why})",
            where=str(file),
            remedy="remove the file: the page then says nothing of what this model finds alike",
        ) from None
    return found.model_dump()


# What a report relies on ---------------------------------------------------------------------------


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Spread(_Part):
    """A figure over seeds."""

    mean: float
    std: float | None = None
    values: list[float]


class Figures(_Part):
    """What was measured of the students of an arm, at one choice of weights."""

    accuracy: Spread
    loss: Spread | None = None
    agreement: Spread | None = None
    kl: Spread | None = None
    ece: Spread | None = None


class Bins(_Part):
    """A reliability diagram."""

    count: list[float]
    confidence: list[float]
    accuracy: list[float]


class Other(_Part):
    """A model that was trained beside the student: a peer, or an exit of it."""

    parameters: int
    best: Figures
    last: Figures


class Row(_Part):
    """An arm: the baseline student, or distilled."""

    best: Figures
    last: Figures
    reliability: Bins | None = None
    per_class: list[float] | None = None
    seconds: Spread | None = None
    others: dict[str, Other] | None = None


class Students(_Part):
    """The arms of a run."""

    alone: Row | None = None
    distilled: Row


class Scores(_Part):
    """What was measured of the teacher on a split."""

    accuracy: float
    loss: float | None = None
    ece: float | None = None


class Member(_Part):
    """A teacher of several."""

    name: str
    weight: float
    parameters: int
    test: Scores
    validation: Scores | None = None


class Ensemble(_Part):
    """Of which teachers the teacher is made."""

    combine: str
    weights: str
    routed: bool
    members: list[Member]


class Teacher(Scores):
    """The teacher."""

    n: int | None = None
    reliability: Bins | None = None
    per_class: list[float] | None = None
    validation: Scores | None = None
    ensemble: Ensemble | None = None


class Sizes(_Part):
    """Numbers of parameters."""

    teacher: int | None = None
    student: int


class Speed(_Part):
    """Milliseconds of a forward pass."""

    p50_ms: float
    p95_ms: float | None = None


class Pair(_Part):
    """A paired difference over seeds."""

    mean: float
    low: float | None = None
    high: float | None = None
    level: float
    n: int


class Summary(_Part):
    """``summary.json``: what of it a report reads."""

    name: str
    formula: str | None = None
    taught: bool = True
    classes: list[str] | None = None
    seeds: list[int]
    parameters: Sizes
    capacity_ratio: float | None = None
    latency: dict[str, Speed] | None = None
    teacher: Teacher | None = None
    remote_teacher: dict[str, Any] | None = None
    """What is known of a teacher behind a server, which is not measured."""
    students: Students
    gain: dict[str, Pair] | None = None
    tasks: dict[str, dict[str, dict[str, float]]] | None = None
    """Of each model and task of lm-evaluation-harness the metrics, by name."""
    device: str | None = None
    processes: int | None = None
    exported: str | None = None

    @model_validator(mode="after")
    def _of_teacher(self) -> Summary:
        if self.teacher is not None and (self.parameters.teacher is None or self.capacity_ratio is None):
            raise ValueError("there is a teacher, and 'parameters.teacher' or 'capacity_ratio' is missing")
        if self.teacher is None and self.remote_teacher is None and self.taught:
            raise ValueError("'teacher' is missing")
        return self


class Shown(_Part):
    """What was measured of a line of a workflow's table, at one choice of weights."""

    accuracy: Spread
    loss: Spread | None = None
    agreement: Spread | None = None
    ece: Spread | None = None


class Against(_Part):
    """A line against another."""

    best: Pair
    last: Pair


class WorkflowRow(_Part):
    """A line of a workflow's table."""

    name: str
    role: str
    parameters: int
    best: Shown
    last: Shown
    taught_by: str | None = None
    step: int | None = None
    validation: Spread | None = None
    against: dict[str, Against]


class WorkflowSummary(_Part):
    """``summary.json`` of a workflow: what of it a report reads."""

    workflow: str
    name: str
    verdict: str
    seeds: list[int]
    rows: list[WorkflowRow]
    stages: list[str]
    exported: str


class Term(_Part):
    """A term of the loss."""

    raw: float
    weighted: float


class Line(_Part):
    """A line of ``metrics.jsonl``."""

    training: str
    step: int
    epoch: float
    loss: float | None = None
    terms: dict[str, Term] | None = None
    validation: Scores | None = None


class Similarity(_Part):
    """``similarity/NAME.json``: by temperature, the upper triangle of ``E[p_i p_j]``, row by row."""

    classes: int = Field(ge=0)
    n: int
    sim: dict[str, list[float]]

    @model_validator(mode="after")
    def _whole(self) -> Similarity:
        if any(len(upper) != self.classes * (self.classes + 1) // 2 for upper in self.sim.values()):
            raise ValueError(f"a triangle is not of {self.classes} classes")
        if not all(_temperature(t) for t in self.sim):
            raise ValueError("a temperature is not a number above zero")
        return self


def _temperature(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
