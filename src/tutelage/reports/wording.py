"""The words and figures of a finished run: a verdict in a sentence and the final table's cells."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from tutelage.reports.metric import judged, named

ABSENT = "–"
"""What a cell shows when the run did not measure it."""

TEACHER, BASELINE, DISTILLED = "teacher", "baseline student", "distilled student"
UNTAUGHT = "student with the method"
"""What a distilled student is called where the method asked no teacher."""


def called(summary: Mapping[str, Any]) -> dict[str, str]:
    """What each role is called in a run."""
    return {
        "teacher": TEACHER,
        "baseline": BASELINE,
        "distilled": DISTILLED if summary.get("taught", True) else UNTAUGHT,
    }


def called_short(summary: Mapping[str, Any]) -> dict[str, str]:
    """The same for the legend of a figure."""
    return {role: name.removeprefix("student ") for role, name in called(summary).items()}


def verdict(summary: Mapping[str, Any]) -> str:
    """What the run found, in one sentence of plain text.

    A gain counts as shown only when its interval leaves out zero. With one seed there is no interval, and
    without a student trained alone there is no gain; the sentence says so.
    """
    summary = judged(summary)
    return f"{_against_baseline(summary)}{_against_teacher(summary)}."


def _against_baseline(summary: Mapping[str, Any]) -> str:
    students = summary["students"]
    taught = summary.get("taught", True)
    distilled = percent(students["distilled"]["best"]["accuracy"]["mean"])
    distilled = f"{'Distilled' if taught else 'With the method'} {distilled}"
    if "baseline" not in students or "gain" not in summary:
        return f"{distilled}; no baseline was trained, so the gain is unknown"
    gain = summary["gain"]["best"]
    head = f"{distilled} against baseline {percent(students['baseline']['best']['accuracy']['mean'])}: "
    mean, low, high = gain["mean"], gain["low"], gain["high"]
    worse = f", {'distillation' if taught else 'the method'} did worse"
    if low is None or high is None:
        return f"{head}{points(mean)} points ({interval(gain)})"
    if low <= 0 <= high:
        return f"{head}{points(mean)} points, no difference shown ({interval(gain)})"
    return f"{head}{points(mean)} points{worse if mean < 0 else ''} ({interval(gain)})"


def _against_teacher(summary: Mapping[str, Any]) -> str:
    teacher = (summary.get("teacher") or {}).get("accuracy")
    if not teacher:
        return ""
    share = summary["students"]["distilled"]["best"]["accuracy"]["mean"] / teacher
    ratio = summary["capacity_ratio"]
    size = "as many parameters" if ratio == 1 else f"{percent(ratio)} of its parameters"
    return f"; {'keeps' if share <= 1 else 'reaches'} {percent(share)} of the teacher's {named(summary)} with {size}"


CELLS = ("name", "accuracy", "last", "agreement", "kl", "ece", "loss", "parameters", "latency", "seconds")
"""The columns of the final table."""

OF_TEACHER = ("agreement", "kl")
"""Those that are there only where there is a teacher."""


def final_table(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows for the teacher, the members of an ensemble, the baseline student (if trained) and the distilled one.

    Without a teacher there are no rows of it, and nothing is compared with it. Below the distilled student come the
    peers that were trained with it, or its exits.

    Returns:
        Formatted strings under ``name``, ``accuracy``, ``last``, ``agreement``, ``kl``, ``ece``, ``loss``,
        ``parameters``, ``latency`` and ``seconds``; an en dash where there is no such figure.
    """
    summary = judged(summary)
    teacher, speed, sizes = summary.get("teacher"), summary.get("latency") or {}, summary["parameters"]
    rows = []
    if teacher is not None:
        rows.append(
            dict.fromkeys(CELLS, ABSENT)
            | {
                "name": TEACHER,
                "accuracy": percent(teacher["accuracy"]),
                "ece": percent(teacher.get("ece")),
                "loss": plain(teacher.get("loss")),
                "parameters": count(sizes["teacher"]),
                "latency": milliseconds(speed.get("teacher")),
            }
        )
    for member in ((teacher or {}).get("ensemble") or {}).get("members", []):
        scores = member["test"]
        rows.append(
            dict.fromkeys(CELLS, ABSENT)
            | {
                "name": f"{member['name']}, weight {member['weight']:.2f}",
                "accuracy": percent(scores["accuracy"]),
                "ece": percent(scores.get("ece")),
                "loss": plain(scores.get("loss")),
                "parameters": count(member["parameters"]),
            }
        )
    names = called(summary)
    for arm in ("baseline", "distilled"):
        if arm in summary["students"]:
            best, last = (summary["students"][arm][which] for which in ("best", "last"))
            rows.append(
                {
                    "name": names[arm],
                    "accuracy": percent_spread(best.get("accuracy")),
                    "last": percent_spread(last.get("accuracy")),
                    "agreement": percent_spread(best.get("agreement")),
                    "kl": plain_spread(best.get("kl")),
                    "ece": percent_spread(best.get("ece")),
                    "loss": plain_spread(best.get("loss")),
                    "parameters": count(sizes["student"]),
                    "latency": milliseconds(speed.get("student")),
                    "seconds": seconds((summary["students"][arm].get("seconds") or {}).get("mean")),
                }
            )
            rows += _others(summary["students"][arm].get("others") or {})
    return rows


def workflow_table(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of a workflow of several runs.

    Returns:
        Formatted strings under ``name``, ``parameters``, ``accuracy``, ``last`` and ``over``: the gain over the row
        that it is first compared with.
    """
    return [
        {
            "name": row["name"],
            "parameters": count(row["parameters"]),
            "accuracy": percent_spread(row["best"]["accuracy"]),
            "last": percent_spread(row["last"]["accuracy"]),
            "over": next(
                (f"{points(p['best']['mean'])} over {other}" for other, p in row["against"].items()), ABSENT
            ),
        }
        for row in summary["rows"]
    ]


def _others(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of what was trained beside a student."""
    return [
        dict.fromkeys(CELLS, ABSENT)
        | {
            "name": name,
            "accuracy": percent_spread(scores["best"].get("accuracy")),
            "last": percent_spread(scores["last"].get("accuracy")),
            "agreement": percent_spread(scores["best"].get("agreement")),
            "kl": plain_spread(scores["best"].get("kl")),
            "ece": percent_spread(scores["best"].get("ece")),
            "loss": plain_spread(scores["best"].get("loss")),
            "parameters": count(scores["parameters"]),
        }
        for name, scores in found.items()
    ]


def wins(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rates of wins of what a run trained: what, figure, how."""
    told = []
    for one in found["pairs"]:
        first, second = one["pair"]
        roles, rate, turned = found["roles"], one["rate"], False
        if roles.get(first) != "distilled":
            first, second, turned = second, first, True
        if roles.get(first) != "distilled" or rate is None:
            continue
        share = percent(1 - rate if turned else rate)
        held = ""
        if one["low"] is not None:
            ends = (1 - one["high"], 1 - one["low"]) if turned else (one["low"], one["high"])
            held = f", 95 % interval {percent(ends[0])} to {percent(ends[1])}"
        told.append(
            (f"Wins of {first} over {second}", share, f"{one['judged']:,} prompts, judged by {found['judge']}{held}")
        )
    return told


# Figures ------------------------------------------------------------------------------------------


def percent(fraction: float | None) -> str:
    """``0.9132`` as ``91.3 %``."""
    return ABSENT if not _finite(fraction) else f"{100 * fraction:.1f} %"


def points(fraction: float) -> str:
    """``0.0142`` as ``+1.4``: a difference of percentages, with one more digit where one would show zero."""
    if not _finite(fraction):
        return ABSENT
    value = 100 * fraction
    if abs(value) < 0.005:
        return "0.0"
    return f"{value:+.{1 if abs(value) >= 0.05 else 2}f}".replace("-", "−")


def interval(pair: Mapping[str, Any]) -> str:
    """``95 % interval +0.9 to +1.9, 3 seeds``."""
    if pair["low"] is None or pair["high"] is None:
        return "one seed: no interval"
    return f"{100 * pair['level']:g} % interval {points(pair['low'])} to {points(pair['high'])}, {pair['n']} seeds"


def plain(value: float | None) -> str:
    """Three decimals: ``0.231``; fewer for large values."""
    return ABSENT if not _finite(value) else f"{value:.{_decimals(value)}f}"


def percent_spread(spread: Mapping[str, Any] | None) -> str:
    """Mean and standard deviation over seeds: ``91.3 ± 0.4 %``."""
    if spread is None or not _finite(spread["mean"]):
        return ABSENT
    if not _finite(spread.get("std")):
        return percent(spread["mean"])
    return f"{100 * spread['mean']:.1f} ± {100 * spread['std']:.1f} %"


def plain_spread(spread: Mapping[str, Any] | None) -> str:
    """Mean and standard deviation over seeds: ``0.231 ± 0.012``."""
    if spread is None or not _finite(spread["mean"]):
        return ABSENT
    if not _finite(spread.get("std")):
        return plain(spread["mean"])
    decimals = _decimals(spread["mean"])
    return f"{spread['mean']:.{decimals}f} ± {spread['std']:.{decimals}f}"


def count(number: int | None) -> str:
    """``1234567`` as ``1,234,567``."""
    return ABSENT if number is None else f"{number:,}"


def milliseconds(speed: Mapping[str, Any] | None) -> str:
    """The median: ``1.32 ms``."""
    if not speed or not _finite(speed.get("p50_ms")):
        return ABSENT
    p50 = speed["p50_ms"]
    return f"{p50:.{3 if p50 < 0.1 else 2 if p50 < 10 else 1}f} ms"


def seconds(value: float | None) -> str:
    """``94.6`` as ``1 min 35 s``."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def escaped(text: object, *, breaking: bool = False) -> str:
    """Text as HTML, also inside an attribute; a figure does not part from its sign unless ``breaking``."""
    safe = html.escape(str(text), quote=True)
    return safe if breaking else safe.replace(" %", "\u00a0%")


def _decimals(value: float) -> int:
    return 3 if abs(value) < 10 else 1


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
