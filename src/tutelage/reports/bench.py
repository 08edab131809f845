"""The result of ``tutelage bench``: a table, and a page with quality against latency."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tutelage.files import write_text

RUNTIMES = {"eager": "eager", "compiled": "compiled", "onnx": "ONNX Runtime", "int8": "ONNX Runtime, int8"}

RANDOM_INPUTS = "made up"
"""The value of ``inputs`` of a model that was measured on random inputs."""

FRACTIONS = ("accuracy", "f1", "recall", "agreement")
"""Metrics that are shown in per cent."""

HIGHER_IS_BETTER = ("accuracy", "f1", "matthews", "spearman", "pearson", "r2", "recall", "agreement")


class BenchPoint(NamedTuple):
    """A model in one runtime, with its quality and its latency at the smallest batch."""

    model: str
    role: str
    runtime: str
    latency: float
    quality: float


def points(bench: Mapping[str, Any]) -> list[BenchPoint]:
    """All models and runtimes of which both figures are known."""
    size = str(min(bench["batch_sizes"]))
    return [
        BenchPoint(model["name"], model["role"], runtime, cell["batches"][size]["p50_ms"], cell["quality"])
        for model in bench["models"]
        for runtime, cell in model["columns"].items()
        if "failed" not in cell and cell.get("quality") is not None
    ]


def frontier(points: Sequence[BenchPoint], higher: bool = True) -> list[BenchPoint]:
    """The Pareto frontier: points that no other point beats in latency and quality; the fastest first."""
    best: list[BenchPoint] = []
    for point in sorted(points, key=lambda p: (p.latency, -p.quality if higher else p.quality)):
        if not best or (point.quality > best[-1].quality if higher else point.quality < best[-1].quality):
            best.append(point)
    return best


def table(bench: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row for each model and runtime."""
    sizes = [str(size) for size in bench["batch_sizes"]]
    first, metric, has_memory = sizes[0], str(bench["metric"]), _has_memory(bench)
    head = [
        "model", "runtime", "parameters", "MB", "MFLOPs", metric, "agreement", f"p50 ms, {first}", f"p95 ms, {first}",
        "speed-up", *(f"per s, {size}" for size in sizes), *(["peak MB"] if has_memory else []),
    ]  # fmt: skip
    rows = []
    for model in bench["models"]:
        for runtime, cell in model["columns"].items():
            start = [model["name"], RUNTIMES[runtime], f"{model['parameters']:,}"]
            if "failed" in cell:
                rows.append([*start, *[""] * (len(head) - 4), "not available"])
                continue
            batch = cell["batches"][first]
            rows.append([
                *start, _mega(cell["bytes"]), _mega(model["flops"]), quality(cell.get("quality"), metric),
                quality(cell.get("agreement"), "agreement"),
                f"{batch['p50_ms']:.2f}", f"{batch['p95_ms']:.2f}",
                f"{batch['faster']:.2f}" if "faster" in batch else "",
                *(f"{cell['batches'][size]['per_second']:,.0f}" for size in sizes),
                *([_mega((cell.get("memory") or {}).get("peak"))] if has_memory else []),
            ])  # fmt: skip
    return head, rows


def _has_memory(bench: Mapping[str, Any]) -> bool:
    """Whether peak memory was measured."""
    return any(cell.get("memory") for model in bench["models"] for cell in model["columns"].values())


def notes(bench: Mapping[str, Any]) -> list[str]:
    """How to read the table."""
    machine = bench["machine"]
    lines = [
        f"{bench['rounds']} rounds; each round measures all cells once, in a new order. Speed-up: over "
        f"{bench['base']} (eager), the median over rounds of the ratio within a round. Seconds differ between "
        "machines and hours; ratios differ less. MFLOPs: of one row; a multiply-add counts as two.",
        f"Machine: {machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, ONNX Runtime "
        f"{machine['onnxruntime'] or 'not installed'}.",
    ]
    lines.append(
        "Agreement with the same model in eager torch, on up to 256 rows: the share of equal predictions; for "
        "embeddings the mean cosine; for regression the correlation."
    )
    first = str(min(bench["batch_sizes"]))
    for model in bench["models"]:
        eager, int8 = (model["columns"].get(name, {}).get("batches") for name in ("eager", "int8"))
        if eager and int8 and int8[first]["p50_ms"] > eager[first]["p50_ms"]:
            ratio = int8[first]["p50_ms"] / eager[first]["p50_ms"]
            lines.append(f"{model['name']}: int8 takes {ratio:.2g} times the time of float32 in eager torch here.")
    if _has_memory(bench):
        lines.append(
            "Peak MB: resident memory of a separate process that loads the model and runs the largest batch, with "
            "its libraries; the process of ONNX Runtime does not load torch."
        )
    lines += [
        f"{model['name']}, {RUNTIMES[runtime]}: not available: {cell['failed']}"
        for model in bench["models"]
        for runtime, cell in model["columns"].items()
        if "failed" in cell
    ]
    random_inputs = [model["name"] for model in bench["models"] if model["inputs"] == RANDOM_INPUTS]
    if random_inputs:
        lines.append(f"Inputs are random for {', '.join(random_inputs)}; their quality is unknown.")
    return lines


def quality(value: float | None, metric: str) -> str:
    """A test metric as text."""
    if value is None:
        return ""
    return f"{value:.2%}" if metric in FRACTIONS else f"{value:.4g}"


def _mega(count: float | None) -> str:
    """Millions, with two decimals or two significant digits."""
    if count is None:
        return ""
    return f"{count / 1e6:.2g}" if 0 < count < 1e5 else f"{count / 1e6:,.{0 if count >= 1e8 else 2}f}"


def verdict(bench: Mapping[str, Any]) -> str:
    """The fastest student and runtime, compared with the first model."""
    size = str(min(bench["batch_sizes"]))
    cells = [
        (cell["batches"][size]["faster"], model, runtime)
        for model in bench["models"]
        if model["role"] != "teacher"
        for runtime, cell in model["columns"].items()
        if "failed" not in cell and "faster" in cell["batches"][size]
    ]
    if not cells:
        return "Nothing to compare."
    speed_up, model, runtime = max(cells, key=lambda cell: cell[0])
    value = model["columns"][runtime].get("quality")
    at = "" if value is None else f", at {quality(value, bench['metric'])} {bench['metric']}"
    name = f"{model['name']} in {RUNTIMES[runtime]}"
    return f"{name} is {speed_up:.1f} times as fast as {bench['base']} in eager torch{at}."


def write_bench(bench: Mapping[str, Any], out: Path) -> Path:
    """Write the page; it loads nothing from the network and runs no script."""
    from tutelage.reports.page import render

    head, rows = table(bench)
    marks = points(bench)
    plots = {screen: plot(bench, marks, width) for screen, width in WIDTHS.items()} if marks else {}
    html = render(
        "bench.html.jinja", title=f"Bench of {bench['base']}", verdict=verdict(bench), head=head, rows=rows,
        notes=notes(bench), plots=plots, runtimes=RUNTIMES, batch=min(bench["batch_sizes"]), metric=bench["metric"],
    )  # fmt: skip
    write_text(Path(out), html)
    return Path(out)


WIDTHS = {"large-screen": 760, "small-screen": 380}
"""Of the plot in SVG units: its text stays legible on a phone."""

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 58, 20, 28, 52


def plot(bench: Mapping[str, Any], points: Sequence[BenchPoint], width: int) -> dict[str, Any]:
    """Quality against latency (logarithmic), in SVG coordinates: ticks (place, text), marks (x, y, text, point)."""
    metric = str(bench["metric"])
    left = math.log10(min(p.latency for p in points)) - 0.06
    right = math.log10(max(p.latency for p in points)) + 0.06
    worst, best = min(p.quality for p in points), max(p.quality for p in points)
    pad = max(0.08 * (best - worst), 0.002 * max(abs(best), 1e-9))
    bottom, top = worst - pad, best + pad

    def x(latency: float) -> float:
        return LEFT + (math.log10(latency) - left) / (right - left) * (width - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    scale, unit = (100, "%") if metric in FRACTIONS else (1, "")
    edge = frontier(points, metric in HIGHER_IS_BETTER)
    texts = [f"{p.model} {RUNTIMES[p.runtime]} {quality(p.quality, metric)} {p.latency:.2f} ms" for p in edge]
    return {
        "width": width,
        "x_ticks": [(x(t), f"{t:g}") for t in _on_log(10**left, 10**right, (width - LEFT - RIGHT) // 36)],
        "y_ticks": [(y(v / scale), f"{v:.{digits}f}{unit}") for v, digits in _even(scale * bottom, scale * top, 6)],
        "marks": [
            (x(p.latency), y(p.quality),
             f"{p.model}, {RUNTIMES[p.runtime]}: {quality(p.quality, metric)}, {p.latency:.2f} ms", p)
            for p in points
        ],
        "frontier": [(x(p.latency), y(p.quality)) for p in edge],
        "description": f"{metric} against latency. On the frontier: {'; '.join(texts)}.",
    }  # fmt: skip


def _on_log(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` round numbers: 1, 2 and 5 times powers of ten, or the powers, or evenly spaced numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if 2 <= len(ticks) <= most:
            return ticks
    return [value for value, _ in _even(low, high, min(most, 6))]


def _even(low: float, high: float, most: int) -> list[tuple[float, int]]:
    """At most ``most`` multiples of 1, 2 or 5 times a power of ten, with their decimals."""
    power = math.floor(math.log10((high - low) / most))
    step = next(s for k in (power, power + 1) for m in (1, 2, 5) if (high - low) / (s := m * 10.0**k) <= most - 1)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(i * step, decimals) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
