"""Figures of what finished models do on the test split, and the list of all figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tutelage.reports.curves import loss_curves, validation_curves
from tutelage.reports.metric import judged_by
from tutelage.reports.panel import COLOUR, DASH, ROLES, SYMBOL, Dots, Panel, axes, plot_text, short
from tutelage.reports.read import Run
from tutelage.reports.wording import UNTAUGHT, called_short, percent

FEW = 10
"""A bin of the reliability diagram with fewer samples says little."""


def seed_by_seed(runs: Sequence[Run]) -> Panel:
    """Test accuracy, or what else runs are judged by, of every student and of the teacher; one row a run and arm."""
    data: list[Dots] = []
    rows: list[tuple[Run, str]] = [(run, arm) for run in runs for arm in run.arms]
    for role in ("baseline", "distilled"):
        x, y, texts = [], [], []
        means: list[tuple[float, int]] = []
        for at, (run, arm) in enumerate(rows):
            if arm == role:
                spread = run.summary["students"][arm]["best"]["accuracy"]
                x += spread["values"]
                y += [at] * len(spread["values"])
                seeds = run.summary["seeds"]
                texts += [f"{plot_text(run.label)}, seed {s}" for s, _ in zip(seeds, spread["values"], strict=False)]
                means.append((spread["mean"], at))
        if not x:
            continue
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": role,
                "x": x,
                "y": y,
                "customdata": texts,
                "marker": {
                    "color": COLOUR[role],
                    "symbol": SYMBOL[role],
                    "size": 12,
                    "opacity": 0.9,
                    "line": {"color": "--card", "width": 1},
                },
                "hovertemplate": "%{customdata}<br>%{x:.2%}<extra>" + role + "</extra>",
            }
        )
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"mean {role}",
                "x": [m for m, _ in means],
                "y": [at for _, at in means],
                "marker": {"color": COLOUR[role], "symbol": "line-ns-open", "size": 26, "line": {"width": 3}},
                "hovertemplate": "mean %{x:.2%}<extra>" + role + "</extra>",
            }
        )
    for run in runs:
        mine = [at for at, (r, _) in enumerate(rows) if r is run]
        if run.summary.get("teacher") is None:
            continue
        teacher = run.summary["teacher"]["accuracy"]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "teacher",
                "legendgroup": "teacher",
                "x": [teacher, teacher],
                "y": [mine[0] - 0.4, mine[-1] + 0.4],
                "line": {"color": COLOUR["teacher"], "dash": DASH["teacher"], "width": 3},
                "hovertemplate": "%{x:.2%}<extra>teacher</extra>",
            }
        )
    metric = judged_by(run.summary for run in runs)
    shown = [called_short(run.summary)[arm] for run, arm in rows]
    names = [
        arm if len(runs) == 1 else f"{plot_text(run.label, 18)}, {arm}"
        for (run, _), arm in zip(rows, shown, strict=True)
    ]
    values = [v for trace in data for v in trace["x"]]
    low, high = min(values), max(values)
    pad = max(0.002, 0.06 * (high - low))
    layout = axes(
        f"{metric} on the test split",
        "",
        height=86 + 42 * len(rows),
        showlegend=False,
        margin={"l": 48, "r": 16, "t": 8, "b": 50},
        xaxis={
            "tickformat": ".0%" if high - low > 0.08 else ".1%",
            "nticks": 5,
            "tickangle": 0,
            "range": [low - pad, high + pad],
        },
        yaxis={
            "tickvals": list(range(len(rows))),
            "ticktext": names,
            "range": [len(rows) - 0.4, -0.6],
            "showgrid": False,
            "zeroline": False,
        },
    )
    found = [run.summary["students"][arm]["best"]["accuracy"]["values"] for run, arm in rows]
    says = "; ".join(
        f"{run.label}, {arm}: {', '.join(map(percent, values))}"
        for (run, arm), values in zip(rows, found, strict=True)
    )
    note = "A mark for each seed; the upright stroke is their mean."
    there = {arm for _, arm in rows} | {"teacher" for run in runs if run.summary.get("teacher")}
    key = {role: " or ".join(names_of(runs)[role]) for role in ROLES if role in there}
    return Panel("", f"Test {metric}, seed by seed. {says}.", data, layout, note=note, key=key)


def names_of(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What each role is called in these runs, each name once."""
    return {role: list(dict.fromkeys(called_short(run.summary)[role] for run in runs)) for role in ROLES}


def reliability(run: Run) -> Panel | None:
    """Accuracy against confidence; a bar from each point to the diagonal is its miscalibration."""
    data: list[Dots] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [0, 1],
            "y": [0, 1],
            "name": "calibrated",
            "hoverinfo": "skip",
            "line": {"color": "--quiet", "width": 1},
            "showlegend": False,
        }
    ]
    said = []
    for role, name, row in _by_role(run):
        bins = row.get("reliability")
        if not bins:
            continue
        filled = [b for b in zip(bins["count"], bins["confidence"], bins["accuracy"], strict=False) if b[0] > 0]
        if not filled:
            continue
        full = [b for b in filled if b[0] >= FEW]
        thin = [b for b in filled if b[0] < FEW]
        data += [_points(role, name, full, sum(bins["count"])), _points(role, name, thin, 0)]
        said.append(f"{name}: expected calibration error {percent(_ece(row))}")
    if len(data) == 1:
        return None
    layout = axes(
        "confidence",
        "accuracy",
        height=420,
        xaxis={"range": [-0.02, 1.04], "tickformat": ".0%"},
        yaxis={"range": [-0.02, 1.04], "tickformat": ".0%"},
        legend={"itemsizing": "constant"},
    )
    note = (
        "The bar from a point to the diagonal is its miscalibration; a larger point holds more samples, a hollow one "
        f"fewer than {FEW}, too few to judge. First seed."
    )
    return Panel(run.label, f"Reliability diagram. {'; '.join(said)}.", data, layout, note=note, square=True)


def _points(role: str, name: str, bins: Sequence[tuple[float, float, float]], total: float) -> Dots:
    """Bins as points with their gaps to the diagonal; hollow and without gaps where ``total`` is zero."""
    gaps = [confidence - right for _, confidence, right in bins]
    trace: Dots = {
        "type": "scatter",
        "mode": "lines+markers" if total else "markers",
        "name": name,
        "legendgroup": role,
        "showlegend": bool(total),
        "x": [short(confidence) for _, confidence, _ in bins],
        "y": [short(right) for _, _, right in bins],
        "customdata": [[int(n), abs(gap)] for (n, _, _), gap in zip(bins, gaps, strict=True)],
        "hovertemplate": "confidence %{x:.1%}, accuracy %{y:.1%}<br>gap %{customdata[1]:.1%}, "
        "%{customdata[0]:,} samples<extra>" + name + "</extra>",
    }
    if not total:
        return trace | {"marker": {"color": COLOUR[role], "symbol": f"{SYMBOL[role]}-open", "size": 6}}
    return trace | {
        "line": {"color": COLOUR[role], "width": 1.5, "dash": DASH[role]},
        "marker": {
            "color": COLOUR[role],
            "symbol": SYMBOL[role],
            "size": [round(6 + 12 * (n / total) ** 0.5, 1) for n, _, _ in bins],
            "opacity": 0.9,
            "line": {"color": "--card", "width": 1},
        },
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [short(max(gap, 0)) for gap in gaps],
            "arrayminus": [short(max(-gap, 0)) for gap in gaps],
            "width": 0,
            "thickness": 1.5,
            "color": COLOUR[role],
        },
    }


def _ece(row: Mapping[str, Any]) -> float | None:
    found = row["ece"] if "ece" in row else (row.get("best") or {}).get("ece")
    value: float | None = found["mean"] if isinstance(found, Mapping) else found
    return value


def per_class(run: Run) -> Panel | None:
    """Accuracy of each class; the distilled student's weakest class first."""
    rows = [(role, name, row["per_class"]) for role, name, row in _by_role(run) if row.get("per_class")]
    if not rows:
        return None
    panel, weakest = _by_class(run, rows, "accuracy on the test split")
    panel.says = f"Accuracy of each class. Weakest of {rows[-1][1]}: {weakest}."
    whose = "distilled student" if run.summary.get("taught", True) else UNTAUGHT
    panel.note = f"Weakest class of the {whose} first. First seed."
    return panel


def fidelity(run: Run) -> Panel | None:
    """How often each student says what the teacher says, by the class of the label; where it does least, first."""
    found = run.samples
    if found is None or found["reference"] != "teacher" or not any(found["by_class"]["n"]):
        return None
    names, n = called_short(run.summary), found["by_class"]["n"]
    rows = [
        (
            arm,
            names[arm],
            [agree / many if many else math.nan for agree, many in zip(found["by_class"][arm], n, strict=True)],
        )
        for arm in run.arms
        if arm in found["by_class"]
    ]
    panel, least = _by_class(run, rows, "agreement with the teacher")
    panel.says = f"Agreement with the teacher by class. Least of {rows[-1][1]}: {least}."
    panel.note = (
        f"Samples of each class, by its label, on which student and teacher say the same, right or wrong. Of "
        f"{found['exported']}, which is exported"
        + (", and the baseline student of its seed." if len(rows) > 1 else ".")
    )
    return panel


def _by_class(run: Run, rows: Sequence[tuple[str, str, Sequence[float]]], x: str) -> tuple[Panel, str]:
    """Bars of each class, the lowest of the last row first, and which that is."""
    shortest = min(len(values) for _, _, values in rows)
    order = sorted(range(shortest), key=lambda i: (math.isnan(rows[-1][2][i]), rows[-1][2][i]))
    given = run.summary.get("classes") or []
    classes = [given[i] if i < len(given) else f"class {i}" for i in order]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "x": [short(values[i]) for i in order],
            "y": list(range(shortest)),
            "marker": {"color": COLOUR[role]},
            "text": ["" if math.isnan(values[i]) else f"{100 * values[i]:.1f}" for i in order],
            "textposition": "outside",
            "cliponaxis": False,
            "textfont": {"size": 10},
            "customdata": [plot_text(c, 80) for c in classes],
            "hovertemplate": "%{customdata}: %{x:.2%}<extra>" + name + "</extra>",
        }
        for role, name, values in rows
    ]
    longest = min(16, max(map(len, classes), default=0))
    height = 70 + shortest * (14 * len(rows) + 8)
    layout = axes(
        x,
        "",
        height=height,
        barmode="group",
        bargap=0.22,
        xaxis={"range": [0, 1.12], "tickvals": [0, 0.5, 1], "tickangle": 0, "tickformat": ".0%", "side": "bottom"},
        yaxis={
            "tickvals": list(range(shortest)),
            "ticktext": [plot_text(c, 16) for c in classes],
            "automargin": False,
            "range": [shortest - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
        },
        showlegend=False,
        margin={"l": 20 + 8 * longest, "r": 16, "t": 8, "b": 50},
    )
    lowest = f"{classes[0]}, {percent(rows[-1][2][order[0]])}" if classes else "none"
    key = {role: name for role, name, _ in rows}
    return Panel(run.label, "", data, layout, tall=True, key=key), lowest


def _by_role(run: Run) -> list[tuple[str, str, Mapping[str, Any]]]:
    students = run.summary["students"]
    teacher, names = run.summary.get("teacher"), called_short(run.summary)
    arms = [(arm, names[arm], students[arm]) for arm in run.arms]
    return arms if teacher is None else [("teacher", "teacher", teacher), *arms]


FIGURES: dict[str, Callable[[Run], Panel | None]] = {
    "Validation {metric}": validation_curves,
    "Loss": loss_curves,
    "Calibration": reliability,
    "Accuracy by class": per_class,
    "Agreement with the teacher by class": fidelity,
}
"""Every figure that is drawn once for each run, under its heading; ``{metric}`` is what runs are judged by."""
