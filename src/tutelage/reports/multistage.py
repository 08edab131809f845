"""The figure of a multi-stage run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tutelage.reports.formatting import percent
from tutelage.reports.plotting import Figure, plot_text, row_axes, scatter
from tutelage.reports.result_figures import seed_marks
from tutelage.reports.run_files import MultistageRecord

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
