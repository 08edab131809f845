"""The page of a search: validation accuracy against each key, trial by trial, and the chosen recipe."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tutelage.reports.formatting import percent, value_text, values_text
from tutelage.reports.plotting import (
    Figure,
    Json,
    axes,
    percent_ticks,
    plot_text,
    scatter,
    short,
)
from tutelage.reports.run_files import SearchRecord

HEIGHT = 380


def search_figures(record: SearchRecord) -> dict[str, Figure]:
    """The figures below those of each key, by their headings."""
    search = record.search
    figures = {"Trial by trial": history(record), "Validation through training": evaluation_curves(record)}
    ranges = [key for key in search["space"] if key["values"] is None]
    if len(ranges) > 1:
        first, second = sorted(ranges, key=lambda key: -search["importance"].get(key["key"], 0.0))[:2]
        figures["Two keys at once"] = two_keys(record, first, second)
    if search["importance"]:
        figures["Importance of keys"] = importance(record)
    return figures


def _trial_marks(record: SearchRecord, x: Callable[[Json], float]) -> tuple[list[Json], list[float]]:
    """A trace for each kind of trial, and the range of validation accuracy of the finished ones."""
    search = record.search
    finished = [t["validation"] for t in search["trials"] if t["state"] == "finished"]
    pad = max(0.002, 0.12 * (max(finished) - min(finished)))
    low, high = min(finished) - 2 * pad, max(finished) + pad
    kinds = {
        "finished": [t for t in search["trials"] if t["state"] == "finished"],
        "stopped early": [t for t in search["trials"] if t["state"] != "finished" and t["evaluations"]],
        "unchanged recipe": [t for t in search["trials"] if t["number"] == search["default"]["trial"]],
        "chosen": [record.best_trial],
    }
    data = []
    for name, trials in kinds.items():
        values = [t["evaluations"][-1] if t["validation"] is None else t["validation"] for t in trials]
        texts = [f"trial {t['number']}: {plot_text(values_text(t['values']), 90)}" for t in trials]
        if trials:
            data.append(scatter(
                name, [short(x(t)) for t in trials], [short(max(value, low + 0.3 * pad)) for value in values],
                customdata=[list(pair) for pair in zip(texts, values, strict=True)], style="trials",
            ))  # fmt: skip
    return data, [low, high]


def _accuracy_axes(x: str, span: Sequence[float], xaxis: Json) -> Json:
    yaxis = {"range": list(span), "tickformat": percent_ticks(*span)}
    return axes(x, "validation accuracy", HEIGHT, xaxis=xaxis, yaxis=yaxis)


def response(record: SearchRecord, key: Mapping[str, Any]) -> Figure:
    """Validation accuracy of every trial against its value of a key."""
    name, choices, best = key["key"], key["values"], record.best_trial
    if choices is None:
        data, span = _trial_marks(record, lambda t: t["values"][name])
        xaxis = _range_axis(key)
    else:
        data, span = _trial_marks(record, lambda t: choices.index(t["values"][name]))
        ticks = [plot_text(value_text(v), 16) for v in choices]
        xaxis = {"tickvals": list(range(len(choices))), "ticktext": ticks, "range": [-0.5, len(choices) - 0.5]}
    description = (
        f"Validation accuracy against {name}: best, {percent(best['validation'])}, at {values_text(best['values'])}."
    )
    return Figure(name, description, data, _accuracy_axes(plot_text(name, 40), span, xaxis))


def _range_axis(key: Mapping[str, Any]) -> Json:
    """The axis of a key that has a range."""
    low, high = key["low"], key["high"]
    if not key["log"]:
        pad = 0.04 * (high - low)
        return {"range": [low - pad, high + pad]}
    a, b = math.log10(low), math.log10(high)
    steps = (1, 2, 5) if b - a < 2.5 else (1,)
    decades = range(math.floor(a), math.ceil(b) + 1)
    ticks = [step * 10.0**d for d in decades for step in steps if low <= step * 10.0**d <= high]
    pad = 0.04 * (b - a)
    return {"type": "log", "range": [a - pad, b + pad], "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]}


def history(record: SearchRecord) -> Figure:
    """Validation accuracy of trial after trial, and the best so far."""
    data, span = _trial_marks(record, lambda t: t["number"])
    x: list[int] = []
    y: list[float] = []
    for trial in record.search["trials"]:
        if trial["state"] == "finished":
            y.append(max(trial["validation"], y[-1] if y else 0.0))
            x.append(trial["number"])
    last = record.search["trials"][-1]["number"]
    line = scatter("best so far", [*x, last], [short(v) for v in [*y, y[-1]]], "lines", style="best so far")
    layout = _accuracy_axes("trial", span, {"range": [-0.5, last + 0.5]})
    description = f"The best so far, trial by trial: from {percent(y[0])} to {percent(y[-1])}."
    return Figure("", description, [line, *data], layout, note="The line is the best of the trials so far.")


def evaluation_curves(record: SearchRecord) -> Figure:
    """Validation accuracy of each trial's first seed, by evaluation."""
    trials, best = record.search["trials"], record.search["best"]
    kinds = {
        "stopped early": [t for t in trials if t["state"] != "finished"],
        "finished": [t for t in trials if t["state"] == "finished" and t["number"] != best],
        "chosen": [record.best_trial],
    }
    data = []
    for name, of_kind in kinds.items():
        x: list[int | None] = []
        y: list[float | None] = []
        texts: list[str] = []
        for trial in of_kind:  # curves of one trace, separated by None
            total = len(trial["evaluations"])
            x += [*range(1, total + 1), None]
            y += [*map(short, trial["evaluations"]), None]
            texts += [f"trial {trial['number']}"] * (total + 1)
        if len(x) > len(of_kind):
            data.append(scatter(name, x, y, "lines", customdata=texts, style="evaluations"))
    longest = max(len(t["evaluations"]) for t in trials)
    xaxis = {"dtick": 1} if longest <= 10 else {}
    layout = axes("evaluation", "validation accuracy", HEIGHT, xaxis=xaxis, yaxis={"tickformat": ".0%"})
    stopped = len(kinds["stopped early"])
    description = f"Validation accuracy through the training of each trial; {stopped} of {len(trials)} stopped early."
    return Figure("", description, data, layout, note="The first seed of each trial.")


def two_keys(record: SearchRecord, across: Mapping[str, Any], up: Mapping[str, Any]) -> Figure:
    """The finished trials by two keys, coloured by their validation accuracy."""
    finished = [t for t in record.search["trials"] if t["state"] == "finished"]
    values = [t["validation"] for t in finished]
    low, high = min(values), max(values)
    colours = {
        "color": [short(v) for v in values], "cmin": low, "cmax": max(high, low + 1e-6),
        "colorbar": {"tickformat": percent_ticks(low, high)},
    }  # fmt: skip

    def places(trials: Sequence[Json]) -> tuple[list[float], list[float]]:
        x, y = ([short(t["values"][key["key"]]) for t in trials] for key in (across, up))
        return x, y

    data = [
        scatter("finished", *places(finished), style="two keys", marker=colours,
                customdata=[[f"trial {t['number']}", t["validation"]] for t in finished]),
        scatter("chosen", *places([record.best_trial]), style="ring"),
    ]  # fmt: skip
    layout = axes(plot_text(across["key"], 40), plot_text(up["key"], 40), HEIGHT, showlegend=False,
                  xaxis=_range_axis(across), yaxis=_range_axis(up))  # fmt: skip
    description = f"Validation accuracy of finished trials by {across['key']} and {up['key']}."
    note = "The colour is validation accuracy; the ring is the chosen trial."
    return Figure("", description, data, layout, note=note)


def importance(record: SearchRecord) -> Figure:
    """The share of each key in the difference between the best trials and the others (PED-ANOVA)."""
    shares = sorted(record.search["importance"].items(), key=lambda item: item[1])
    data = [
        {
            "type": "bar", "style": "importance", "x": [short(v) for _, v in shares], "y": list(range(len(shares))),
            "text": [f"{v:.0%}" for _, v in shares],
        }
    ]  # fmt: skip
    yaxis = {"tickvals": list(range(len(shares))), "ticktext": [plot_text(key, 24) for key, _ in shares]}
    layout = axes("share", "", 120 + 40 * len(shares), showlegend=False,
                  xaxis={"tickformat": ".0%", "range": [0, 1.02]}, yaxis=yaxis)  # fmt: skip
    description = "; ".join(f"{key}: {v:.0%}" for key, v in reversed(shares))
    note = "PED-ANOVA over the finished trials: a hint, not a measurement, with so few trials."
    return Figure("", f"Importance of keys. {description}.", data, layout, note=note)
