"""The head of the page on runs: name, verdict, facts and the most important figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tutelage.reports.formatting import count, interval, milliseconds, percent, points
from tutelage.reports.results import judge_wins, model_names
from tutelage.reports.run_files import RunRecord
from tutelage.reports.selection_metric import metric_label
from tutelage.reports.tables import speed_up


@dataclass(frozen=True)
class Tile:
    """A figure in large type."""

    title: str
    value: str
    note: str


def titled(name: str, label: str) -> str:
    """The name of a run, with that of its folder where they differ."""
    return name if name == label else f"{name} ({label})"


def seeds_text(seeds: list[int]) -> str:
    """``Seeds 0, 1, 2``."""
    return f"{'Seed' if len(seeds) == 1 else 'Seeds'} {', '.join(map(str, seeds))}"


def run_facts(summary: Mapping[str, Any]) -> str:
    """Seeds, test samples, device and exported student of a run."""
    facts = [seeds_text(summary["seeds"])]
    if n := _test_samples(summary):
        facts.append(f"{count(n)} test samples")
    if summary.get("device"):
        processes = summary.get("processes") or 1
        facts.append(f"trained on {summary['device']}" + (f", {processes} processes" if processes > 1 else ""))
    if summary.get("exported"):
        facts.append(f"exported student: {summary['exported']}")
    return "; ".join(facts) + "."


def _test_samples(summary: Mapping[str, Any]) -> int:
    """Samples of the test split; 0 where the summary does not hold their number."""
    if (teacher := summary.get("teacher")) is not None:
        return teacher.get("n") or 0
    bins = summary["students"]["distilled"].get("reliability") or {}
    return int(sum(bins.get("count", [])))


def tiles(run: RunRecord) -> list[Tile]:
    """The figures at the top of the page of one run."""
    summary, sizes = run.summary, run.summary["parameters"]
    tiles = [Tile(*win) for judgement in run.judgements for win in judge_wins(judgement)]
    if gain := (summary.get("gain") or {}).get("best"):
        tiles.append(Tile("Gain over the baseline student", f"{points(gain['mean'])} points", interval(gain)))
    teacher = (summary.get("teacher") or {}).get("accuracy")
    distilled = summary["students"]["distilled"]["best"]["accuracy"]["mean"]
    if teacher:
        note = f"{percent(distilled)} of {percent(teacher)}"
        tiles.append(Tile(f"Of the teacher's {metric_label(summary)}", percent(distilled / teacher), note))
    if summary.get("teacher") is not None:
        note = f"{count(sizes['student'])} of {count(sizes['teacher'])}"
        tiles.append(Tile("Of the teacher's parameters", percent(summary["capacity_ratio"]), note))
    else:
        name = model_names(summary)["distilled"]
        tiles.append(Tile(f"Test {metric_label(summary)}", percent(distilled), name))
        tiles.append(Tile("Parameters", count(sizes["student"]), "of the student; there is no teacher"))
    if ratio := speed_up(summary):
        teacher_ms, student_ms = (
            milliseconds(summary["latency"][model]["p50_ms"]) for model in ("teacher", "student")
        )
        tiles.append(Tile("Latency of one sample, p50", ratio, f"{student_ms} against {teacher_ms}"))
    return tiles
