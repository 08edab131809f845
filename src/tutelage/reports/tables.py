"""Tables of the page on runs: results, differences between runs, costs and benchmark tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from tutelage.errors import DataError
from tutelage.reports.formatting import (
    ABSENT,
    count,
    duration,
    file_size,
    interval,
    milliseconds,
    percent,
    percent_spread,
    plain_spread,
    points,
)
from tutelage.reports.results import (
    BASELINE,
    DISTILLED,
    NEEDS_TEACHER,
    TEACHER,
    WITH_METHOD,
    final_table,
    model_names,
)
from tutelage.reports.run_files import RunRecord
from tutelage.reports.selection_metric import metric_label, metric_labels, metric_of

COLUMNS = {
    "accuracy": "Accuracy, best on validation",
    "last": "Accuracy, last epoch",
    "agreement": "Agreement with teacher",
    "kl": "KL to teacher, nats",
    "ece": "ECE",
    "loss": "Loss, nats",
    "parameters": "Parameters",
    "latency": "Latency, p50",
    "seconds": "Training time",
}
SWATCHES = {TEACHER: "teacher", BASELINE: "baseline", DISTILLED: "distilled", WITH_METHOD: "distilled"}
FRACTIONS = ("acc", "acc_mutual_info", "acc_norm", "em", "exact_match", "f1", "mc1", "mc2")
"""Metrics of lm-evaluation-harness that are fractions of one; they are shown in per cent."""


@dataclass(frozen=True)
class Cell:
    """A cell that is more than its text.

    Attributes:
        text: of the cell.
        swatch: the role whose colour stands before the text.
        note: small text below.
        rank: small number after the text.
        href: address of the link around the text.
        breaks_at_dots: a line may break after each dot.
    """

    text: str
    swatch: str = ""
    note: str = ""
    rank: int | None = None
    href: str = ""
    breaks_at_dots: bool = False


Row: TypeAlias = Sequence[str | Cell]


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its header. ``kind`` holds CSS classes."""

    caption: str
    columns: Row
    rows: Sequence[Row]
    kind: str = ""


def model_cell(name: str) -> Cell:
    """The name of a model after the mark of its role."""
    return Cell(name, SWATCHES.get(name, "teacher" if name.startswith(TEACHER) else "other"))


def result_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """The final table of each run."""
    tables = []
    for run in runs:
        has_teacher, label = run.summary.get("teacher"), metric_label(run.summary)
        keys = [key for key in COLUMNS if has_teacher or key not in NEEDS_TEACHER]
        columns = [COLUMNS[key] for key in keys]
        if metric_of(run.summary) != "accuracy":
            columns = [column.replace("Accuracy", label) for column in columns]
        rows: list[Row] = [[model_cell(row["name"]), *(row[key] for key in keys)] for row in final_table(run.summary)]
        caption = "Results" if len(runs) == 1 else f"Results of {run.label}"
        tables.append(Table(caption, ["Model", *columns], rows))
    return tables


def comparison_table(runs: Sequence[RunRecord]) -> Table:
    """Several runs in one table."""
    columns = ["Run", "Teacher", "Baseline", "Distilled", "Gain, points", "Interval", "Agreement with teacher",
               "Of the teacher's parameters", "Latency, p50"]  # fmt: skip
    rows = []
    for run in runs:
        summary, students = run.summary, run.summary["students"]
        gain = (summary.get("gain") or {}).get("best")
        rows.append([
            run.label,
            percent((summary.get("teacher") or {}).get("accuracy")),
            percent_spread(students["baseline"]["best"]["accuracy"]) if "baseline" in students else ABSENT,
            percent_spread(students["distilled"]["best"]["accuracy"]),
            points(gain["mean"]) if gain else ABSENT,
            interval(gain) if gain else ABSENT,
            percent_spread(students["distilled"]["best"].get("agreement")),
            percent(summary.get("capacity_ratio")),
            speed_up(summary) or ABSENT,
        ])  # fmt: skip
    return Table(f"Runs, test {metric_labels(run.summary for run in runs)}", columns, rows)


def differing_settings(runs: Sequence[RunRecord]) -> Table | None:
    """The settings in which runs differ; ``None`` where a config is not valid YAML."""
    try:
        settings = [_flatten(yaml.safe_load(run.config)) for run in runs]
    except (yaml.YAMLError, ValueError, RecursionError):  # the page still shows each config as text
        return None
    keys = sorted({key for s in settings for key in s})
    rows: list[Row] = [
        [Cell(key, breaks_at_dots=True), *(s.get(key, ABSENT) for s in settings)]
        for key in keys
        if len({s.get(key, ABSENT) for s in settings}) > 1
    ]
    return Table("Settings that differ", ["Setting", *(run.label for run in runs)], rows, "text-cells")


def _flatten(value: Any, key: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        return {k: v for name, inner in value.items() for k, v in _flatten(inner, f"{key}.{name}".strip(".")).items()}
    return {key: yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()}


def speed_up(summary: Mapping[str, Any]) -> str:
    """``3.1 times faster``; empty where latency was not measured."""
    latency = summary.get("latency") or {}
    if "teacher" not in latency or "student" not in latency:
        return ""
    teacher, student = (latency[model]["p50_ms"] for model in ("teacher", "student"))
    if min(teacher, student) <= 0:
        return ""
    ratio = teacher / student
    if 0.95 < ratio < 1.05:
        return "as fast"
    return f"{ratio:.1f} times faster" if ratio > 1 else f"{1 / ratio:.1f} times slower"


def cost_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Parameters, size on disk, latency and training time of teacher and students.

    Raises:
        DataError: the result file of a teacher is damaged.
    """
    return [_cost_table(run, "Cost" if len(runs) == 1 else f"Cost: {run.label}") for run in runs]


def _cost_table(run: RunRecord, caption: str) -> Table:
    summary, names = run.summary, model_names(run.summary)
    has_teacher = summary.get("teacher") is not None
    roles = ["teacher", *run.arms] if has_teacher else run.arms
    latency = summary.get("latency") or {}

    def of_model(values: Mapping[str, Any]) -> dict[str, Any]:
        return {role: values.get("teacher" if role == "teacher" else "student") for role in roles}

    weights = {
        "teacher": _weight_bytes(run.path, "models/teacher*"),
        "baseline": _weight_bytes(run.path, f"models/baseline-seed{summary['seeds'][0]}"),
        "distilled": _weight_bytes(run.path, "student"),
    }
    training = {arm: (summary["students"][arm].get("seconds") or {}).get("mean") for arm in run.arms}
    lines: list[tuple[str, Mapping[str, Any], Callable[[Any], str]]] = [
        ("Parameters", of_model(summary["parameters"]), count),
        ("Weights on disk", weights, file_size),
        ("Latency, p50", of_model({model: (at or {}).get("p50_ms") for model, at in latency.items()}), milliseconds),
        ("Latency, p95", of_model({model: (at or {}).get("p95_ms") for model, at in latency.items()}), milliseconds),
        ("Training", {"teacher": _teacher_seconds(run.path), **training}, duration),
    ]
    rows = []
    for title, values, text in lines:
        cells = [text(values.get(role)) for role in roles]
        if has_teacher:
            teacher, student = values.get("teacher"), values.get("distilled")
            cells.append(percent(student / teacher) if teacher and student is not None else ABSENT)
        if any(values.get(role) is not None for role in roles):
            rows.append([title, *cells])
    columns: list[str | Cell] = ["", *(Cell(names[role], role) for role in roles)]
    columns += ["Of the teacher's"] if has_teacher else []
    return Table(caption, columns, rows, "narrow")


def _weight_bytes(run: Path, folders: str) -> int | None:
    """Bytes of the weights in folders of a run; ``None`` where there are none."""
    files = [file for folder in run.glob(folders) if folder.is_dir() for file in folder.glob("*.safetensors")]
    return sum(file.stat().st_size for file in files) if files else None


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


def task_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Scores of the runs that were evaluated on tasks of lm-evaluation-harness."""
    tables = [_task_table(run, "Scores" if len(runs) == 1 else f"Scores of {run.label}") for run in runs]
    return [table for table in tables if table.rows]


def _task_table(run: RunRecord, caption: str) -> Table:
    scores: Mapping[str, Mapping[str, Mapping[str, float]]] = run.summary.get("tasks") or {}
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
    return Table(caption, ["Task", "Metric", *(Cell(n, role) for role, n in names.items())], rows)


def _task_score(metrics: Mapping[str, float], metric: str) -> str:
    """A metric, such as ``acc`` or ``exact_match,strict-match``, with its standard error."""
    if metric not in metrics:
        return ABSENT
    name, comma, variant = metric.partition(",")
    score = {"mean": metrics[metric], "std": metrics.get(f"{name}_stderr{comma}{variant}")}
    return percent_spread(score) if name in FRACTIONS else plain_spread(score)
