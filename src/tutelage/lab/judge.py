"""From figures to verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tutelage.evaluation.statistics import paired

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]

WORTH = 0.005
"""A gain that would matter: half a point of accuracy. An interval wholly below it speaks against a claimed gain."""


@dataclass(frozen=True)
class Part:
    """One statement of a claim, and what was measured of it.

    Attributes:
        says: the statement.
        verdict: of this part.
        mean: what was measured, over seeds.
        low: of its interval; ``None`` with one seed, and for what is exact.
        high: the same.
        unit: ``points`` (fractions of accuracy, shown times 100), or ``""``.
        level: of the interval.
        n: seeds.
        rule: how the verdict follows, in words.
        would_decide: of an inconclusive part, how many seeds would decide it, if mean and spread stay what they are.
    """

    says: str
    verdict: Verdict
    mean: float
    low: float | None
    high: float | None
    unit: str
    level: float
    n: int
    rule: str
    would_decide: int | None = None


@dataclass(frozen=True)
class Point:
    """A mark of a figure: a mean over seeds with its interval."""

    x: float | str
    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Figure:
    """What is drawn of an experiment: marks by the name of their series."""

    x: str
    y: str
    series: dict[str, list[Point]]
    log_x: bool = False
    log_y: bool = False
    percent: bool = False
    says: str = ""


@dataclass(frozen=True)
class Finding:
    """What an experiment found.

    Attributes:
        parts: the claim's statements.
        figures: what to draw.
        notes: what else is to be known, in sentences.
        figures_by_arm: test accuracy of each arm, by last epoch and best on validation, for every seed.
    """

    parts: list[Part]
    figures: list[Figure]
    notes: list[str] = field(default_factory=list)
    figures_by_arm: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Reproduced where all parts are, not reproduced where one is not, else inconclusive."""
        found = [part.verdict for part in self.parts]
        if all(one == "reproduced" for one in found):
            return "reproduced"
        return "not reproduced" if "not reproduced" in found else "inconclusive"

    def as_json(self) -> dict[str, Any]:
        """For ``lab.json``."""
        return {"verdict": self.verdict, **asdict(self)}


def gain(says: str, treated: Sequence[float], control: Sequence[float], worth: float = WORTH) -> Part:
    """A claimed gain of accuracy, judged by its paired interval.

    Reproduced when the interval lies above 0; not reproduced when it lies below ``worth``, so that a gain that
    matters is excluded; else inconclusive, as with one seed.
    """
    found = paired(treated, control)
    low, high = found["low"], found["high"]
    verdict: Verdict = "inconclusive"
    if low is not None and low > 0:
        verdict = "reproduced"
    elif high is not None and high < worth:
        verdict = "not reproduced"
    rule = f"reproduced above 0; not reproduced where the interval is below {100 * worth:g} points"
    more = needed(found["values"], worth) if verdict == "inconclusive" and found["n"] > 1 else None
    return Part(says, verdict, found["mean"], low, high, "points", found["level"], found["n"], rule, more)


def needed(differences: Sequence[float], worth: float, most: int = 10_000) -> int | None:
    """Seeds with which the interval of these differences would leave out 0, or all above ``worth``.

    Args:
        differences: two or more.
        worth: see :func:`gain`.
        most: more are not looked for.

    Returns:
        The least such number; ``None`` where even ``most`` would not do.
    """
    from scipy.stats import t

    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    room = max(mean, worth - mean)
    for n in range(2, most + 1):
        if float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n) < room:
            return n
    return None


def within(says: str, values: Sequence[float], low: float, high: float, unit: str = "") -> Part:
    """A figure that should lie between two bounds: reproduced when its interval does, not when it lies outside."""
    found = paired(values, [0.0] * len(values))
    a = found["mean"] if found["low"] is None else found["low"]
    b = found["mean"] if found["high"] is None else found["high"]
    verdict: Verdict = "inconclusive"
    if low <= a and b <= high:
        verdict = "reproduced"
    elif b < low or a > high:
        verdict = "not reproduced"
    rule = f"reproduced within {low:g} and {high:g}"
    return Part(says, verdict, found["mean"], found["low"], found["high"], unit, found["level"], found["n"], rule)


def exact(says: str, error: float, most: float) -> Part:
    """An identity, judged by its largest error."""
    verdict: Verdict = "reproduced" if error <= most else "not reproduced"
    return Part(
        says, verdict, error, None, None, "", 0.95, 1, f"reproduced where the largest error is at most {most:g}"
    )


def point(x: float | str, values: Sequence[float]) -> Point:
    """A mark: the mean over seeds and Student's interval."""
    found = paired(values, [0.0] * len(values))
    return Point(x, found["mean"], found["low"], found["high"])
