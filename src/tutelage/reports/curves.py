"""Figures of what happened while models were trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutelage.reports.metric import named
from tutelage.reports.panel import (
    COLOUR,
    DASH,
    ROLES,
    TERM_COLOURS,
    Dots,
    Panel,
    axes,
    plot_text,
    role_of,
    short,
    thinned,
)
from tutelage.reports.read import Run
from tutelage.reports.wording import called_short, percent


def loss_curves(run: Run) -> Panel | None:
    """The terms of the loss of each training, as weighted in it or raw."""
    trainings: dict[str, list[dict[str, Any]]] = {}
    for line in run.metrics:
        if line.get("terms"):
            trainings.setdefault(line["training"], []).append(line)
    if not trainings:
        return None
    data: list[Dots] = []
    for training, lines in trainings.items():
        names = list(dict.fromkeys(name for line in lines for name in line["terms"]))
        for mode in ("weighted", "raw"):
            for i, name in enumerate(names):
                seen = [line for line in lines if name in line["terms"]]
                values = [line["terms"][name][mode] for line in seen]
                colour = TERM_COLOURS[i % len(TERM_COLOURS)]
                data.append(_curve(plot_text(name), seen, values, colour, "solid", training=training, mode=mode))
        whole = [line for line in lines if line.get("loss") is not None]
        if len(names) > 1 and whole:
            values = [line["loss"] for line in whole]
            data.append(_curve("loss (their sum)", whole, values, "--ink", "dot", training=training, mode="weighted"))
    order = sorted(trainings, key=lambda t: (-ROLES.index(role_of(t)) if role_of(t) in ROLES else 1, t))
    controls = {
        "training": {training: training for training in order},
        "mode": {"as weighted": "weighted", "raw": "raw"},
    }
    layout = axes("epoch", "loss", hovermode="x unified", yaxis={"rangemode": "tozero"})
    last = {name: term["weighted"] for name, term in trainings[order[0]][-1]["terms"].items()}
    ends = ", ".join(f"{name} {value:.3g}" for name, value in last.items())
    says = f"Terms of the loss by epoch. {order[0]} ends at: {ends}, as weighted."
    return Panel(run.label, says, data, layout, controls, note="Weighted terms add up to the loss that is minimised.")


def _curve(name: str, lines: Sequence[Dots], y: Sequence[float], colour: str, dash: str, **show: str) -> Dots:
    x = [line["epoch"] for line in lines]
    kept = thinned(x, y)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [short(x[i]) for i in kept],
        "y": [short(y[i]) for i in kept],
        "line": {"color": colour, "dash": dash, "width": 2},
        "show": show,
        "customdata": [lines[i]["step"] for i in kept],
        "hovertemplate": "%{y:.4g} (step %{customdata})",
    }


def validation_curves(run: Run) -> Panel | None:
    """Validation accuracy, or what else the run is judged by, of every training; the finished teacher's is level."""
    trainings: dict[str, list[dict[str, Any]]] = {}
    for line in run.metrics:
        if line.get("validation"):
            trainings.setdefault(line["training"], []).append(line)
    if not trainings:
        return None
    data: list[Dots] = []
    legend: set[str] = set()
    names = called_short(run.summary)
    late: list[float] = []
    best: dict[str, float] = {}
    for training in sorted(trainings, key=lambda t: (ROLES.index(role_of(t)) if role_of(t) in ROLES else 0, t)):
        lines, role = trainings[training], role_of(training)
        y = [line["validation"]["accuracy"] for line in lines]
        trace = _curve(training, lines, y, COLOUR.get(role, "--ink"), DASH.get(role, "solid"))
        trace |= {
            "name": names.get(role, role),
            "legendgroup": role,
            "showlegend": role not in legend,
            "opacity": 0.85,
        }
        trace |= {"hovertemplate": "%{y:.2%}, step %{customdata}<extra>" + plot_text(training) + "</extra>"}
        del trace["show"]
        legend.add(role)
        data.append(trace)
        late += y[len(y) // 4 :]
        best[role] = max(best.get(role, 0.0), *y)
    level = ((run.summary.get("teacher") or {}).get("validation") or {}).get("accuracy")
    ends = [line["epoch"] for lines in trainings.values() for line in lines]
    if level is not None:
        late.append(level)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "teacher, finished",
                "x": [min(0, *ends), max(ends)],
                "y": [level] * 2,
                "line": {"color": COLOUR["teacher"], "width": 2},
                "hovertemplate": "%{y:.2%}<extra>teacher</extra>",
            }
        )
    pad = max(0.01, 0.08 * (max(late) - min(late)))
    scale = [max(-0.01, min(late) - pad), min(1.01, max(late) + pad)]
    tick = ".0%" if scale[1] - scale[0] > 0.08 else ".1%"
    layout = axes("epoch", f"validation {named(run.summary)}", yaxis={"range": scale, "tickformat": tick})
    says = ", ".join(f"{names.get(role, role)} {percent(value)}" for role, value in best.items())
    finished = "" if level is None else "; the level line is the finished teacher"
    note = f"A line for each seed{finished}. The axis does not begin at zero."
    return Panel(run.label, f"Validation {named(run.summary)} by epoch. Best: {says}.", data, layout, note=note)
