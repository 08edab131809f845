"""Tables of the figures that a task has beside the selecting metric: errors of regression, spans of tags."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tutelage.reports.formatting import plain, plain_spread
from tutelage.reports.results import TEACHER, model_names

KINDS = {
    "Errors": {"rmse": "RMSE", "mae": "MAE", "r2": "R²", "spearman": "Spearman", "pearson": "Pearson"},
    "Spans": {
        "accuracy": "Accuracy of words",
        "span_f1": "F1",
        "span_precision": "Precision",
        "span_recall": "Recall",
    },
}
"""Titles of columns by heading; a run has the table whose second figure it has."""


class TaskFigures(NamedTuple):
    """A table: its heading, the titles of its columns after the model's name, and its rows."""

    heading: str
    columns: list[str]
    rows: list[list[str]]


def task_figures(summary: Mapping[str, Any]) -> TaskFigures | None:
    """The table of a run; with several targets also a row for each, of the first seed. ``None`` without such figures.

    Errors are in the targets' units.
    """
    teacher, names = summary.get("teacher") or {}, model_names(summary)
    models: list[tuple[str, Mapping[str, Any], Any, Mapping[str, Any] | None]] = [
        (names[arm], result["best"], plain_spread, result.get("per_target"))
        for arm in ("baseline", "distilled")
        if (result := summary["students"].get(arm))
    ]
    if teacher:
        models.insert(0, (TEACHER, teacher, plain, teacher.get("per_target")))
    for heading, columns in KINDS.items():
        key = list(columns)[1]
        if any(figures.get(key) is None for _, figures, _, _ in models):
            continue
        rows = []
        for name, figures, text, targets in models:
            rows.append([name, *(text(figures.get(key)) for key in columns)])
            for i, target in enumerate(summary["classes"] if targets else []):
                rows.append([f"{name}, {target}", *(plain(targets[key][i]) for key in columns)])  # type: ignore[index]
        return TaskFigures(heading, list(columns.values()), rows)
    return None
