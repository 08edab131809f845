"""The page of a search: how validation answers to each key, trial by trial, and what was chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tutelage.reports.found import Search, found_words, setting, value_words
from tutelage.reports.panel import Dots, Panel, axes, plot_text, short
from tutelage.reports.parts import figure, table
from tutelage.reports.wording import (
    ABSENT,
    count,
    escaped,
    percent,
    percent_spread,
    points,
    seconds,
)

Place = Callable[[Panel], int]
"""Gives a panel its number on the page."""

STATES = {"finished": "finished", "pruned": "given up early", "diverged": "diverged", "failed": "failed"}

LOOKS = {
    "finished": {"color": "--distilled", "symbol": "circle", "size": 9, "opacity": 0.85},
    "given up early": {"color": "--quiet", "symbol": "x-thin-open", "size": 9, "line": {"width": 2}},
    "recipe as it is": {"color": "--baseline", "symbol": "diamond", "size": 13},
    "chosen": {"color": "--term3", "symbol": "star", "size": 16},
}

NOTE = (
    "Validation is what the search goes by, so the best trial's is too good: the best of many. Test is read once, "
    "for the chosen recipe and for the recipe as it is. “Last”: the weights after the last epoch, which the search "
    "compares. “Best”: those with the best validation accuracy of their training. ± is the standard deviation over "
    "seeds; gains are paired over seeds, with their 95 % intervals."
)


def search_body(search: Search, place: Place) -> str:
    """Everything that the page says."""
    return "\n".join([_headline(search), _results(search), _figures(search, place), _trials(search), _best(search)])


def _headline(search: Search) -> str:
    found = search.found
    facts = [
        f"{found['loss'].capitalize()}; seeds {', '.join(map(str, found['seeds']))}",
        f"search seed {found['settings'].get('seed', 0)}",
        f"trials took {seconds(found['seconds'])}",
    ]
    return (
        f"<header><h1>Search of {escaped(found['name'])}</h1><p class='verdict'>{escaped(found_words(found))}</p>"
        f"<p class='note'>{escaped('; '.join(facts))}.</p></header>"
    )


def _results(search: Search) -> str:
    found, best = search.found, search.chosen
    default, test = found["default"], found["test"]
    columns = ["Recipe", "Validation", "Test, last", "Test, best", *(d["key"] for d in found["space"])]

    def row(name: str, validation: float, which: str, values: Sequence[str]) -> list[str]:
        cells = [percent(validation), *(percent_spread(test[which][w]) for w in ("last", "best")), *values]
        return [escaped(name), *map(escaped, cells)]

    own = [ABSENT if d.get("own") is None else value_words(d["own"]) for d in found["space"]]
    rows = [row("as it is", default["validation"], "default", own)]
    if not found["same"]:
        mine = [value_words(best["values"][d["key"]]) for d in found["space"]]
        rows.append(row(f"chosen: trial {best['number']}", best["validation"], "chosen", mine))
        gains = [found["gain_on_validation"], test["gain"]["last"], test["gain"]["best"]]
        cells = [f"{escaped(points(g['mean']))}<br><span class='note'>{escaped(_ends(g))}</span>" for g in gains]
        rows.append(["gain, points", *cells, *("" for _ in own)])
    return f"<section>{table('Results', columns, rows)}<p class='note'>{escaped(NOTE)}</p></section>"


def _ends(gain: dict[str, Any]) -> str:
    if gain["low"] is None or gain["high"] is None:
        return "one seed: no interval"
    return f"{points(gain['low'])} to {points(gain['high'])}"


def _trials(search: Search) -> str:
    keys = [d["key"] for d in search.found["space"]]
    rows = []
    for t in search.found["trials"]:
        mark = " (chosen)" if t["number"] == search.found["best"] else ""
        mark += " (as it is)" if t["number"] == search.found["default"].get("trial") else ""
        state = STATES.get(t["state"], t["state"]) + (f": {t['why']}" if t.get("why") else "")
        last = t["evaluations"][-1] if t["evaluations"] else None
        shown = percent(t["validation"]) if t["state"] == "finished" else f"{percent(last)} then"
        cells = [
            f"{t['number']}{mark}", *(value_words(t["values"][key]) for key in keys), shown, state,
            count(len(t["evaluations"])), seconds(t["seconds"]),
        ]  # fmt: skip
        rows.append([escaped(cell) for cell in cells])
    columns = ["Trial", *keys, "Validation", "How it ended", "Evaluations, first seed", "Time"]
    return f"<section>{table('Trials', columns, rows)}</section>"


def _best(search: Search) -> str:
    return (
        "<section><h2>The best recipe</h2><details><summary>best.yaml</summary>"
        f"<pre tabindex='0'><code>{escaped(search.best, breaking=True)}</code></pre></details></section>"
    )


# Figures -----------------------------------------------------------------------------------------


def _figures(search: Search, place: Place) -> str:
    responses = [response(search, d) for d in search.found["space"]]
    others = {"Trial by trial": history(search), "Validation through training": curves(search)}
    ranges = [d for d in search.found["space"] if d.get("values") is None]
    if len(ranges) > 1:
        shares = search.found["importance"]
        first, second = sorted(ranges, key=lambda d: -shares.get(d["key"], 0.0))[:2]
        others["Two keys at once"] = together(search, first, second)
    if search.found["importance"]:
        others["Which key matters"] = importance(search)
    answers = "".join(figure(p, place(p), subheading=p.label) for p in responses)
    note = (
        "Each mark is a trial. Where several keys were varied at once, a mark's height is due to all. A trial that "
        "was given up early is at its last validation accuracy, or at the lower edge where that is below."
    )
    rest = "".join(figure(p, place(p), heading=heading) for heading, p in others.items())
    return (
        f"<section><h2>How validation answers to each key</h2><p class='note'>{escaped(note)}</p>"
        f"<div class='panels side'>{answers}</div></section><div class='panels'>{rest}</div>"
    )


def _marks(search: Search, x: Callable[[dict[str, Any]], float]) -> tuple[list[Dots], list[float]]:
    """A trace for each kind of trial, and the range of validation that shows the finished ones."""
    found = search.found
    done = [t["validation"] for t in found["trials"] if t["state"] == "finished"]
    pad = max(0.002, 0.12 * (max(done) - min(done)))
    low, high = min(done) - 2 * pad, max(done) + pad
    kinds: dict[str, list[dict[str, Any]]] = {name: [] for name in LOOKS}
    for t in found["trials"]:
        if t["state"] == "finished":
            kinds["finished"].append(t)
        elif t["evaluations"]:
            kinds["given up early"].append(t)
        if t["number"] == found["default"].get("trial"):
            kinds["recipe as it is"].append(t)
        if t["number"] == found["best"]:
            kinds["chosen"].append(t)
    data: list[Dots] = []
    for name, trials in kinds.items():
        if trials:
            said = [t["validation"] if t["validation"] is not None else t["evaluations"][-1] for t in trials]
            data.append({
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [short(x(t)) for t in trials],
                "y": [short(max(v, low + 0.3 * pad)) for v in said],
                "customdata": [
                    [f"trial {t['number']}: {plot_text(setting(t['values']), 90)}", v]
                    for t, v in zip(trials, said, strict=True)
                ],
                "marker": LOOKS[name],
                "hovertemplate": "%{customdata[0]}<br>%{customdata[1]:.2%}<extra>" + name + "</extra>",
            })  # fmt: skip
    return data, [low, high]


def response(search: Search, dimension: dict[str, Any]) -> Panel:
    """Validation accuracy of every trial against its value of a key."""
    key, choices = dimension["key"], dimension.get("values")
    if choices is not None:
        data, span = _marks(search, lambda t: choices.index(t["values"][key]))
        xaxis: Dots = {
            "tickvals": list(range(len(choices))),
            "ticktext": [plot_text(value_words(v), 16) for v in choices],
            "range": [-0.5, len(choices) - 0.5],
        }
    else:
        data, span = _marks(search, lambda t: t["values"][key])
        xaxis = _scale(dimension["low"], dimension["high"], bool(dimension.get("log")))
    layout = axes(
        plot_text(key, 40), "validation accuracy", height=380,
        xaxis=xaxis, yaxis={"range": span, "tickformat": _form(span)},
    )  # fmt: skip
    best = search.chosen
    says = f"Validation accuracy against {key}: best, {percent(best['validation'])}, at {setting(best['values'])}."
    return Panel(key, says, data, layout)


def _scale(low: float, high: float, log: bool) -> Dots:
    if not log:
        pad = 0.04 * (high - low)
        return {"range": [low - pad, high + pad]}
    a, b = math.log10(low), math.log10(high)
    decades = range(math.floor(a), math.ceil(b) + 1)
    steps = (1, 2, 5) if b - a < 2.5 else (1,)
    ticks = [step * 10.0**d for d in decades for step in steps if low <= step * 10.0**d <= high]
    pad = 0.04 * (b - a)
    return {
        "type": "log", "range": [a - pad, b + pad], "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks],
    }  # fmt: skip


def _form(span: Sequence[float]) -> str:
    return ".0%" if span[1] - span[0] > 0.08 else ".1%"


def history(search: Search) -> Panel:
    """Validation accuracy of trial after trial, and the best so far."""
    data, span = _marks(search, lambda t: t["number"])
    x: list[int] = []
    y: list[float] = []
    for t in search.found["trials"]:
        if t["state"] == "finished":
            y.append(max(t["validation"], y[-1] if y else 0.0))
            x.append(t["number"])
    last = search.found["trials"][-1]["number"]
    x, y = [*x, last], [*y, y[-1]]
    line: Dots = {
        "type": "scatter", "mode": "lines", "name": "best so far", "x": x, "y": [short(v) for v in y],
        "line": {"color": "--distilled", "width": 2, "shape": "hv"}, "hoverinfo": "skip",
    }  # fmt: skip
    layout = axes(
        "trial", "validation accuracy", height=380,
        xaxis={"range": [-0.5, last + 0.5]}, yaxis={"range": span, "tickformat": _form(span)},
    )  # fmt: skip
    says = f"The best so far, trial by trial: from {percent(y[0])} to {percent(y[-1])}."
    return Panel("", says, [line, *data], layout, note="The line is the best of the trials so far.")


def curves(search: Search) -> Panel:
    """Validation accuracy of each trial's first seed, evaluation by evaluation: where trials were given up."""
    looks = {
        "given up early": {"color": "--quiet", "width": 1, "dash": "dot"},
        "finished": {"color": "--distilled", "width": 1},
        "chosen": {"color": "--term3", "width": 3},
    }
    found, data = search.found, []
    kinds = {
        "given up early": [t for t in found["trials"] if t["state"] != "finished"],
        "finished": [t for t in found["trials"] if t["state"] == "finished" and t["number"] != found["best"]],
        "chosen": [search.chosen],
    }
    for name, trials in kinds.items():
        x: list[int | None] = []
        y: list[float | None] = []
        texts: list[str] = []
        for t in trials:
            many = len(t["evaluations"])
            x += [*range(1, many + 1), None]
            y += [*map(short, t["evaluations"]), None]
            texts += [f"trial {t['number']}"] * (many + 1)
        if len(x) > len(trials):
            data.append({
                "type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "customdata": texts,
                "line": looks[name], "opacity": 1.0 if name == "chosen" else 0.7,
                "hovertemplate": "%{customdata}, evaluation %{x}<br>%{y:.2%}<extra>" + name + "</extra>",
            })  # fmt: skip
    most = max(len(t["evaluations"]) for t in found["trials"])
    xaxis = {"dtick": 1} if most <= 10 else {}
    layout = axes("evaluation", "validation accuracy", height=380, xaxis=xaxis, yaxis={"tickformat": ".0%"})
    gone = len(kinds["given up early"])
    says = f"Validation accuracy through the training of each trial; {gone} of {len(found['trials'])} ended early."
    return Panel("", says, data, layout, note="The first seed of each trial.")


def together(search: Search, across: dict[str, Any], up: dict[str, Any]) -> Panel:
    """The finished trials by two keys, coloured by their validation accuracy."""
    done = [t for t in search.found["trials"] if t["state"] == "finished"]
    said = [t["validation"] for t in done]
    best = search.chosen
    scale: Dots = {
        "color": [short(v) for v in said], "colorscale": [[i / 3, f"--heat{i}"] for i in range(4)],
        "cmin": min(said), "cmax": max(max(said), min(said) + 1e-6),
        "size": 14, "line": {"color": "--quiet", "width": 1},
        "colorbar": {"tickformat": _form([min(said), max(said)]), "thickness": 12, "outlinewidth": 0, "nticks": 5},
    }  # fmt: skip
    data: list[Dots] = [
        {
            "type": "scatter", "mode": "markers", "name": "finished", "marker": scale,
            "x": [short(t["values"][across["key"]]) for t in done],
            "y": [short(t["values"][up["key"]]) for t in done],
            "customdata": [[f"trial {t['number']}", t["validation"]] for t in done],
            "hovertemplate": "%{customdata[0]}: %{x:.4g}, %{y:.4g}<br>%{customdata[1]:.2%}<extra></extra>",
        },
        {
            "type": "scatter", "mode": "markers", "name": "chosen", "hoverinfo": "skip",
            "x": [short(best["values"][across["key"]])], "y": [short(best["values"][up["key"]])],
            "marker": {"color": "--term3", "symbol": "circle-open", "size": 22, "line": {"width": 3}},
        },
    ]  # fmt: skip
    layout = axes(
        plot_text(across["key"], 40), plot_text(up["key"], 40), height=380, showlegend=False,
        xaxis=_scale(across["low"], across["high"], bool(across.get("log"))),
        yaxis=_scale(up["low"], up["high"], bool(up.get("log"))),
    )  # fmt: skip
    says = f"Validation accuracy of finished trials by {across['key']} and {up['key']}."
    return Panel("", says, data, layout, note="The colour is validation accuracy; the ring is the chosen trial.")


def importance(search: Search) -> Panel:
    """Share of each key in what makes the best trials differ from the others."""
    shares = sorted(search.found["importance"].items(), key=lambda item: item[1])
    data: list[Dots] = [
        {
            "type": "bar", "orientation": "h", "x": [short(v) for _, v in shares], "y": list(range(len(shares))),
            "marker": {"color": "--distilled"}, "hovertemplate": "%{x:.0%}<extra></extra>",
            "text": [f"{v:.0%}" for _, v in shares], "textposition": "auto",
        }
    ]  # fmt: skip
    layout = axes(
        "share", "", height=120 + 40 * len(shares), showlegend=False,
        xaxis={"tickformat": ".0%", "range": [0, 1.02]},
        yaxis={"tickvals": list(range(len(shares))), "ticktext": [plot_text(k, 24) for k, _ in shares]},
    )  # fmt: skip
    says = "; ".join(f"{key}: {v:.0%}" for key, v in reversed(shares))
    note = "PED-ANOVA over the finished trials: a hint, not a measurement, with so few."
    return Panel("", f"Importance of keys. {says}.", data, layout, note=note)
