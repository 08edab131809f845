"""The results of the lab: a page, and Markdown with pictures."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.errors import require
from tutelage.evaluation.statistics import spread
from tutelage.reports.formatting import ABSENT
from tutelage.reports.page import render
from tutelage.reports.plotting import Figure, Json, axes, category_ticks, plot_text, scatter

COLOURS = {"distilled": "#0a66c2", "baseline": "#bd5a00", "teacher": "#5b6672"}
"""Of the series in a plot, one after the other: names on the page, values in pictures."""
SYMBOLS = ("circle", "square", "diamond")
MARKERS = ("o", "s", "D")
SIGNS = {"reproduced": "✓", "not reproduced": "✗", "inconclusive": "?"}

TITLE = "Claims from the literature, measured"


def number(statement: Mapping[str, Any], value: float | None) -> str:
    """A value in the unit of the statement."""
    if value is None:
        return ABSENT
    if statement["unit"] == "points":
        return f"{100 * value:+.2f}".replace("-", "−")
    return f"{value:.2g}" if abs(value) < 1e-3 else f"{value:.3f}".replace("-", "−")


def measurement(statement: Mapping[str, Any]) -> str:
    """``+1.20 points (+0.80 to +1.60)``."""
    low, high = (number(statement, statement[end]) for end in ("low", "high"))
    text = f"{number(statement, statement['mean'])} {statement['unit']}".rstrip()
    return text if statement["low"] is None else f"{text} ({low} to {high})"


def verdict_text(statement: Mapping[str, Any]) -> str:
    """The verdict; for an inconclusive statement with the number of seeds that would decide it."""
    more = statement.get("seeds_needed")
    return statement["verdict"] + (f" (about {more:,} seeds would decide)" if more else "")


def facts(lab: Mapping[str, Any]) -> str:
    """The data, the length of the trainings and the number of seeds."""
    kinds = dict.fromkeys(base for e in lab["experiments"].values() for base in e.get("bases", ["images"]))
    recipes = {"images": lab["recipe"], "texts": lab.get("texts"), "llm": lab.get("llm")}
    texts = [
        _recipe_facts(kind, recipe, lab["seeds"]) for kind, recipe in recipes.items() if kind in kinds and recipe
    ]
    return f"{'; '.join(texts)}; budget {lab['budget']}."


def _recipe_facts(kind: str, recipe: Mapping[str, Any], seeds: Sequence[int]) -> str:
    data, train = recipe["data"], recipe["train"]
    path = data.get("path")
    file = path.get("train") if isinstance(path, Mapping) else path
    text = data["source"] if file is None else Path(file).name
    if kind == "llm":
        text = f"a closed teacher's answers in {text}"
    if data.get("labels"):
        text += f", {data['labels']:,} labelled images"
    elif data.get("limit"):
        text += f", {data['limit']:,} texts"
    length = f"{train['epochs']} epochs" if train.get("epochs") else f"{train['steps']} steps"
    return f"{text}, {length}, {len(recipe.get('seeds', seeds))} seeds an arm"


def lab_page(lab: Mapping[str, Any]) -> str:
    """``lab.html``."""
    experiments = lab["experiments"]
    counts = {verdict: sum(e["verdict"] == verdict for e in experiments.values()) for verdict in SIGNS}
    return render(
        "lab.html.jinja", title=TITLE, facts=facts(lab), experiments=experiments, signs=SIGNS,
        verdict=", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n), mean=_mean_percent,
        measurement=measurement, verdict_text=verdict_text, plotted=plotted,
    )  # fmt: skip


def plotted(name: str, plot: Mapping[str, Any]) -> Figure:
    """A plot for plotly: lines over numbers, or a row for each label."""
    labels = list(dict.fromkeys(p["x"] for points in plot["series"].values() for p in points))
    has_rows, percent = any(isinstance(v, str) for v in labels), plot["percent"]
    data: list[Json] = []
    for i, (series, points) in enumerate(plot["series"].items()):
        colour = f"--{list(COLOURS)[i % len(COLOURS)]}"
        shift = (i - (len(plot["series"]) - 1) / 2) * 0.24
        means = [p["mean"] for p in points]
        error = {
            "type": "data", "symmetric": False, "color": colour, "thickness": 2, "width": 4,
            "array": [None if p["high"] is None else p["high"] - p["mean"] for p in points],
            "arrayminus": [None if p["low"] is None else p["mean"] - p["low"] for p in points],
        }  # fmt: skip
        style: Json = {
            "marker": {"color": colour, "symbol": SYMBOLS[i % 3], "size": 9}, "line": {"color": colour, "width": 2},
            "hovertemplate": f"%{{{'x' if has_rows else 'y'}{':.2%' if percent else ''}}}"
            "<extra>%{fullData.name}</extra>",
        }  # fmt: skip
        if has_rows:
            rows = [labels.index(p["x"]) + shift for p in points]
            data.append(scatter(series, means, rows, error_x=error, **style))
        else:
            data.append(scatter(series, [p["x"] for p in points], means, "lines+markers", error_y=error, **style))
    values: Json = {"nticks": 4} if has_rows else {}
    if plot["log_y"]:
        values = {"type": "log", "dtick": 1, "exponentformat": "power"}
    values |= {"tickformat": ".1%"} if percent else {}
    if has_rows:
        places = category_ticks([plot_text(str(v), 22) for v in labels]) | {"range": [len(labels) - 0.4, -0.6]}
        layout = axes(plot["y"], "", 130 + 44 * len(labels), xaxis={**values, "tickangle": 0}, yaxis=places)
    else:
        ticks = [f"{v:.2g}" if v < 1 else f"{v:.0f}" for v in labels] if plot["log_x"] else []
        places = {"type": "log", "tickvals": labels, "ticktext": ticks, "tickangle": 0} if ticks else {}
        layout = axes(plot["x"], plot["y"], xaxis=places, yaxis=values)
    description = "; ".join(
        f"{series}: " + ", ".join(f"{p['x']} {p['mean']:.4g}" for p in points)
        for series, points in plot["series"].items()
    )
    return Figure(name, f"{plot['caption']} {description}.", data, layout)


def markdown(lab: Mapping[str, Any]) -> dict[str, str]:
    """``lab.md`` and its pictures, by name."""
    pictures = {
        name: {f"lab-{name}{'' if i == 0 else f'-{i + 1}'}.svg": plot for i, plot in enumerate(experiment["plots"])}
        for name, experiment in lab["experiments"].items()
    }
    text = render(
        "lab.md.jinja", title=TITLE, facts=facts(lab), experiments=lab["experiments"], pictures=pictures,
        measurement=measurement, verdict_text=verdict_text, mean=_mean_percent,
    )  # fmt: skip
    return {"lab.md": text, **{file: picture(plot) for plots in pictures.values() for file, plot in plots.items()}}


def _mean_percent(values: Sequence[float]) -> str:
    over_seeds = spread(values)
    deviation = "" if over_seeds["std"] is None else f" ± {100 * over_seeds['std']:.2f}"
    return f"{100 * over_seeds['mean']:.2f}{deviation}"


def picture(plot: Mapping[str, Any]) -> str:
    """A plot as SVG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", "lab", "the lab's pictures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(p["x"] for points in plot["series"].values() for p in points))
    has_names, scale = any(isinstance(v, str) for v in labels), 100 if plot["percent"] else 1
    with mpl.rc_context({"svg.hashsalt": "tutelage", "svg.fonttype": "none", "font.size": 10}):
        drawing = Figure(figsize=(6.4, 3.8), layout="constrained")
        ax = drawing.add_subplot()
        for i, (series, points) in enumerate(plot["series"].items()):
            shift = (i - (len(plot["series"]) - 1) / 2) * 0.16 if has_names else 0.0
            x = [labels.index(p["x"]) + shift if has_names else p["x"] for p in points]
            errors = [
                [0.0 if p["low"] is None else scale * (p["mean"] - p["low"]) for p in points],
                [0.0 if p["high"] is None else scale * (p["high"] - p["mean"]) for p in points],
            ]
            ax.errorbar(x, [scale * p["mean"] for p in points], yerr=errors, capsize=3, label=series,
                        color=list(COLOURS.values())[i % 3],
                        fmt=MARKERS[i % 3] + ("" if has_names else "-"))  # fmt: skip
        if has_names:
            ax.set_xticks(range(len(labels)), [str(v).replace(" ", "\n", 1) for v in labels], fontsize=8)
            ax.set_xlim(-0.6, len(labels) - 0.4)
        if plot["log_x"]:
            ax.set_xscale("log")
            if len(labels) < 9:
                ax.set_xticks(labels, [f"{v:.3g}" for v in labels])
                ax.minorticks_off()
        if plot["log_y"]:
            ax.set_yscale("log")
        unit = "" if not plot["percent"] else ", points" if "gain" in plot["y"] else ", %"
        ax.set_xlabel(plot["x"])
        ax.set_ylabel(plot["y"] + unit)
        ax.grid(alpha=0.25)
        ax.legend(fontsize=8)
        text = io.StringIO()
        drawing.savefig(text, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
