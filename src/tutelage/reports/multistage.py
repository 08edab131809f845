"""A multi-stage run: its stages as a table and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tutelage.reports.formatting import ABSENT, count, interval, percent, percent_spread, points
from tutelage.reports.overview import seeds_text
from tutelage.reports.plotting import Figure, plot_text, row_axes, scatter
from tutelage.reports.result_figures import seed_marks
from tutelage.reports.run_files import MultistageRecord
from tutelage.reports.tables import Cell, Table

KINDS = {
    "born-again": "Generations of one architecture; each generation is the teacher of the next.",
    "assistant-chain": "From the teacher to the student through assistants of intermediate sizes.",
}
"""What a multi-stage run is."""

SWATCHES = {
    "teacher": "teacher", "baseline": "baseline", "control": "baseline", "direct": "distilled",
    "assistant": "distilled", "distilled": "distilled", "ensemble": "teacher",
}  # fmt: skip
"""The colour of each role."""


def multistage_facts(summary: Mapping[str, Any]) -> str:
    """Kind, seeds and exported student."""
    kind = KINDS.get(summary["workflow"], "")
    return f"{kind} {seeds_text(summary['seeds'])}; exported student: {summary['exported']}.".strip()


def _swatch(row: Mapping[str, Any]) -> str:
    return SWATCHES.get(row["role"], "teacher")


def stage_tables(record: MultistageRecord) -> list[Table]:
    """The metrics of each model, and the differences between models."""
    rows = [
        [
            Cell(row["name"], _swatch(row)),
            count(row["parameters"]),
            row["taught_by"] or ABSENT,
            percent_spread(row["best"]["accuracy"]),
            percent_spread(row["last"]["accuracy"]),
            percent_spread(row["validation"]),
            percent_spread(row["best"].get("agreement")),
            percent_spread(row["best"].get("ece")),
        ]
        for row in record.summary["rows"]
    ]
    columns = ["Model", "Parameters", "Teacher", "Accuracy, best on validation", "Accuracy, last epoch",
               "On validation", "Agreement with its teacher", "ECE"]  # fmt: skip
    tables = [Table(f"Results of {record.label}", columns, rows)]
    differences = [
        [
            f"{row['name']} over {other}",
            *(text for w in ("best", "last") for text in (points(pair[w]["mean"]), interval(pair[w]))),
        ]
        for row in record.summary["rows"]
        for other, pair in row["against"].items()
    ]
    if differences:
        heads = ["Difference", "Best on validation, points", "", "Last epoch, points", ""]
        tables.append(Table("Differences, paired by seed", heads, differences))
    return tables


def stage_figure(record: MultistageRecord) -> Figure:
    """Test accuracy of each seed and its mean; a row for each model."""
    rows, seeds = record.summary["rows"], record.summary["seeds"]
    data = []
    for swatch in dict.fromkeys(map(_swatch, rows)):
        of_swatch = [(i, row) for i, row in enumerate(rows) if _swatch(row) == swatch]
        marks = [
            (value, i, f"{plot_text(row['name'])}, seed {seed}")
            for i, row in of_swatch
            for seed, value in zip(seeds, row["best"]["accuracy"]["values"], strict=False)
        ]
        data += seed_marks(swatch, swatch, marks, [(row["best"]["accuracy"]["mean"], i) for i, row in of_swatch])
    chain = [(row["best"]["accuracy"]["mean"], i) for i, row in enumerate(rows) if row["role"] == "distilled"]
    if len(chain) > 1:
        line = {"color": "--rule", "width": 2}
        data.append(scatter("in order", [x for x, _ in chain], [y for _, y in chain], "lines", line=line,
                            hoverinfo="skip"))  # fmt: skip
    values = [v for trace in data for v in trace["x"]]
    names = [plot_text(row["name"], 22) for row in rows]
    layout = row_axes("accuracy on the test split", names, values, 90 + 40 * len(rows), 4)
    means = "; ".join(f"{row['name']}: {percent(row['best']['accuracy']['mean'])}" for row in rows)
    note = "A mark for each seed; the vertical stroke is their mean."
    return Figure(record.label, f"Test accuracy. {means}.", data, layout, note=note)
