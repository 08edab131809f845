"""Figures of the test metrics of finished models, and the list of the figures of a run."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tutelage.reports.formatting import percent
from tutelage.reports.plotting import (
    ROLES,
    Figure,
    Json,
    axes,
    category_ticks,
    plot_text,
    row_axes,
    scatter,
    short,
)
from tutelage.reports.results import WITH_METHOD, metric_labels, short_names
from tutelage.reports.run_files import MultistageRecord, RunRecord
from tutelage.reports.training_curves import loss_curves, validation_curves

FEW = 10
"""A bin of the reliability diagram with fewer samples is unreliable itself."""


def seed_by_seed(runs: Sequence[RunRecord]) -> Figure:
    """The test metric of every student and of the teacher; a row for each run and arm."""
    rows = [(run, arm, short_names(run.summary)[arm]) for run in runs for arm in run.arms]
    results = [run.summary["students"][arm]["best"]["accuracy"] for run, arm, _ in rows]
    data: list[Json] = []
    for role in ("baseline", "distilled"):
        places = [i for i, (_, arm, _) in enumerate(rows) if arm == role]
        marks = [
            (value, i, f"{plot_text(rows[i][0].label)}, seed {seed}")
            for i in places
            for seed, value in zip(rows[i][0].summary["seeds"], results[i]["values"], strict=False)
        ]
        if marks:
            data += seed_marks(role, marks, [(results[i]["mean"], i) for i in places])
    for run in runs:
        mine = [i for i, row in enumerate(rows) if row[0] is run]
        if run.summary.get("teacher") is not None:
            stroke = [mine[0] - 0.4, mine[-1] + 0.4]
            data.append(scatter("teacher", [run.summary["teacher"]["accuracy"]] * 2, stroke, "lines", style="stroke",
                                role="teacher", legendgroup="teacher"))  # fmt: skip
    metric = metric_labels(run.summary for run in runs)
    names = [name if len(runs) == 1 else f"{plot_text(run.label, 18)}, {name}" for run, _, name in rows]
    values = [value for trace in data for value in trace["x"]]
    layout = row_axes(f"{metric} on the test split", names, values, 86 + 42 * len(rows), 5)
    by_row = "; ".join(
        f"{run.label}, {arm}: {', '.join(map(percent, result['values']))}"
        for (run, arm, _), result in zip(rows, results, strict=True)
    )
    roles = {arm for _, arm, _ in rows} | {"teacher" for run in runs if run.summary.get("teacher")}
    legend = {
        role: " or ".join(dict.fromkeys(short_names(run.summary)[role] for run in runs))
        for role in ROLES
        if role in roles
    }
    note = "A mark for each seed; the vertical stroke is their mean."
    return Figure("", f"Test {metric}, seed by seed. {by_row}.", data, layout, note=note, legend=legend)


def seed_marks(role: str, marks: Sequence[tuple[float, int, str]], means: Sequence[tuple[float, int]]) -> list[Json]:
    """A mark for each seed (value, row, text) and a stroke for each mean (value, row), in the colour of a role."""
    values, rows, texts = zip(*marks, strict=True)
    mean_values, mean_rows = zip(*means, strict=True)
    return [
        scatter(role, values, rows, style="seeds", role=role, customdata=list(texts)),
        scatter(f"mean {role}", mean_values, mean_rows, style="mean", role=role),
    ]


SWATCHES = {
    "teacher": "teacher", "baseline": "baseline", "control": "baseline", "direct": "distilled",
    "assistant": "distilled", "distilled": "distilled", "ensemble": "teacher",
}  # fmt: skip
"""The colour of each role."""


def stage_swatch(row: Mapping[str, Any]) -> str:
    """The role whose colour a row has."""
    return SWATCHES.get(row["role"], "teacher")


def stage_figure(record: MultistageRecord) -> Figure:
    """Test accuracy of each seed and its mean; a row for each model."""
    rows, seeds = record.summary["rows"], record.summary["seeds"]
    data = []
    for swatch in dict.fromkeys(map(stage_swatch, rows)):
        of_swatch = [(i, row) for i, row in enumerate(rows) if stage_swatch(row) == swatch]
        marks = [
            (value, i, f"{plot_text(row['name'])}, seed {seed}")
            for i, row in of_swatch
            for seed, value in zip(seeds, row["best"]["accuracy"]["values"], strict=False)
        ]
        data += seed_marks(swatch, marks, [(row["best"]["accuracy"]["mean"], i) for i, row in of_swatch])
    chain = [(row["best"]["accuracy"]["mean"], i) for i, row in enumerate(rows) if row["role"] == "distilled"]
    if len(chain) > 1:
        x, y = zip(*chain, strict=True)
        data.append(scatter("in order", x, y, "lines", style="chain"))
    values = [v for trace in data for v in trace["x"]]
    names = [plot_text(row["name"], 22) for row in rows]
    layout = row_axes("accuracy on the test split", names, values, 90 + 40 * len(rows), 4)
    means = "; ".join(f"{row['name']}: {percent(row['best']['accuracy']['mean'])}" for row in rows)
    note = "A mark for each seed; the vertical stroke is their mean."
    return Figure(record.label, f"Test accuracy. {means}.", data, layout, note=note)


def reliability(run: RunRecord) -> Figure | None:
    """Accuracy against confidence; a bar from each point to the diagonal is its miscalibration."""
    data = [scatter("calibrated", [0, 1], [0, 1], "lines", style="diagonal")]
    errors = []
    for role, name, result in _models(run):
        bins = result.get("reliability")
        if not bins or not any(bins["count"]):
            continue
        filled = [b for b in zip(bins["count"], bins["confidence"], bins["accuracy"], strict=False) if b[0] > 0]
        large = [b for b in filled if b[0] >= FEW]
        gaps = [confidence - accuracy for _, confidence, accuracy in large]
        bars = {"array": [short(max(gap, 0)) for gap in gaps], "arrayminus": [short(max(-gap, 0)) for gap in gaps]}
        more = {"mode": "lines+markers", "error_y": bars, "total": sum(bins["count"])}
        data.append(_bins("bins", role, name, large) | more)
        data.append(_bins("small bins", role, name, [b for b in filled if b[0] < FEW]))
        ece = result["ece"] if "ece" in result else (result.get("best") or {}).get("ece")
        errors.append(f"{name}: {percent(ece['mean'] if isinstance(ece, Mapping) else ece)}")
    if not errors:
        return None
    axis = {"range": [-0.02, 1.04], "tickformat": ".0%"}
    layout = axes("confidence", "accuracy", 420, xaxis=axis, yaxis=axis)
    note = (
        "The bar from a point to the diagonal is its miscalibration. A larger point holds more samples; a hollow one "
        f"holds fewer than {FEW}, too few to judge. First seed."
    )
    description = f"Reliability diagram. Expected calibration error: {'; '.join(errors)}."
    return Figure(run.label, description, data, layout, note=note, is_square=True)


def _bins(style: str, role: str, name: str, bins: Sequence[tuple[float, float, float]]) -> Json:
    """Bins (count, confidence, accuracy) as points."""
    return scatter(
        name, [short(confidence) for _, confidence, _ in bins], [short(accuracy) for _, _, accuracy in bins],
        style=style, role=role, legendgroup=role,
        customdata=[[int(n), abs(confidence - accuracy)] for n, confidence, accuracy in bins],
    )  # fmt: skip


def per_class(run: RunRecord) -> Figure | None:
    """Accuracy of each class; the weakest class of the distilled student first."""
    rows = [(role, name, result["per_class"]) for role, name, result in _models(run) if result.get("per_class")]
    if not rows:
        return None
    figure, weakest = _class_bars(run, rows, "accuracy on the test split")
    figure.description = f"Accuracy of each class. Weakest of {rows[-1][1]}: {weakest}."
    student = "distilled student" if run.summary.get("uses_teacher", True) else WITH_METHOD
    figure.note = f"Weakest class of the {student} first. First seed."
    return figure


def agreement(run: RunRecord) -> Figure | None:
    """How often each student predicts the teacher's class, by label; the class with the least agreement first."""
    samples = run.samples
    if samples is None or samples["reference"] != "teacher" or not any(samples["by_class"]["n"]):
        return None
    names, counts = short_names(run.summary), samples["by_class"]
    rows = [
        (arm, names[arm], [k / n if n else math.nan for k, n in zip(counts[arm], counts["n"], strict=True)])
        for arm in run.arms
        if arm in counts
    ]
    figure, least = _class_bars(run, rows, "agreement with the teacher")
    figure.description = f"Agreement with the teacher by class. Least of {rows[-1][1]}: {least}."
    figure.note = (
        "Share of the samples of each class, by label, on which student and teacher predict the same class, right or "
        f"wrong. Models: the exported student, {samples['exported']}"
        + (", and the baseline student of the same seed." if len(rows) > 1 else ".")
    )
    return figure


def _class_bars(run: RunRecord, rows: Sequence[tuple[str, str, Sequence[float]]], x: str) -> tuple[Figure, str]:
    """Bars of each class (role, name, values), the lowest of the last row first, and the text of that one."""
    total, last = min(len(values) for _, _, values in rows), rows[-1][2]
    order = sorted(range(total), key=lambda i: (math.isnan(last[i]), last[i]))
    known = run.summary.get("classes") or []
    classes = [known[i] if i < len(known) else f"class {i}" for i in order]
    data = [
        {
            "type": "bar", "style": "bars", "role": role, "name": name, "x": [short(values[i]) for i in order],
            "y": list(range(total)), "customdata": [plot_text(c, 80) for c in classes],
            "text": ["" if math.isnan(values[i]) else f"{100 * values[i]:.1f}" for i in order],
        }
        for role, name, values in rows
    ]  # fmt: skip
    yaxis = category_ticks([plot_text(c, 16) for c in classes]) | {"range": [total - 0.5, -0.5]}
    margin = {"l": 20 + 8 * min(16, max(map(len, classes), default=0)), "r": 16, "t": 8, "b": 50}
    layout = axes(x, "", 70 + total * (14 * len(rows) + 8), style="bars", yaxis=yaxis, margin=margin)
    lowest = f"{classes[0]}, {percent(last[order[0]])}" if classes else "none"
    legend = {role: name for role, name, _ in rows}
    return Figure(run.label, "", data, layout, scrolls=True, legend=legend), lowest


def _models(run: RunRecord) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Role, name and test metrics of each model."""
    students, teacher, names = run.summary["students"], run.summary.get("teacher"), short_names(run.summary)
    arms = [(arm, names[arm], students[arm]) for arm in run.arms]
    return arms if teacher is None else [("teacher", "teacher", teacher), *arms]


FIGURES: dict[str, Callable[[RunRecord], Figure | None]] = {
    "Validation {metric}": validation_curves,
    "Loss": loss_curves,
    "Calibration": reliability,
    "Accuracy by class": per_class,
    "Agreement with the teacher by class": agreement,
}
"""The figures of each run by their headings; ``{metric}`` stands for the metric that selects weights."""
