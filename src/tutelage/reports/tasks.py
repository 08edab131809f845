"""The part of the page on tasks of lm-evaluation-harness: what teacher and students score by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tutelage.reports.parts import role, table
from tutelage.reports.read import Run
from tutelage.reports.wording import called, escaped, percent_spread, plain_spread

SHARES = ("acc", "acc_mutual_info", "acc_norm", "em", "exact_match", "f1", "mc1", "mc2")
"""Metrics that are shares of one, and shown in per cent."""

NOTE = (
    "Of single models: the teacher, the exported student, and the one trained alone under its seed. "
    "± is the standard error over a task's questions, as the harness gives it."
)


def by_tasks(runs: Sequence[Run]) -> str:
    """The section; empty where no run was scored by tasks."""
    shown = "".join(_of_run(run, len(runs) > 1) for run in runs)
    if not shown:
        return ""
    return f"<section><h2>Tasks of lm-evaluation-harness</h2>{shown}<p class='note'>{escaped(NOTE)}</p></section>"


def _of_run(run: Run, several: bool) -> str:
    found: Mapping[str, Mapping[str, Mapping[str, float]]] = run.summary.get("tasks") or {}
    names = {who: name for who, name in called(run.summary).items() if who in found}
    keys = dict.fromkeys(
        (task, metric)
        for who in names
        for task, metrics in found[who].items()
        for metric in metrics
        if not metric.partition(",")[0].endswith("_stderr")
    )
    rows = [
        [escaped(task), escaped(metric), *(escaped(_score(found[who].get(task, {}), metric)) for who in names)]
        for task, metric in keys
    ]
    if not rows:
        return ""
    shown = table(f"Scores{f' of {run.label}' if several else ''}", ["Task", "Metric", *names.values()], rows)
    for name in names.values():
        shown = shown.replace(f"<th scope='col'>{escaped(name)}</th>", f"<th scope='col'>{role(name)}</th>")
    return shown


def _score(metrics: Mapping[str, float], metric: str) -> str:
    """A metric, such as ``acc`` or ``exact_match,strict-match``, with its standard error."""
    name, comma, way = metric.partition(",")
    value = (
        None if metric not in metrics else {"mean": metrics[metric], "std": metrics.get(f"{name}_stderr{comma}{way}")}
    )
    return percent_spread(value) if name in SHARES else plain_spread(value)
