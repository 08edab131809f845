"""What ``tutelage bench`` found, as a table and as a page with quality drawn against latency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tutelage.files import write_text
from tutelage.reports.style import STYLE
from tutelage.reports.wording import escaped

COLUMNS = {"eager": "eager", "compiled": "compiled", "onnx": "ONNX Runtime", "int8": "ONNX Runtime, int8"}
MARKS = {"eager": "circle", "compiled": "square", "onnx": "diamond", "int8": "triangle"}
COLOURS = {"teacher": "--teacher", "student": "--distilled", "other": "--baseline"}
SHARES = ("accuracy", "f1", "recall", "agreement")
"""Metrics that are shown in per cent."""

HIGHER = ("accuracy", "f1", "matthews", "spearman", "pearson", "recall", "agreement")
"""Metrics of which more is better."""


class Point(NamedTuple):
    """A model run in one way, where both its quality and its latency are known."""

    model: str
    role: str
    column: str
    latency: float
    quality: float


def points(found: Mapping[str, Any]) -> list[Point]:
    """What can be drawn, at the smallest batch."""
    size = str(min(found["batch_sizes"]))
    return [
        Point(model["name"], model["role"], column, way["batches"][size]["p50_ms"], way["quality"])
        for model in found["models"]
        for column, way in model["columns"].items()
        if "failed" not in way and way.get("quality") is not None
    ]


def frontier(found: Sequence[Point], higher: bool = True) -> list[Point]:
    """Those than which no other is both as fast and as good, and one of the two more so; the fastest first."""
    best: list[Point] = []
    for point in sorted(found, key=lambda p: (p.latency, -p.quality if higher else p.quality)):
        if not best or (point.quality > best[-1].quality if higher else point.quality < best[-1].quality):
            best.append(point)
    return best


def table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row for each model and way to run it, at each size of a batch one figure."""
    sizes = [str(size) for size in found["batch_sizes"]]
    first = sizes[0]
    metric = str(found["metric"])
    head = [
        "model", "run by", "parameters", "MB", "MFLOPs", metric, f"p50 ms, {first}", f"p95 ms, {first}",
        "times faster", *(f"per s, {size}" for size in sizes), *(["peak MB"] if _weighed(found) else []),
    ]  # fmt: skip
    rows = []
    for model in found["models"]:
        for column, way in model["columns"].items():
            lead = [model["name"], COLUMNS[column], f"{model['parameters']:,}"]
            if "failed" in way:
                rows.append([*lead, *[""] * (len(head) - 4), "not to be had"])
                continue
            one = way["batches"][first]
            memory = way.get("memory") or {}
            rows.append([
                *lead, _mega(way["bytes"]), _mega(model["flops"]), quality(way.get("quality"), metric),
                f"{one['p50_ms']:.2f}", f"{one['p95_ms']:.2f}", f"{one['faster']:.2f}" if "faster" in one else "",
                *(f"{way['batches'][size]['per_second']:,.0f}" for size in sizes),
                *([_mega(memory.get("peak"))] if _weighed(found) else []),
            ])  # fmt: skip
    return head, rows


def _weighed(found: Mapping[str, Any]) -> bool:
    """Whether peak memory was measured of any."""
    return any(way.get("memory") for model in found["models"] for way in model["columns"].values())


def notes(found: Mapping[str, Any]) -> list[str]:
    """What must be known to read the table."""
    machine = found["machine"]
    said = [
        f"{found['rounds']} rounds, all cells once in each, in another order each time. Times faster: than "
        f"{found['base']} (eager), as the median over rounds of the ratio within a round; seconds of other machines, "
        "or of another hour, differ, ratios less. MFLOPs of one row, a multiplication and an addition being two.",
        f"Machine: {machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, ONNX Runtime "
        f"{machine['onnxruntime'] or 'not installed'}.",
    ]
    if _weighed(found):
        said.append(
            "Peak MB: resident in a process of its own that loads the model and runs the largest batch, its "
            "libraries included; that of ONNX Runtime has no torch."
        )
    for model in found["models"]:
        for column, way in model["columns"].items():
            if "failed" in way:
                said.append(f"{model['name']}, {COLUMNS[column]}: not to be had: {way['failed']}")
    made_up = [model["name"] for model in found["models"] if model["inputs"] == "made up"]
    if made_up:
        said.append(f"Inputs are made up for {', '.join(made_up)}; nothing is known of their quality.")
    return said


def quality(value: float | None, metric: str) -> str:
    """A figure of the test split."""
    if value is None:
        return ""
    return f"{value:.2%}" if metric in SHARES else f"{value:.4g}"


def _mega(count: float | None) -> str:
    """Millions, with two decimals or two digits that say something."""
    if count is None:
        return ""
    return f"{count / 1e6:.2g}" if 0 < count < 1e5 else f"{count / 1e6:,.{0 if count >= 1e8 else 2}f}"


def write_bench(found: Mapping[str, Any], out: Path) -> Path:
    """Write the page; it asks nothing of the network and runs no script."""
    head, rows = table(found)
    drawn = points(found)
    lines = "".join(
        "<tr>" + "".join(f"<{'th' if i == 0 else 'td'}>{escaped(c)}</{'th' if i == 0 else 'td'}>"
                         for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )  # fmt: skip
    plot = ""
    if drawn:
        plots = "".join(f'<div class="{kind}">{svg(found, drawn, width)}</div>' for kind, width in WIDTHS.items())
        plot = f'<div class="panel">{plots}{_key(drawn)}</div>'
    titles = "".join(f"<th>{escaped(title)}</th>" for title in head)
    html = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Bench of {escaped(found['base'])}</title><style>{STYLE}{_STYLE}</style></head><body><main>"
        f'<h1>tutelage bench</h1><p class="verdict">{escaped(verdict(found))}</p>{plot}'
        f'<div class="scroll ways" tabindex="0"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
        + "".join(f'<p class="note">{escaped(note)}</p>' for note in notes(found))
        + "</main></body></html>\n"
    )
    write_text(Path(out), html)
    return Path(out)


def verdict(found: Mapping[str, Any]) -> str:
    """The fastest way to run a student, beside what it is compared with."""
    size = str(min(found["batch_sizes"]))
    ways = [
        (way["batches"][size]["faster"], model, column)
        for model in found["models"]
        if model["role"] != "teacher"
        for column, way in model["columns"].items()
        if "failed" not in way and "faster" in way["batches"][size]
    ]
    if not ways:
        return "Nothing to compare."
    faster, model, column = max(ways, key=lambda way: way[0])
    kept = model["columns"][column].get("quality")
    at = "" if kept is None else f", at {quality(kept, found['metric'])} {found['metric']}"
    return (
        f"{model['name']} in {COLUMNS[column]} is {faster:.1f} times as fast as {found['base']} in eager torch{at}."
    )


# The plot ----------------------------------------------------------------------------------------------

WIDTHS = {"wide": 760, "slim": 380}
"""Of the plot, for a screen and for a telephone, where its text would else be too small to read."""

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 58, 20, 28, 52
_STYLE = """
svg { display: block; }
.wide svg, .slim svg { width: 100%; height: auto; max-width: 960px; margin: 0 auto; }
.slim { display: none; }
@media (max-width: 640px) { .wide { display: none; } .slim { display: block; } }
svg text { fill: var(--ink); font-size: 13px; }
svg .quiet { fill: var(--quiet); }
svg .rule { stroke: var(--rule); }
svg .frontier { stroke: var(--quiet); fill: none; stroke-dasharray: 5 4; stroke-width: 1.5; }
svg .mark { stroke: var(--card); stroke-width: 1.5; }
svg .outline { fill: none; stroke: var(--quiet); stroke-width: 1.5; }
.key span { display: inline-flex; align-items: center; gap: 6px; }
.ways td:nth-child(2), .ways th:nth-child(2) { text-align: left; }
"""


def svg(found: Mapping[str, Any], drawn: Sequence[Point], width: int) -> str:
    """Quality against latency (logarithmic) at the smallest batch, with the frontier."""
    metric, size = str(found["metric"]), min(found["batch_sizes"])
    low, high = min(p.latency for p in drawn), max(p.latency for p in drawn)
    left, right = math.log10(low) - 0.06, math.log10(high) + 0.06
    worst, best = min(p.quality for p in drawn), max(p.quality for p in drawn)
    pad = max(0.08 * (best - worst), 0.002 * max(abs(best), 1e-9))
    bottom, top = worst - pad, best + pad

    def x(latency: float) -> float:
        return LEFT + (math.log10(latency) - left) / (right - left) * (width - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in _on_log(10**left, 10**right, (width - LEFT - RIGHT) // 36):
        parts.append(f'<line class="rule" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="quiet" text-anchor="middle" x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}">{tick:g}</text>'
        )
    share = metric in SHARES
    for value, decimals in _even(100 * bottom if share else bottom, 100 * top if share else top, 6):
        at = y(value / 100 if share else value)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="quiet" text-anchor="end" x="{LEFT - 8}" y="{at + 4:.1f}">'
            f"{value:.{decimals}f}{'%' if share else ''}</text>"
        )
    edge = frontier(drawn, metric in HIGHER)
    path = " ".join(f"{x(p.latency):.1f},{y(p.quality):.1f}" for p in edge)
    parts.append(f'<polyline class="frontier" points="{path}"/>')
    for p in drawn:
        said = f"{p.model}, {COLUMNS[p.column]}: {quality(p.quality, metric)}, {p.latency:.2f} ms"
        parts.append(
            f'<g class="mark" fill="var({_colour(p.role)})"><title>{escaped(said)}</title>'
            f"{_mark(MARKS[p.column], x(p.latency), y(p.quality))}</g>"
        )
    middle = (LEFT + width - RIGHT) / 2
    parts.append(
        f'<text text-anchor="middle" x="{middle:.0f}" y="{HEIGHT - BOTTOM + 40}">'
        f"milliseconds a batch of {size}, p50 (logarithmic)</text>"
    )
    parts.append(f'<text x="{LEFT}" y="{TOP - 10}">{escaped(metric)} on the test split</text>')
    says = "; ".join(f"{p.model} {COLUMNS[p.column]} {quality(p.quality, metric)} {p.latency:.2f} ms" for p in edge)
    label = escaped(f"{metric} against latency. On the frontier: {says}.")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{label}">'
        + "".join(parts)
        + "</svg>"
    )


def _key(drawn: Sequence[Point]) -> str:
    """Colours are models, shapes are ways to run them."""
    signs = [
        *(("circle", f'fill="var({_colour(role)})"', role) for role in dict.fromkeys(p.role for p in drawn)),
        *((MARKS[way], 'class="outline"', COLUMNS[way]) for way in dict.fromkeys(p.column for p in drawn)),
    ]
    cells = "".join(
        f'<span><svg width="20" height="20" aria-hidden="true"><g {how}>{_mark(shape, 10, 10)}</g></svg>'
        f"{escaped(name)}</span>"
        for shape, how, name in signs
    )
    return (
        f'<p class="key">{cells}<span><svg width="28" height="20" aria-hidden="true">{_DASH}</svg>frontier</span></p>'
    )


_DASH = '<line class="frontier" x1="2" x2="26" y1="10" y2="10"/>'


def _colour(role: str) -> str:
    return COLOURS.get(role, COLOURS["other"])


def _mark(kind: str, x: float, y: float) -> str:
    r = 6
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    if kind == "square":
        return f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}"/>'
    corners = {"diamond": [(0, -8), (8, 0), (0, 8), (-8, 0)], "triangle": [(0, -8), (8, 6), (-8, 6)]}[kind]
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)}"/>'


def _on_log(low: float, high: float, most: int) -> list[float]:
    """At most so many round numbers between two: 1, 2 and 5 times powers of ten, or fewer, or evenly spaced ones."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if 2 <= len(found) <= most:
            return found
    return [value for value, _ in _even(low, high, min(most, 6))]


def _even(low: float, high: float, most: int) -> list[tuple[float, int]]:
    """At most so many multiples of 1, 2 or 5 times a power of ten between two numbers, with their decimals."""
    power = math.floor(math.log10((high - low) / most))
    step = next(s for k in (power, power + 1) for m in (1, 2, 5) if (high - low) / (s := m * 10.0**k) <= most - 1)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(i * step, decimals) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
