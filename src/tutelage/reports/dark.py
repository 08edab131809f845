"""The part of the page on dark knowledge: which classes the teacher finds alike, and whether the students do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from tutelage.reports.panel import Panel, plot_text, short
from tutelage.reports.parts import control, role, table
from tutelage.reports.read import Run
from tutelage.reports.similarity import Alike, Matrix, alike, pairs_of, spread
from tutelage.reports.wording import ABSENT, BASELINE, DISTILLED, called, count, escaped

PAIRS = 10
"""Pairs in the table."""

FEW_CLASSES = 12
"""Up to so many, the cells of a map hold their values."""

LABELS = 25
"""Most labels on an axis of a map."""

PAPER = 320
"""Width of a map on paper, in pixels: two side by side."""

NOTE = (
    "<p class='note'>What a teacher says beyond the right answer is which other classes it finds like it. "
    "<code>sim(i, j) = E[p_i p_j]</code> over the test split, with <code>p = softmax(logits / T)</code>. Shown is "
    "<code>2 sim(i, j) / (E[p_i] + E[p_j])</code>: where a model sees one of the two classes, the other gets this "
    "share of the probability. It is 0 % where all answers are one-hot, and goes to 1/C for every pair of C classes "
    "as T grows. The diagonal is left out, for it would outshine all else. What is plain from the inputs a student "
    "finds alone, too: so compare the two students.</p>"
)

Place = Callable[[Panel], int]


def dark_knowledge(runs: Sequence[Run], place: Place) -> str:
    """The section, empty where no run kept similarities; ``place`` takes a figure and gives its number."""
    parts = [_of_run(run, place, heading=len(runs) > 1) for run in runs]
    shown = "".join(parts)
    return f"<section><h2>Dark knowledge</h2>{NOTE}{shown}</section>" if shown else ""


def _of_run(run: Run, place: Place, heading: bool) -> str:
    kept = run.similarity.get("teacher")
    if kept is None or kept["classes"] < 2:
        return ""
    title = f"<h3>{escaped(run.label)}</h3>" if heading else ""
    found = alike(run)
    if not found:
        why = f"This run has {count(kept['classes'])} classes, too many to keep how alike they are."
        return f"<div class='panel'>{title}<p class='note'>{escaped(why)}</p></div>"
    names = class_names(run, kept["classes"])
    taught = temperature(run)
    chosen = min(found, key=lambda t: abs(math.log(float(t) / taught)))
    choices = {f"T = {t}{' (as taught)' if float(t) == taught else ''}": t for t in found}
    colours = {"one colour scale for all": "one", "each its own": "own"}
    who = called(run.summary)
    maps = "".join(_map(role, who[role], found, names, chosen, place) for role in found[chosen].mean)
    tables = "".join(
        f"<div data-when='T={escaped(t)}'{'' if t == chosen else ' hidden'}>"
        f"<p class='finding'>{escaped(finding(at, t, names, who))}</p>{_pairs(at, t, names)}</div>"
        for t, at in found.items()
    )
    seeds = max(len(values) for at in found.values() for values in [*at.order.values(), {}])
    level = f"1/C is {percent2(1 / len(names))} here." + (f" Students: mean over {seeds} seeds." if seeds > 1 else "")
    form = (
        f"<form class='controls'>{control('T', choices, chosen=chosen, radios=True)}"
        f"{control('colours', colours)}</form>"
    )
    return (
        f"<figure class='panel dark'><figcaption>{title}<p class='note'>{escaped(level)}</p></figcaption>{form}"
        f"<div class='maps'>{maps}</div>{tables}</figure>"
    )


def temperature(run: Run) -> float:
    """The one that the run's recipe distils at; 4 where it does not say."""
    try:
        taught = float(yaml.safe_load(run.config)["method"]["temperature"])
    except (yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError):
        return 4.0
    return taught if 0 < taught < math.inf else 4.0


def class_names(run: Run, classes: int) -> list[str]:
    """A name for each class, whatever the run called them."""
    given = run.summary.get("classes") or []
    return [given[i] if i < len(given) else f"class {i}" for i in range(classes)]


def percent2(share: float) -> str:
    """``0.09881`` as ``9.88 %``."""
    return f"{100 * share:.2f} %" if math.isfinite(share) else ABSENT


# Maps ----------------------------------------------------------------------------------------------


def _map(who: str, name: str, found: Mapping[str, Alike], names: Sequence[str], chosen: str, place: Place) -> str:
    here = {t: at for t, at in found.items() if who in at.mean}
    closest = "; ".join(
        f"{names[i]} and {names[j]}, {percent2(here[chosen].mean[who][i, j])}" for i, j in here[chosen].closest(3)
    )
    says = f"Map of how alike the classes are to the {name}. At T = {chosen}: {closest}."
    panel = Panel("", says, [_heat(who, name, t, at, names) for t, at in here.items()], _layout(names), square=True)
    return (
        f"<div><h3>{role(name)}</h3><div class='plot' data-figure='{place(panel)}' data-paper='{PAPER}' "
        f"role='img' aria-label='{escaped(says)}' style='height:{panel.layout['height']}px'></div></div>"
    )


def _heat(who: str, name: str, t: str, at: Alike, names: Sequence[str]) -> dict[str, Any]:
    ticks = _distinct([plot_text(name, 40) for name in names])
    matrix = at.mean[who]
    ranges = {"one": _range(list(at.mean.values())), "own": _range([matrix])}
    narrowest = min(high - low for low, high in (_range([m]) for m in at.mean.values()))
    trace: dict[str, Any] = {
        "type": "heatmap",
        "name": name,
        "x": ticks,
        "y": ticks,
        "z": [[short(100 * v) for v in row] for row in matrix.tolist()],
        "colorscale": [[i / 3, f"--heat{i}"] for i in range(4)],
        "colorbar": {
            "orientation": "h", "y": 1.01, "yanchor": "bottom", "thickness": 8, "len": 1, "lenmode": "fraction",
            "xpad": 0, "ypad": 4, "outlinewidth": 0, "nticks": 5, "ticksuffix": " %", "tickfont": {"size": 10},
            "ticklabelposition": "outside top",
        },
        "xgap": 1 if len(names) <= LABELS else 0,
        "ygap": 1 if len(names) <= LABELS else 0,
        "hoverongaps": False,
        "hovertemplate": f"%{{y}} and %{{x}}: %{{z:.2f}} %<extra>{name}, T = {t}</extra>",
        "show": {"T": t},
        "by": {"colours": {name: {"zmin": a, "zmax": b} for name, (a, b) in ranges.items()}},
    }  # fmt: skip
    if len(names) <= FEW_CLASSES:
        trace |= {"texttemplate": f"%{{z:.{1 if narrowest > 4 else 2}f}}", "textfont": {"size": 9}}
    return trace


def _range(matrices: Sequence[Matrix]) -> tuple[float, float]:
    """From the lowest to the highest share in percent, never of no width."""
    values = 100 * np.concatenate([pairs_of(m) for m in matrices])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (short(low), short(high)) if short(low) < short(high) else (low - 0.5, high + 0.5)


def _layout(names: Sequence[str]) -> dict[str, Any]:
    step = math.ceil(len(names) / LABELS)
    ticks = _distinct([plot_text(name, 40) for name in names])[::step]
    labels = [plot_text(name, 12) for name in names][::step]
    axis = {
        "type": "category", "tickmode": "array", "tickvals": ticks, "ticktext": labels, "tickfont": {"size": 11},
        "showgrid": False, "zeroline": False, "automargin": True, "ticks": "", "constrain": "domain",
    }  # fmt: skip
    return {
        "height": 380,
        "margin": {"l": 24, "r": 6, "t": 32, "b": 24},
        "xaxis": {**axis, "tickangle": 0 if max(map(len, labels)) <= 2 else -90},
        "yaxis": {**axis, "autorange": "reversed"},
        "plot_bgcolor": "--rule",
        "showlegend": False,
    }


def _distinct(texts: Sequence[str]) -> list[str]:
    """The texts, those that were there before with a number: plotly takes equal categories for one."""
    found: dict[str, None] = {}
    for text in texts:
        name, i = text, 1
        while name in found:
            name, i = f"{text} ({i + 1})", i + 1
        found[name] = None
    return list(found)


# Pairs -----------------------------------------------------------------------------------------------


def _pairs(at: Alike, t: str, names: Sequence[str]) -> str:
    pairs = at.closest(PAIRS)
    ranks = {who: _places(matrix) for who, matrix in at.mean.items()}

    def cell(who: str, i: int, j: int) -> str:
        value = percent2(at.mean[who][i, j])
        if who == "teacher" or value == ABSENT:
            return escaped(value)
        return f"{escaped(value)} <span class='rank'>{ranks[who][i, j]}</span>"

    rows = [[f"{escaped(names[i])} – {escaped(names[j])}", *(cell(who, i, j) for who in at.mean)] for i, j in pairs]
    heads = [who.capitalize() + ("" if who == "teacher" else ", rank") for who in at.mean]
    caption = f"The classes most alike to the teacher at T = {t}"
    return table(caption, ["Pair", *heads], rows, "pairs")


def _places(matrix: Matrix) -> dict[tuple[int, int], int]:
    """The rank of each pair, the most similar first."""
    rows, columns = np.triu_indices(len(matrix), 1)
    order = np.argsort(-matrix[rows, columns], kind="stable")
    return {(int(rows[k]), int(columns[k])): place for place, k in enumerate(order, 1)}


def finding(at: Alike, t: str, names: Sequence[str], who: Mapping[str, str] = called({})) -> str:
    """The teacher's closest pairs, and how far students order the pairs as it does: no verdict that is not there."""
    closest = [f"{names[i]} and {names[j]}" for i, j in at.closest(3)]
    listed = f"{', '.join(closest[:-1])}, and {closest[-1]}" if len(closest) > 1 else closest[0]
    text = f"At T = {t} the teacher finds most alike: {listed}."
    said = [f"{who[arm]} {_rho(list(order.values()))}" for arm, order in at.order.items() if order]
    if not said:
        return text
    pairs = count(len(pairs_of(at.mean["teacher"])))
    text += (
        f" Do students put the {pairs} pairs of classes in its order? Spearman's rank correlation "
        f"(1: the same order, 0: no relation): {', '.join(said)}."
    )
    more, seeds = at.nearer()
    whose = "distilled student" if who["distilled"] == DISTILLED else who["distilled"]
    if seeds == 1:
        nearer = whose if more else BASELINE
        return f"{text} The {nearer} is nearer to the teacher's order in this one seed, which cannot rule out chance."
    if not seeds:
        return text
    if more == seeds:
        return f"{text} The {whose} is nearer to the teacher's order in each of {seeds} seeds."
    how_many = f"{more} of {seeds} seeds, not in all" if more else f"none of {seeds} seeds"
    return f"{text} The {whose} is nearer to the teacher's order in {how_many}."


def _rho(values: Sequence[float]) -> str:
    found = spread(values)
    text = f"{found['mean']:.2f}" + ("" if found["std"] is None else f"\u00a0±\u00a0{found['std']:.2f}")
    return text.replace("-", "−")
