"""What all figures share: they are plain data for plotly.js.

A colour that starts with ``--`` names a CSS variable of the page, so that plots follow its light and dark schemes.
A trace's ``show`` says for which choices of the panel's controls it is drawn; without one, always. Its ``by`` holds
properties that depend on a choice.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

MOST_POINTS = 2000
"""A curve with more points is thinned to this many, keeping its peaks."""

ROLES = ("teacher", "baseline", "distilled")
COLOUR = {role: f"--{role}" for role in ROLES}
DASH = {"teacher": "dot", "baseline": "dash", "distilled": "solid"}
SYMBOL = {"teacher": "diamond", "baseline": "square", "distilled": "circle"}
TERM_COLOURS = tuple(f"--term{i}" for i in range(1, 7))

Dots = dict[str, Any]


@dataclass
class Panel:
    """One figure of one run.

    Attributes:
        label: the run's, shown where several runs are side by side.
        says: the figure in words, for who cannot see it.
        data: plotly traces.
        layout: plotly layout.
        controls: choices by name: label to value, the first one preset.
        square: as high as it is wide.
        note: how to read it.
        key: the roles whose colours it shows, with what they are called, where it has no legend of plotly's.
        tall: may be taller than the screen and scrolls by itself.
    """

    label: str
    says: str
    data: list[Dots]
    layout: Dots
    controls: dict[str, dict[str, str]] = field(default_factory=dict)
    square: bool = False
    note: str = ""
    key: dict[str, str] = field(default_factory=dict)

    def plotted(self) -> Dots:
        """What the page's script draws."""
        return {"data": self.data, "layout": self.layout, "square": self.square}

    tall: bool = False


def plot_text(text: str, longest: int = 28) -> str:
    """Text for a plot: plotly reads a few HTML tags, so they are escaped; long text is cut."""
    text = " ".join(text.split())
    return html.escape(text if len(text) <= longest else text[: longest - 1] + "…", quote=False)


def role_of(training: str) -> str:
    """Whose training ``baseline-seed0`` is."""
    return training.partition("-")[0]


def thinned(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> list[int]:
    """Indices of at most ``most`` points: the lowest and the highest of each stretch of the curve."""
    if len(x) <= most:
        return list(range(len(x)))
    stretches = most // 2
    edges = [len(x) * i // stretches for i in range(stretches + 1)]
    kept: set[int] = set()
    for start, stop in pairwise(edges):
        kept |= {min(range(start, stop), key=y.__getitem__), max(range(start, stop), key=y.__getitem__)}
    return sorted(kept)


def axes(x: str, y: str, height: int = 340, **more: Any) -> Dots:
    """A layout with titled axes."""
    return {
        "height": height,
        "margin": {"l": 48, "r": 16, "t": 40, "b": 50},
        "xaxis": {"title": {"text": x}, "automargin": True, **more.pop("xaxis", {})},
        "yaxis": {"title": {"text": y}, "automargin": True, **more.pop("yaxis", {})},
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            **more.pop("legend", {}),
        },
        **more,
    }


def short(value: float) -> float:
    """Six digits: more cannot be seen."""
    return float(f"{value:.6g}")
