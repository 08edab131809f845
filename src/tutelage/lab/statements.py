"""From measurements to verdicts on the statements of a claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tutelage.evaluation.statistics import paired_difference

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]

RELEVANT_GAIN = 0.005
"""Half a point of accuracy. An interval below it contradicts a claimed gain."""


@dataclass(frozen=True)
class StatementResult:
    """One statement of a claim, and its measurement.

    Attributes:
        statement: what the claim states.
        verdict: on this statement.
        mean: of the measurement, over seeds.
        low: lower end of its interval; ``None`` with one seed, and for identities.
        high: upper end.
        unit: ``points`` (fractions of accuracy, shown times 100), another unit, or ``""``.
        level: of the interval.
        n: seeds.
        rule: how the verdict follows.
        seeds_needed: for an inconclusive statement, the seeds that would decide it with the same mean and spread.
    """

    statement: str
    verdict: Verdict
    mean: float
    low: float | None
    high: float | None
    unit: str
    level: float
    n: int
    rule: str
    seeds_needed: int | None = None


@dataclass(frozen=True)
class PlotPoint:
    """A mean over seeds with its interval."""

    x: float | str
    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ExperimentPlot:
    """A plot of an experiment: points by the name of their series."""

    x: str
    y: str
    series: dict[str, list[PlotPoint]]
    log_x: bool = False
    log_y: bool = False
    percent: bool = False
    caption: str = ""


@dataclass(frozen=True)
class ExperimentResult:
    """The result of an experiment.

    Attributes:
        statements: of the claim.
        plots: to draw.
        notes: further information, in sentences.
        accuracies: test accuracy by arm, then ``last`` or ``best`` (weights); one value a seed.
    """

    statements: list[StatementResult]
    plots: list[ExperimentPlot]
    notes: list[str] = field(default_factory=list)
    accuracies: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Reproduced if all statements are, not reproduced if one is not, else inconclusive."""
        verdicts = {statement.verdict for statement in self.statements}
        if verdicts <= {"reproduced"}:
            return "reproduced"
        return "not reproduced" if "not reproduced" in verdicts else "inconclusive"

    def as_json(self) -> dict[str, Any]:
        """For ``lab.json``."""
        return {"verdict": self.verdict, **asdict(self)}


def gain(
    statement: str, treated: Sequence[float], control: Sequence[float], relevant: float = RELEVANT_GAIN
) -> StatementResult:
    """A claimed gain of accuracy, tested by its paired interval.

    Reproduced when the interval lies above 0; not reproduced when it lies below ``relevant``, which excludes a
    relevant gain; else inconclusive, as always with one seed.
    """
    difference = paired_difference(treated, control)
    low, high = difference["low"], difference["high"]
    verdict: Verdict = "inconclusive"
    if low is not None and low > 0:
        verdict = "reproduced"
    elif high is not None and high < relevant:
        verdict = "not reproduced"
    rule = f"reproduced above 0; not reproduced where the interval is below {100 * relevant:g} points"
    is_open = verdict == "inconclusive" and difference["n"] > 1
    more = needed(difference["values"], relevant) if is_open else None
    return _result(statement, verdict, difference, "points", rule, more)


def _result(
    statement: str, verdict: Verdict, mean: dict[str, Any], unit: str, rule: str, more: int | None = None
) -> StatementResult:
    return StatementResult(
        statement, verdict, mean["mean"], mean["low"], mean["high"], unit, mean["level"], mean["n"], rule, more
    )


def needed(differences: Sequence[float], relevant: float, most: int = 10_000) -> int | None:
    """The number of seeds with which the interval of these differences would exclude 0, or all above ``relevant``.

    Args:
        differences: two or more.
        relevant: see :func:`gain`.
        most: the largest number that is tried.

    Returns:
        The smallest such number; ``None`` where ``most`` does not suffice.
    """
    from scipy.stats import t

    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    margin = max(mean, relevant - mean)
    for n in range(2, most + 1):
        if float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n) < margin:
            return n
    return None


def within(statement: str, values: Sequence[float], low: float, high: float, unit: str = "") -> StatementResult:
    """A figure between two bounds: reproduced when its interval lies between them, not when it lies outside."""
    mean = paired_difference(values, [0.0] * len(values))
    a, b = (mean["mean"] if mean[end] is None else mean[end] for end in ("low", "high"))
    verdict: Verdict = "inconclusive"
    if low <= a and b <= high:
        verdict = "reproduced"
    elif b < low or a > high:
        verdict = "not reproduced"
    return _result(statement, verdict, mean, unit, f"reproduced within {low:g} and {high:g}")


def exact(statement: str, error: float, most: float) -> StatementResult:
    """An identity, tested by its largest error."""
    mean = {"mean": error, "low": None, "high": None, "level": 0.95, "n": 1}
    verdict: Verdict = "reproduced" if error <= most else "not reproduced"
    return _result(statement, verdict, mean, "", f"reproduced where the largest error is at most {most:g}")


def point(x: float | str, values: Sequence[float]) -> PlotPoint:
    """The mean over seeds and Student's interval."""
    mean = paired_difference(values, [0.0] * len(values))
    return PlotPoint(x, mean["mean"], mean["low"], mean["high"])
