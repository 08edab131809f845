"""The part of the page on cost: what teacher and student weigh, how long they take, and what training took."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.errors import DataError
from tutelage.reports.parts import role, table
from tutelage.reports.read import Run
from tutelage.reports.wording import ABSENT, called, count, escaped, milliseconds, percent, seconds

WEIGHTS = "*.safetensors"
NOTE = (
    "Weights: their files. Latency: one sample, on the machine of the run, models taking turns; one of twenty passes "
    "takes longer than p95. Training: of a seed; of the teacher only where this run trained it."
)


def costs(runs: Sequence[Run]) -> str:
    """The section."""
    shown = "".join(_of_run(run, len(runs) > 1) for run in runs)
    return f"<section><h2>Cost</h2>{shown}<p class='note'>{escaped(NOTE)}</p></section>"


def _of_run(run: Run, several: bool) -> str:
    summary, arms = run.summary, run.arms
    has_teacher = summary.get("teacher") is not None
    who = ["teacher", *arms] if has_teacher else arms
    sizes, speed = summary["parameters"], summary.get("latency") or {}
    weights = {"teacher": _bytes(run.path, "models/teacher*"), "distilled": _bytes(run.path, "student")}
    weights["baseline"] = _bytes(run.path, f"models/baseline-seed{summary['seeds'][0]}")
    took = {arm: (summary["students"][arm].get("seconds") or {}).get("mean") for arm in arms}
    took["teacher"] = _teacher_seconds(run.path)

    def model(arm: str) -> str:
        return "teacher" if arm == "teacher" else "student"

    lines: list[tuple[str, Mapping[str, Any], Any]] = [
        ("Parameters", {arm: sizes.get(model(arm)) for arm in who}, count),
        ("Weights on disk", weights, size),
        ("Latency, p50", {arm: _of(speed, model(arm), "p50_ms") for arm in who}, _ms),
        ("Latency, p95", {arm: _of(speed, model(arm), "p95_ms") for arm in who}, _ms),
        ("Training", took, seconds),
    ]
    rows = []
    for what, values, words in lines:
        cells = [escaped(words(values.get(arm))) for arm in who]
        if has_teacher:
            whole, part = values.get("teacher"), values.get("distilled")
            cells.append(escaped(percent(part / whole) if whole and part is not None else ABSENT))
        if any(values.get(arm) is not None for arm in who):
            rows.append([escaped(what), *cells])
    names = called(summary)
    columns = ["", *(names[arm] for arm in who), *(["Of the teacher's"] if has_teacher else [])]
    shown = table(f"What it costs{f': {run.label}' if several else ''}", columns, rows, "narrow")
    for arm in who:
        shown = shown.replace(
            f"<th scope='col'>{escaped(names[arm])}</th>", f"<th scope='col'>{role(names[arm])}</th>"
        )
    return shown


def _of(speed: Mapping[str, Any], who: str, figure: str) -> float | None:
    found: float | None = (speed.get(who) or {}).get(figure)
    return found


def _ms(value: float | None) -> str:
    return milliseconds(None if value is None else {"p50_ms": value})


def size(value: int | None) -> str:
    """``52298000`` as ``52.3 MB``."""
    if value is None:
        return ABSENT
    for unit, one in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= one:
            return f"{value / one:.{1 if value < 100 * one else 0}f} {unit}"
    return f"{value} bytes"


def _bytes(run: Path, folders: str) -> int | None:
    """Bytes of the weights in folders of a run; ``None`` where there are none."""
    files = [file for folder in run.glob(folders) if folder.is_dir() for file in folder.glob(WEIGHTS)]
    return sum(file.stat().st_size for file in files) if files else None


def _teacher_seconds(run: Path) -> float | None:
    """How long the training of the teacher, or of all members, took; ``None`` where the run trained none."""
    took: list[float] = []
    for file in sorted(run.glob("models/teacher*/result.json")):
        try:
            took.append(float(json.loads(file.read_text(encoding="utf-8"))["seconds"]))
        except (ValueError, LookupError, TypeError, OSError):
            raise DataError(
                "is damaged", where=str(file), remedy=f"delete {file.parent}, or copy all of the run directory again"
            ) from None
    return sum(took) if took else None
