"""The parts that all figures share. Figures are plain data for plotly.js; ``static/figures.js`` adds the styles.

A trace has these keys beside plotly's:

- ``style``: the name of its style in ``figures.js``; ``role``: the role whose colour and symbol the style uses.
- ``show``: the values of the figure's controls for which it is drawn. A trace without it is always drawn.
- ``by``: properties that depend on a control.

A colour that starts with ``--`` names a CSS variable of the page, so plots follow its light and dark schemes.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

MOST_POINTS = 2000
"""A curve with more points is thinned to this many; its peaks stay."""

ROLES = ("teacher", "baseline", "distilled")
Json = dict[str, Any]


@dataclass(frozen=True)
class Control:
    """A control of a figure.

    Attributes:
        name: of the form field.
        choices: label to value.
        preset: the value at first. Default: the first one.
        radios: shows all choices, also where there are more than two.
    """

    name: str
    choices: dict[str, str]
    preset: str | None = None
    radios: bool = False


@dataclass
class Figure:
    """A figure.

    Attributes:
        label: name of its run, for figures side by side.
        description: the figure in text, for readers who cannot see it.
        data: plotly traces.
        layout: plotly layout.
        controls: choices of the reader.
        note: how to read it.
        legend: names by role, where plotly draws no legend.
        is_square: as high as wide.
        scrolls: may be taller than the screen, and scrolls.
        paper_width: in pixels; ``None`` for that of the page.
    """

    label: str
    description: str
    data: list[Json]
    layout: Json
    controls: Sequence[Control] = ()
    note: str = ""
    legend: dict[str, str] = field(default_factory=dict)
    is_square: bool = False
    scrolls: bool = False
    paper_width: int | None = None

    @property
    def plot(self) -> Json:
        """The data for ``figures.js``."""
        return {"data": self.data, "layout": self.layout, "square": self.is_square}


def plot_text(text: str, longest: int = 28) -> str:
    """Text for a plot: plotly interprets some HTML tags, so they are escaped; long text is cut."""
    text = " ".join(text.split())
    return html.escape(text if len(text) <= longest else text[: longest - 1] + "…", quote=False)


def role_of(training: str) -> str:
    """``baseline`` of ``baseline-seed0``."""
    return training.partition("-")[0]


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> list[int]:
    """Indices of at most ``most`` points: the lowest and the highest of each stretch of the curve."""
    if len(x) <= most:
        return list(range(len(x)))
    stretches = most // 2
    edges = [len(x) * i // stretches for i in range(stretches + 1)]
    indices: set[int] = set()
    for start, stop in pairwise(edges):
        indices |= {min(range(start, stop), key=y.__getitem__), max(range(start, stop), key=y.__getitem__)}
    return sorted(indices)


def axes(x: str, y: str, height: int = 340, **more: Any) -> Json:
    """A layout with titled axes."""
    xaxis, yaxis = ({"title": {"text": title}, **more.pop(name, {})} for title, name in ((x, "xaxis"), (y, "yaxis")))
    return {"height": height, "xaxis": xaxis, "yaxis": yaxis, **more}


def row_axes(x: str, names: Sequence[str], values: Sequence[float], height: int, ticks: int) -> Json:
    """A layout with one row for each name, top down, and an axis of percentages around ``values``."""
    low, high = min(values), max(values)
    pad = max(0.002, 0.06 * (high - low))
    xaxis = {"nticks": ticks, "tickformat": percent_ticks(low, high), "range": [low - pad, high + pad]}
    return axes(
        x, "", height, style="rows", xaxis=xaxis, yaxis=category_ticks(names) | {"range": [len(names) - 0.4, -0.6]}
    )


def category_ticks(names: Sequence[str]) -> Json:
    """Properties of an axis that has a tick with a name at 0, 1, 2 and so on."""
    return {"tickvals": list(range(len(names))), "ticktext": list(names), "showgrid": False, "zeroline": False}


def percent_ticks(low: float, high: float) -> str:
    """The format of percentages: without decimals where the axis is long enough."""
    return ".0%" if high - low > 0.08 else ".1%"


def scatter(name: str, x: Sequence[Any], y: Sequence[Any], mode: str = "markers", **more: Any) -> Json:
    """A scatter trace."""
    return {"type": "scatter", "mode": mode, "name": name, "x": list(x), "y": list(y), **more}


def short(value: float) -> float:
    """The value with six digits, which is more than a plot can show."""
    return float(f"{value:.6g}")
