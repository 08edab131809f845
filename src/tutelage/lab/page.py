"""What the lab found, as a page, and as Markdown with pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.errors import require
from tutelage.reports.page import document
from tutelage.reports.panel import Dots, Panel, axes, plot_text
from tutelage.reports.parts import figure, table
from tutelage.reports.wording import ABSENT, escaped

COLOURS = ("distilled", "baseline", "teacher")
INK = {"distilled": "#0a66c2", "baseline": "#bd5a00", "teacher": "#5b6672"}
SYMBOLS = ("circle", "square", "diamond")
MARKS = ("o", "s", "D")
SIGNS = {"reproduced": "✓", "not reproduced": "✗", "inconclusive": "?"}

HOW = (
    "Every claim of the lecture is an experiment: arms that differ in one thing, over the same seeds. Intervals are "
    "95 % (Student's), of differences paired by seed. Accuracies are of the test split at the last epoch unless it "
    "says otherwise, so nothing was selected on it. A claim is reproduced when its interval says so, not reproduced "
    "when the interval leaves no room for a gain that matters, and inconclusive else."
)


def number(part: Mapping[str, Any], value: float | None) -> str:
    """A figure in the part's unit."""
    if value is None:
        return ABSENT
    if part["unit"] == "points":
        return f"{100 * value:+.2f}".replace("-", "−")
    return f"{value:.2g}" if abs(value) < 1e-3 else f"{value:.3f}".replace("-", "−")


def measured(part: Mapping[str, Any]) -> str:
    """``+1.20 points (+0.80 to +1.60)``."""
    unit = f" {part['unit']}" if part["unit"] else ""
    held = ""
    if part["low"] is not None:
        held = f" ({number(part, part['low'])} to {number(part, part['high'])})"
    return f"{number(part, part['mean'])}{unit}{held}"


def decided(part: Mapping[str, Any]) -> str:
    """The verdict; of an inconclusive part with what would decide it."""
    more = part.get("would_decide")
    return part["verdict"] + (f" (about {more:,} seeds would decide)" if more else "")


def facts(found: Mapping[str, Any]) -> str:
    """On what it was measured: the data of each kind that an experiment is of, and how long and often arms train."""
    kinds = dict.fromkeys(base for e in found["experiments"].values() for base in e.get("bases", ["images"]))
    recipes = {"images": found["recipe"], "texts": found.get("texts"), "llm": found.get("llm")}
    told = [
        _facts(kind, recipe, found["seeds"])
        for kind, recipe in recipes.items()
        if kind in kinds and recipe is not None
    ]
    return f"{'; '.join(told)}; budget {found['budget']}."


def _facts(kind: str, recipe: Mapping[str, Any], seeds: Sequence[int]) -> str:
    data, train = recipe["data"], recipe["train"]
    path = data.get("path")
    file = path.get("train") if isinstance(path, Mapping) else path
    what = data["source"] if file is None else Path(file).name
    if kind == "llm":
        what = f"a closed teacher's answers in {what}"
    if data.get("labels"):
        what += f", {data['labels']:,} labelled images"
    elif data.get("limit"):
        what += f", {data['limit']:,} texts"
    length = f"{train['epochs']} epochs" if train.get("epochs") else f"{train['steps']} steps"
    return f"{what}, {length}, {len(recipe.get('seeds', seeds))} seeds an arm"


def lab_page(found: Mapping[str, Any]) -> str:
    """``lab.html``."""
    drawn: list[Panel] = []
    experiments = found["experiments"]
    counts = {v: sum(e["verdict"] == v for e in experiments.values()) for v in SIGNS}
    summary = ", ".join(f"{many} {verdict}" for verdict, many in counts.items() if many)
    head = (
        f"<header><h1>The lecture's claims, measured</h1><p class='verdict'>{escaped(summary)}</p>"
        f"<p class='note'>{escaped(facts(found))}</p><p class='note'>{escaped(HOW)}</p></header>"
    )
    rows = [
        [f"<a href='#{escaped(name)}'>{escaped(name)}</a>", escaped(e["claim"]),
         escaped(f"{SIGNS[e['verdict']]} {e['verdict']}")]
        for name, e in experiments.items()
    ]  # fmt: skip
    parts = [head, table("Claims", ["Experiment", "Claim", "Verdict"], rows, "words")]
    for name, e in experiments.items():
        judged = [
            [escaped(p["says"]), escaped(measured(p)), escaped(f"{SIGNS[p['verdict']]} {decided(p)}"),
             escaped(p["rule"])]
            for p in e["parts"]
        ]  # fmt: skip
        pictures = ""
        for one in e["figures"]:
            panel = plotted(name, one)
            drawn.append(panel)
            pictures += figure(panel, len(drawn) - 1, subheading=one["says"])
        notes = "".join(f"<p class='note'>{escaped(note)}</p>" for note in e["notes"])
        parts.append(
            f"<section id='{escaped(name)}'><h2>{escaped(name)}: {escaped(SIGNS[e['verdict']])} "
            f"{escaped(e['verdict'])}</h2><p>{escaped(e['claim'])}</p><p class='note'>{escaped(e['design'])}</p>"
            f"{table('Measured', ['Statement', 'Measured', 'Verdict', 'Rule'], judged, 'words')}"
            f"<div class='panels'>{pictures}</div>{notes}{_arms(e['figures_by_arm'])}</section>"
        )
    return document("The lecture's claims, measured", "\n".join(parts), drawn, "tutelage lab")


def _arms(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    if not found:
        return ""
    many = max(len(v["last"]) for v in found.values())
    rows = [
        [escaped(label), *(escaped(f"{100 * sum(v[w]) / len(v[w]):.2f} %") for w in ("last", "best")),
         *(escaped(f"{100 * x:.2f}") for x in v["last"])]
        for label, v in found.items()
    ]  # fmt: skip
    columns = ["Arm", "Last epoch", "Best on validation", *(f"seed {i + 1} of {many}" for i in range(many))]
    return f"<details><summary>Every arm and seed</summary>{table('Test accuracy', columns, rows)}</details>"


def plotted(name: str, one: Mapping[str, Any]) -> Panel:
    """A figure for plotly: lines over numbers, or a row for each label."""
    labels = list(dict.fromkeys(p["x"] for points in one["series"].values() for p in points))
    words = any(isinstance(v, str) for v in labels)
    value, place = ("x", "y") if words else ("y", "x")
    data: list[Dots] = []
    for at, (series, points) in enumerate(one["series"].items()):
        colour = COLOURS[at % len(COLOURS)]
        shift = (at - (len(one["series"]) - 1) / 2) * 0.24
        data.append(
            {
                "type": "scatter", "mode": "markers" if words else "lines+markers", "name": series,
                place: [labels.index(p["x"]) + shift if words else p["x"] for p in points],
                value: [p["mean"] for p in points],
                f"error_{value}": {
                    "type": "data", "symmetric": False, "color": f"--{colour}", "thickness": 2, "width": 4,
                    "array": [None if p["high"] is None else p["high"] - p["mean"] for p in points],
                    "arrayminus": [None if p["low"] is None else p["mean"] - p["low"] for p in points],
                },
                "marker": {"color": f"--{colour}", "symbol": SYMBOLS[at % 3], "size": 9},
                "line": {"color": f"--{colour}", "width": 2},
                "hovertemplate": f"%{{{value}{':.2%' if one['percent'] else ''}}}<extra>%{{fullData.name}}</extra>",
            }
        )  # fmt: skip
    values: Dots = (
        {"type": "log", "dtick": 1, "exponentformat": "power"} if one["log_y"] else {"nticks": 4} if words else {}
    )
    if one["percent"]:
        values["tickformat"] = ".1%"
    places: Dots = {"type": "log"} if one["log_x"] else {}
    if words:
        places = {"tickvals": list(range(len(labels))), "ticktext": [plot_text(str(v), 22) for v in labels],
                  "range": [len(labels) - 0.4, -0.6], "showgrid": False, "zeroline": False}  # fmt: skip
        layout = axes(one["y"], "", height=130 + 44 * len(labels), xaxis={**values, "tickangle": 0}, yaxis=places)
    else:
        if one["log_x"]:
            places |= {"tickvals": labels, "ticktext": [f"{v:.2g}" if v < 1 else f"{v:.0f}" for v in labels],
                       "tickangle": 0}  # fmt: skip
        layout = axes(one["x"], one["y"], xaxis=places, yaxis=values)
    says = "; ".join(
        f"{series}: " + ", ".join(f"{p['x']} {p['mean']:.4g}" for p in points)
        for series, points in one["series"].items()
    )
    return Panel(name, f"{one['says']} {says}.", data, layout)


def written(found: Mapping[str, Any]) -> dict[str, str]:
    """``lab.md``, and the pictures it shows, by name.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    lines = ["# The lecture's claims, measured", "", facts(found), "", HOW, "", "| experiment | claim | verdict |",
             "| --- | --- | --- |"]  # fmt: skip
    experiments = found["experiments"]
    lines += [f"| [{name}](#{name}) | {e['claim']} | {e['verdict']} |" for name, e in experiments.items()]
    files: dict[str, str] = {}
    for name, e in experiments.items():
        lines += ["", f"## {name}", "", f"{e['claim']} **{e['verdict'].capitalize()}.**", "", e["design"], "",
                  "| statement | measured | verdict |", "| --- | --- | --- |"]  # fmt: skip
        lines += [f"| {p['says']} | {measured(p)} | {decided(p)} |" for p in e["parts"]]
        if e["figures_by_arm"]:
            lines += ["", "| arm | last epoch, % | best on validation, % |", "| --- | --- | --- |"]
            lines += [
                f"| {label} | {_percent(v['last'])} | {_percent(v['best'])} |"
                for label, v in e["figures_by_arm"].items()
            ]
        for note in e["notes"]:
            lines += ["", note]
        for i, one in enumerate(e["figures"]):
            file = f"lab-{name}{'' if i == 0 else f'-{i + 1}'}.svg"
            files[file] = picture(one)
            lines += ["", f"![{one['says']}]({file})"]
    return {"lab.md": "\n".join(lines) + "\n", **files}


def _percent(values: Sequence[float]) -> str:
    from tutelage.evaluation.statistics import spread

    found = spread(values)
    deviation = "" if found["std"] is None else f" ± {100 * found['std']:.2f}"
    return f"{100 * found['mean']:.2f}{deviation}"


def picture(one: Mapping[str, Any]) -> str:
    """A figure as SVG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", "lab", "the lab's pictures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "tutelage", "svg.fonttype": "none", "font.size": 10}):
        drawn = Figure(figsize=(6.4, 3.8), layout="constrained")
        ax = drawn.add_subplot()
        scale = 100 if one["percent"] else 1
        labels = list(dict.fromkeys(p["x"] for points in one["series"].values() for p in points))
        words = any(isinstance(v, str) for v in labels)
        for at, (series, points) in enumerate(one["series"].items()):
            shift = (at - (len(one["series"]) - 1) / 2) * 0.16 if words else 0.0
            x = [labels.index(p["x"]) + shift if words else p["x"] for p in points]
            y = [scale * p["mean"] for p in points]
            spread = [
                [0.0 if p["low"] is None else scale * (p["mean"] - p["low"]) for p in points],
                [0.0 if p["high"] is None else scale * (p["high"] - p["mean"]) for p in points],
            ]
            ax.errorbar(x, y, yerr=spread, fmt=MARKS[at % 3] + ("" if words else "-"), capsize=3,
                        color=INK[COLOURS[at % 3]], label=series)  # fmt: skip
        if words:
            ax.set_xticks(range(len(labels)), [str(v).replace(" ", "\n", 1) for v in labels], fontsize=8)
            ax.set_xlim(-0.6, len(labels) - 0.4)
        if one["log_x"]:
            ax.set_xscale("log")
            if len(labels) < 9:
                ax.set_xticks(labels, [f"{v:.3g}" for v in labels])
                ax.minorticks_off()
        if one["log_y"]:
            ax.set_yscale("log")
        ax.set_xlabel(one["x"])
        ax.set_ylabel(one["y"] + (", %" if one["percent"] and "gain" not in one["y"] else ", points" if one["percent"]
                                  else ""))  # fmt: skip
        ax.grid(alpha=0.25)
        ax.legend(fontsize=8)
        text = io.StringIO()
        drawn.savefig(text, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
