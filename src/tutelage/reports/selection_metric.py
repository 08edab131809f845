"""The metric by which a run selects its weights; pages show it in the place of accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

METRIC_LABELS = {
    "accuracy": "accuracy", "f1": "F1, x100", "matthews": "Matthews, x100", "spearman": "Spearman, x100",
    "pearson": "Pearson, x100",
}  # fmt: skip
"""By the name in a summary."""


def metric_of(summary: Mapping[str, Any]) -> str:
    """The name of a run's metric."""
    return str(summary.get("metric", "accuracy"))


def metric_label(summary: Mapping[str, Any]) -> str:
    """A run's metric, for use in a sentence."""
    return METRIC_LABELS.get(metric_of(summary), metric_of(summary)).partition(",")[0]


def metric_labels(summaries: Iterable[Mapping[str, Any]]) -> str:
    """The metrics of several runs, each once."""
    return " and ".join(dict.fromkeys(metric_label(summary) for summary in summaries))


def with_accuracy(record: Any, metric: str) -> Any:
    """The record with the metric under ``accuracy`` too, wherever it holds the metric; ``tasks`` stay as they are."""
    if metric == "accuracy" or not isinstance(record, Mapping | list):
        return record
    if isinstance(record, list):
        return [with_accuracy(item, metric) for item in record]
    copied = {key: value if key == "tasks" else with_accuracy(value, metric) for key, value in record.items()}
    return copied | ({"accuracy": copied[metric]} if metric in copied else {})
