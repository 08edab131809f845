"""What a run is judged by, where that is not accuracy."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

TITLES = {
    "accuracy": "accuracy", "f1": "F1, x100", "matthews": "Matthews, x100", "spearman": "Spearman, x100",
    "pearson": "Pearson, x100",
}  # fmt: skip
"""By the name that a summary gives."""


def metric_of(summary: Mapping[str, Any]) -> str:
    """The name of what a run is judged by."""
    return str(summary.get("metric", "accuracy"))


def named(summary: Mapping[str, Any]) -> str:
    """What a run is judged by, in a sentence."""
    return TITLES.get(metric_of(summary), metric_of(summary)).partition(",")[0]


def judged_by(summaries: Iterable[Mapping[str, Any]]) -> str:
    """What several runs are judged by."""
    return " and ".join(dict.fromkeys(named(summary) for summary in summaries))


def judged(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary with its metric in the place of accuracy, where a report looks for the figure that counts."""
    metric = metric_of(summary)
    if metric == "accuracy":
        return dict(summary)
    found: dict[str, Any] = copy.deepcopy(dict(summary))

    def place(scores: Any) -> None:
        if isinstance(scores, dict) and metric in scores:
            scores["accuracy"] = scores[metric]

    teacher = found.get("teacher")
    if isinstance(teacher, dict):
        for member in (teacher.get("ensemble") or {}).get("members", []):
            place(member.get("test"))
            place(member.get("validation"))
        place(teacher)
        place(teacher.get("validation"))
    for arm in (found.get("students") or {}).values():
        for row in (arm, *(arm.get("others") or {}).values()):
            place(row.get("best"))
            place(row.get("last"))
    return found


def judged_line(line: dict[str, Any], metric: str) -> dict[str, Any]:
    """A line of metrics, likewise."""
    scores = line.get("validation")
    if not isinstance(scores, dict) or metric not in scores:
        return line
    return {**line, "validation": {**scores, "accuracy": scores[metric]}}
