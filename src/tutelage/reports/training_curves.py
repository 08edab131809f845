"""Figures of the training of models."""

from collections.abc import Sequence
from typing import Any

from tutelage.reports import plotting
from tutelage.reports.formatting import percent
from tutelage.reports.results import metric_label, short_names
from tutelage.reports.run_files import RunRecord


def _by_training(run: RunRecord, key: str) -> dict[str, list[plotting.Json]]:
    """The lines of metrics that have a key."""
    trainings: dict[str, list[plotting.Json]] = {}
    for line in run.metrics:
        if line.get(key):
            trainings.setdefault(line["training"], []).append(line)
    return trainings


def _place(training: str) -> int:
    return plotting.ROLES.index(plotting.role_of(training)) if plotting.role_of(training) in plotting.ROLES else 0


def loss_curves(run: RunRecord) -> plotting.Figure | None:
    """The terms of the loss of each training, weighted and raw."""
    trainings = _by_training(run, "terms")
    if not trainings:
        return None
    data: list[plotting.Json] = []
    for training, lines in trainings.items():
        names = list(dict.fromkeys(name for line in lines for name in line["terms"]))
        for mode in ("weighted", "raw"):
            for i, name in enumerate(names):
                with_term = [line for line in lines if name in line["terms"]]
                values = [line["terms"][name][mode] for line in with_term]
                show = {"training": training, "mode": mode}
                data.append(_curve(plotting.plot_text(name), with_term, values, "term", term=i, show=show))
        with_loss = [line for line in lines if line.get("loss") is not None]
        if len(names) > 1 and with_loss:
            values = [line["loss"] for line in with_loss]
            show = {"training": training, "mode": "weighted"}
            data.append(_curve("loss (their sum)", with_loss, values, "sum", show=show))
    order = sorted(trainings, key=lambda t: (-_place(t) if plotting.role_of(t) in plotting.ROLES else 1, t))
    controls = [
        plotting.Control("training", {training: training for training in order}),
        plotting.Control("mode", {"as weighted": "weighted", "raw": "raw"}),
    ]
    layout = plotting.axes("epoch", "loss", hovermode="x unified", yaxis={"rangemode": "tozero"})
    ends = ", ".join(f"{name} {term['weighted']:.3g}" for name, term in trainings[order[0]][-1]["terms"].items())
    description = f"Terms of the loss by epoch. {order[0]} ends at: {ends}, as weighted."
    note = "Weighted terms add up to the loss that is minimised."
    return plotting.Figure(run.label, description, data, layout, controls, note)


def _curve(name: str, lines: Sequence[plotting.Json], y: Sequence[float], style: str, **more: Any) -> plotting.Json:
    x = [line["epoch"] for line in lines]
    indices = plotting.thin(x, y)
    points = [plotting.short(x[i]) for i in indices], [plotting.short(y[i]) for i in indices]
    return plotting.scatter(
        name, *points, "lines", style=style, customdata=[lines[i]["step"] for i in indices], **more
    )


def validation_curves(run: RunRecord) -> plotting.Figure | None:
    """The validation metric of every training; that of the finished teacher is a level line."""
    trainings = _by_training(run, "validation")
    if not trainings:
        return None
    data: list[plotting.Json] = []
    names, metric = short_names(run.summary), metric_label(run.summary)
    visible: list[float] = []  # the first quarter of a training may be off the axis
    best: dict[str, float] = {}
    for training in sorted(trainings, key=lambda t: (_place(t), t)):
        lines, role = trainings[training], plotting.role_of(training)
        y = [line["validation"]["accuracy"] for line in lines]
        data.append(
            _curve(names.get(role, role), lines, y, "validation", role=role, legendgroup=role,
                   showlegend=role not in best, meta=plotting.plot_text(training))
        )  # fmt: skip
        visible += y[len(y) // 4 :]
        best[role] = max(best.get(role, 0.0), *y)
    teacher = ((run.summary.get("teacher") or {}).get("validation") or {}).get("accuracy")
    if teacher is not None:
        visible.append(teacher)
        epochs = [line["epoch"] for lines in trainings.values() for line in lines]
        ends = [min(0, *epochs), max(epochs)]
        data.append(
            plotting.scatter("teacher, finished", ends, [teacher] * 2, "lines", style="level", role="teacher")
        )
    pad = max(0.01, 0.08 * (max(visible) - min(visible)))
    low, high = max(-0.01, min(visible) - pad), min(1.01, max(visible) + pad)
    yaxis = {"range": [low, high], "tickformat": plotting.percent_ticks(low, high)}
    best_values = ", ".join(f"{names.get(role, role)} {percent(value)}" for role, value in best.items())
    note = "A line for each seed" + ("" if teacher is None else "; the level line is the finished teacher")
    return plotting.Figure(
        run.label, f"Validation {metric} by epoch. Best: {best_values}.", data,
        plotting.axes("epoch", f"validation {metric}", yaxis=yaxis), note=f"{note}. The axis does not start at zero.",
    )  # fmt: skip
