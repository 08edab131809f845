"""Reading run directories. Each file is checked; an error names the file and what to do.

:class:`RunDirectoryError`: a run is not finished, or a file is missing or cannot be read.
:class:`DataError`: a file is not what its command writes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tutelage.errors import DataError, RunDirectoryError
from tutelage.reports.results import metric_of, with_accuracy
from tutelage.reports.schemas import (
    GenerationsFile,
    JudgementFile,
    MetricsLine,
    MultistageSummary,
    RunSummary,
    SamplesFile,
    SearchFile,
    SimilarityFile,
)
from tutelage.safe_yaml import load_yaml

COPY_ALL = "a report needs the complete run directory: copy all of it"


@dataclass(frozen=True)
class Record:
    """A folder that a page is about.

    Attributes:
        label: its name on the page: that of its folder, or the path where two folders have the same name.
        path: the folder.
        config: the text of ``config.yaml``.
    """

    label: str
    path: Path
    config: str


@dataclass(frozen=True)
class RunRecord(Record):
    """A finished run.

    Attributes:
        summary: of ``summary.json``.
        metrics: the lines of ``metrics.jsonl``.
        similarity: class similarities by model; empty where the run has no such files.
        samples: single samples of the test split with the logits of teacher and students.
        generations: texts by teacher and students, where they are language models.
        judgements: of the student's answers, by judge models.
    """

    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    similarity: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, Any] | None = None
    generations: dict[str, Any] | None = None
    judgements: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def settings(self) -> dict[str, Any] | None:
        """The settings in ``config.yaml``; ``None`` where it is no mapping. Pages show its text anyway."""
        try:
            settings = load_yaml(self.config)[0]
        except (yaml.YAMLError, ValueError, RecursionError):
            return None
        return settings if isinstance(settings, dict) else None

    @property
    def arms(self) -> list[str]:
        """``baseline``, where it was trained, and ``distilled``."""
        return [arm for arm in ("baseline", "distilled") if self.summary["students"][arm]]


@dataclass(frozen=True)
class MultistageRecord(Record):
    """A finished multi-stage run: its ``summary.json``."""

    summary: dict[str, Any]


@dataclass(frozen=True)
class JudgementRecord(Record):
    """A finished ``tutelage judge``: its ``judged.json``."""

    judgement: dict[str, Any]


@dataclass(frozen=True)
class SearchRecord:
    """A finished search.

    Attributes:
        label: the name of the folder.
        path: the folder.
        search: of ``search.json``.
        best_recipe: the text of ``best.yaml``.
    """

    label: str
    path: Path
    search: dict[str, Any]
    best_recipe: str

    @property
    def runs(self) -> list[Path]:
        """The run directories in it that were measured on the test split."""
        return [self.path / name for name in (["default"] if self.search["same"] else ["default", "chosen"])]

    @property
    def best_trial(self) -> dict[str, Any]:
        """The chosen trial."""
        return next(t for t in self.search["trials"] if t["number"] == self.search["best"])


def is_search(path: Path) -> bool:
    """Whether a finished search is in ``path``."""
    return (path / "search.json").is_file()


def read_search(path: Path) -> SearchRecord:
    """The search in ``path``."""
    remedy = "remove it and run again with --resume: finished trials are kept, and the file is written again"
    search = read_json(path / "search.json", SearchFile, remedy)
    return SearchRecord(path.resolve().name, path, search, read_text(path / "best.yaml"))


def read_records(paths: Sequence[Path]) -> list[Record]:
    """The runs, multi-stage runs and judgements in ``paths``, each once."""
    folders = list({Path(p).resolve(): Path(p) for p in paths}.values())
    if not folders:
        raise DataError("no run directory is given", remedy="name one or several, as in runs/digits")
    names = [_name(p.resolve()) for p in folders]
    return [
        _read_record(p, name if names.count(name) == 1 else str(p)) for p, name in zip(folders, names, strict=True)
    ]


def _name(path: Path) -> str:
    """The name of a folder, with that of the search that it belongs to."""
    return f"{path.parent.name}/{path.name}" if is_search(path.parent) else path.name


def _read_record(path: Path, label: str) -> Record:
    if not path.is_dir():
        raise RunDirectoryError("there is no such run directory", where=str(path), remedy="check the path")
    judgement_remedy = "remove the file: the page then leaves out this judgement"
    if (path / "judged.json").is_file():
        judgement = read_json(path / "judged.json", JudgementFile, judgement_remedy)
        return JudgementRecord(label, path, read_text(path / "config.yaml"), judgement)
    if not (path / "summary.json").exists():
        raise _no_summary(path)
    config, summary = read_text(path / "config.yaml"), _read_summary(path / "summary.json")
    if "workflow" in summary:
        return MultistageRecord(label, path, config, summary)

    def optional(name: str, schema: type[BaseModel], what: str) -> dict[str, Any] | None:
        file = path / "samples" / name
        return (
            read_json(file, schema, f"remove the file: the page then leaves out {what}") if file.is_file() else None
        )

    similarity_remedy = "remove the file: the page then leaves out the class similarities of this model"
    similarities = sorted((path / "similarity").glob("[!.]*.json"))
    judgements = sorted((path / "judged").glob("[!.]*.json"))
    return RunRecord(
        label, path, config, summary,
        metrics=_read_metrics(path / "metrics.jsonl", metric_of(summary)),
        similarity={file.stem: read_json(file, SimilarityFile, similarity_remedy) for file in similarities},
        samples=optional("test.json", SamplesFile, "single samples"),
        generations=optional("written.json", GenerationsFile, "the models' texts"),
        judgements=[read_json(file, JudgementFile, judgement_remedy) for file in judgements],
    )  # fmt: skip


def _no_summary(path: Path) -> RunDirectoryError:
    if (path / "lab.json").exists():
        what, remedy = "is a lab, which has its own page: lab.html", f"leave it out, or name its arms: {path}/arms/*"
    elif not (path / "config.yaml").exists():
        what = "is not a run directory: it has no config.yaml and no summary.json"
        remedy = "name the folder that `tutelage run` wrote"
    else:
        what = "has no summary.json: the run is not finished"
        remedy = f"finish the run with --resume (and --out {path}), then report"
    return RunDirectoryError(what, where=str(path), remedy=remedy)


def read_text(file: Path) -> str:
    """The text of a file of a run."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunDirectoryError("is missing", where=str(file), remedy=COPY_ALL) from None
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text ({error.reason})", where=str(file), remedy=COPY_ALL) from None
    except OSError as error:
        remedy = "check the file and its permissions"
        raise RunDirectoryError(f"cannot be read: {error.strerror}", where=str(file), remedy=remedy) from error


def read_json(file: Path, schema: type[BaseModel], remedy: str) -> dict[str, Any]:
    """The JSON of a file, checked against a schema, with its defaults."""
    return _check(_load(file, remedy), schema, file, remedy).model_dump()


def _load(file: Path, remedy: str) -> Any:
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"is not JSON ({error})", where=str(file), remedy=remedy) from None


def _check(raw: Any, schema: type[BaseModel], file: Path, remedy: str) -> BaseModel:
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{key}: {first['msg']}", where=str(file), remedy=remedy) from None


def _read_summary(file: Path) -> dict[str, Any]:
    remedy = "remove it and run again with --resume: trained models are kept, and the summary is written again"
    raw = _load(file, remedy)
    is_object = isinstance(raw, dict)
    summary: dict[str, Any] = with_accuracy(raw, metric_of(raw)) if is_object else raw
    schema = MultistageSummary if is_object and "workflow" in summary else RunSummary
    return _check(summary, schema, file, remedy).model_dump()


def _read_metrics(file: Path, metric: str) -> list[dict[str, Any]]:
    texts = read_text(file).split("\n")
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = with_accuracy(json.loads(text), metric)
            MetricsLine.model_validate(line)
        except ValueError as error:
            if number == len(texts):  # a killed process leaves its last line without the line break
                break
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise DataError(
                f"is not a line of metrics ({reason})",
                where=f"{file}, line {number}",
                remedy="remove the line: only its points are lost",
            ) from None
        lines.append(line)
    return lines
