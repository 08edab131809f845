"""A workflow of several runs: what came of it, row by row, as a table and a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tutelage.reports.panel import SYMBOL, Dots, Panel, axes, plot_text
from tutelage.reports.parts import figure, table
from tutelage.reports.read import Series
from tutelage.reports.wording import ABSENT, count, escaped, interval, percent, percent_spread, points

KINDS = {
    "born-again": "Generations of one architecture, each taught by the last.",
    "assistant-chain": "From the teacher to the student through models of sizes between.",
}
"""What a workflow is, in a sentence."""

LOOKS = {
    "teacher": "teacher", "baseline": "baseline", "control": "baseline", "direct": "distilled",
    "assistant": "distilled",
    "distilled": "distilled", "ensemble": "teacher",
}  # fmt: skip
"""The colour of each role, among the page's three."""

NOTE = (
    "Accuracies are of the test split, with the weights that were best on validation unless it says last epoch. ± is "
    "the standard deviation over seeds; differences are paired by seed, with their interval."
)


def told(series: Series, number: Callable[[Panel], int], *, alone: bool) -> str:
    """A workflow's part of the page.

    Args:
        series: the workflow.
        number: takes a figure and gives its number on the page.
        alone: whether it is all that the page is about.
    """
    s = series.summary
    name = s["name"] if s["name"] == series.label else f"{s['name']} ({series.label})"
    seeds = f"{'Seed' if len(s['seeds']) == 1 else 'Seeds'} {', '.join(map(str, s['seeds']))}"
    facts = f"{KINDS.get(s['workflow'], '')} {seeds}; exported student: {s['exported']}."
    title = "h1" if alone else "h2"
    head = (
        f"<header><{title}>{escaped(name)}</{title}><p class='verdict'>{escaped(s['verdict'])}</p>"
        f"<p class='note'>{escaped(facts.strip())}</p></header>"
    )
    panel = progress(series)
    picture = figure(panel, number(panel), heading="Test accuracy, row by row")
    return f"{head}{_table(series)}{picture}{_stages(series)}"


def _table(series: Series) -> str:
    rows = []
    for row in series.summary["rows"]:
        look = LOOKS.get(row["role"], "teacher")
        rows.append(
            [
                f"<span class='role'><span class='swatch {look}'></span>{escaped(row['name'])}</span>",
                escaped(count(row["parameters"])),
                escaped(row["taught_by"] or ABSENT),
                escaped(percent_spread(row["best"]["accuracy"])),
                escaped(percent_spread(row["last"]["accuracy"])),
                escaped(percent_spread(row["validation"])),
                escaped(percent_spread(row["best"].get("agreement"))),
                escaped(percent_spread(row["best"].get("ece"))),
            ]
        )
    columns = ["Model", "Parameters", "Taught by", "Accuracy, best on validation", "Accuracy, last epoch",
               "On validation", "Agreement with its teacher", "ECE"]  # fmt: skip
    differences = [
        [
            escaped(f"{row['name']} over {other}"),
            *(escaped(f(pair[w])) for w in ("best", "last") for f in (_points, interval)),
        ]
        for row in series.summary["rows"]
        for other, pair in row["against"].items()
    ]
    shown = table(f"Results of {series.label}", columns, rows)
    if differences:
        heads = ["Difference", "Best on validation, points", "", "Last epoch, points", ""]
        shown += table("Differences, paired by seed", heads, differences)
    return f"<section>{shown}<p class='note'>{escaped(NOTE)}</p></section>"


def _points(pair: Mapping[str, Any]) -> str:
    return points(pair["mean"])


def progress(series: Series) -> Panel:
    """Test accuracy of each seed and its mean, a row of the table each."""
    rows: Sequence[Mapping[str, Any]] = series.summary["rows"]
    seeds = series.summary["seeds"]
    data: list[Dots] = []
    for look in dict.fromkeys(LOOKS.get(row["role"], "teacher") for row in rows):
        mine = [(at, row) for at, row in enumerate(rows) if LOOKS.get(row["role"], "teacher") == look]
        each = [
            (value, at, f"{plot_text(row['name'])}, seed {seed}")
            for at, row in mine
            for seed, value in zip(seeds, row["best"]["accuracy"]["values"], strict=False)
        ]
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": look, "x": [x for x, _, _ in each],
                "y": [y for _, y, _ in each], "customdata": [text for _, _, text in each],
                "marker": {"color": f"--{look}", "symbol": SYMBOL[look], "size": 11, "opacity": 0.85,
                           "line": {"color": "--card", "width": 1}},
                "hovertemplate": "%{customdata}<br>%{x:.2%}<extra></extra>",
            }
        )  # fmt: skip
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": f"mean, {look}",
                "x": [row["best"]["accuracy"]["mean"] for _, row in mine], "y": [at for at, _ in mine],
                "marker": {"color": f"--{look}", "symbol": "line-ns-open", "size": 24, "line": {"width": 3}},
                "hovertemplate": "mean %{x:.2%}<extra></extra>",
            }
        )  # fmt: skip
    chain = [(row["best"]["accuracy"]["mean"], at) for at, row in enumerate(rows) if row["role"] == "distilled"]
    if len(chain) > 1:
        data.append(
            {
                "type": "scatter", "mode": "lines", "name": "one after the other", "x": [x for x, _ in chain],
                "y": [y for _, y in chain], "line": {"color": "--rule", "width": 2}, "hoverinfo": "skip",
            }
        )  # fmt: skip
    values = [v for trace in data for v in trace["x"]]
    low, high = min(values), max(values)
    pad = max(0.002, 0.06 * (high - low))
    layout = axes(
        "accuracy on the test split", "", height=90 + 40 * len(rows), showlegend=False,
        margin={"l": 48, "r": 16, "t": 8, "b": 50},
        xaxis={"tickformat": ".0%" if high - low > 0.08 else ".1%", "nticks": 4, "tickangle": 0,
               "range": [low - pad, high + pad]},
        yaxis={"tickvals": list(range(len(rows))), "ticktext": [plot_text(row["name"], 22) for row in rows],
               "range": [len(rows) - 0.4, -0.6], "showgrid": False, "zeroline": False},
    )  # fmt: skip
    says = "; ".join(f"{row['name']}: {percent(row['best']['accuracy']['mean'])}" for row in rows)
    return Panel(series.label, f"Test accuracy. {says}.", data, layout, note="A mark for each seed; the stroke is "
                 "their mean.")  # fmt: skip


def _stages(series: Series) -> str:
    """Where the pages of the single runs are."""
    listed = "".join(f"<li><code>{escaped(f'stages/{name}')}</code></li>" for name in series.summary["stages"])
    return (
        f"<details><summary>{len(series.summary['stages'])} runs</summary><p class='note'>Each is a run directory; "
        f"<code>tutelage report</code> makes its page, or one of several side by side.</p><ul>{listed}</ul></details>"
    )
