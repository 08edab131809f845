"""Differences between the settings of runs, the cost of their models, and their scores on benchmark tasks."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tutelage.errors import DataError
from tutelage.reports.formatting import (
    ABSENT,
    count,
    duration,
    file_size,
    milliseconds,
    percent,
    percent_spread,
    plain_spread,
)
from tutelage.reports.results import model_names
from tutelage.reports.run_files import RunRecord

FRACTIONS = ("acc", "acc_mutual_info", "acc_norm", "em", "exact_match", "f1", "mc1", "mc2")
"""Metrics of lm-evaluation-harness that are fractions of one; they are shown in per cent."""


class ModelRows(NamedTuple):
    """Rows of a table with a column for each model (name, role) of a run."""

    label: str
    models: list[tuple[str, str]]
    has_teacher: bool
    rows: list[list[str]]


def differing_settings(runs: Sequence[RunRecord]) -> dict[str, list[str]] | None:
    """The values of each run by the keys in which runs differ; ``None`` where a config is not valid YAML."""
    settings = [_flatten(run.settings) for run in runs if run.settings is not None]
    if len(settings) < len(runs):
        return None
    values = {key: [s.get(key, ABSENT) for s in settings] for key in sorted({key for s in settings for key in s})}
    return {key: of_runs for key, of_runs in values.items() if len(set(of_runs)) > 1}


def _flatten(value: Any, key: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        return {k: v for name, inner in value.items() for k, v in _flatten(inner, f"{key}.{name}".strip(".")).items()}
    return {key: yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()}


def cost_rows(run: RunRecord) -> ModelRows:
    """Parameters, size on disk, latency and training time of teacher and students.

    Raises:
        DataError: the result file of a teacher is damaged.
    """
    summary, names = run.summary, model_names(run.summary)
    has_teacher = summary["teacher"] is not None
    roles = ["teacher", *run.arms] if has_teacher else run.arms
    sizes, latency = summary["parameters"], summary["latency"] or {}

    def costs(role: str) -> list[float | None]:
        model = "teacher" if role == "teacher" else "student"
        if role == "teacher":
            training = _teacher_seconds(run.path)
        else:
            training = (summary["students"][role]["seconds"] or {}).get("mean")
        folders = {"teacher": "models/teacher*", "distilled": "student"}
        pattern = folders.get(role, f"models/{role}-seed{summary['seeds'][0]}")
        files = list(run.path.glob(f"{pattern}/*.safetensors"))
        weights = sum(file.stat().st_size for file in files) if files else None
        speed = latency.get(model) or {}
        return [sizes[model], weights, speed.get("p50_ms"), speed.get("p95_ms"), training]

    titles = {"Parameters": count, "Weights on disk": file_size, "Latency, p50": milliseconds,
              "Latency, p95": milliseconds, "Training": duration}  # fmt: skip
    rows = []
    for (title, text), values in zip(titles.items(), zip(*map(costs, roles), strict=True), strict=True):
        cells = [text(value) for value in values]
        if has_teacher:
            teacher, student = values[0], values[-1]
            cells.append(percent(student / teacher) if teacher and student is not None else ABSENT)
        if any(value is not None for value in values):
            rows.append([title, *cells])
    return ModelRows(run.label, [(names[role], role) for role in roles], has_teacher, rows)


def _teacher_seconds(run: Path) -> float | None:
    """Training time of the teacher, or of all teachers; ``None`` where the run trained none."""
    seconds: list[float] = []
    for file in sorted(run.glob("models/teacher*/result.json")):
        try:
            seconds.append(float(json.loads(file.read_text(encoding="utf-8"))["seconds"]))
        except (ValueError, LookupError, TypeError, OSError):
            raise DataError(
                "is damaged",
                where=str(file),
                remedy=f"delete {file.parent}, or copy the complete run directory again",
            ) from None
    return sum(seconds) if seconds else None


def task_rows(run: RunRecord) -> ModelRows:
    """Scores on tasks of lm-evaluation-harness; no rows where the run has none."""
    scores: Mapping[str, Mapping[str, Mapping[str, float]]] = run.summary["tasks"] or {}
    names = {role: name for role, name in model_names(run.summary).items() if role in scores}
    keys = dict.fromkeys(
        (task, metric)
        for role in names
        for task, metrics in scores[role].items()
        for metric in metrics
        if not metric.partition(",")[0].endswith("_stderr")
    )
    rows = [
        [task, metric, *(_task_score(scores[role].get(task, {}), metric) for role in names)] for task, metric in keys
    ]
    return ModelRows(run.label, [(name, role) for role, name in names.items()], "teacher" in names, rows)


def _task_score(metrics: Mapping[str, float], metric: str) -> str:
    """A metric, such as ``acc`` or ``exact_match,strict-match``, with its standard error."""
    if metric not in metrics:
        return ABSENT
    name, comma, variant = metric.partition(",")
    score = {"mean": metrics[metric], "std": metrics.get(f"{name}_stderr{comma}{variant}")}
    return percent_spread(score) if name in FRACTIONS else plain_spread(score)
