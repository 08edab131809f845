"""Tests of claims from the literature, whose texts and arms are in ``claims.yaml``: from measurements to verdicts."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from tutelage import losses
from tutelage.evaluation.statistics import paired_difference
from tutelage.lab import llm
from tutelage.lab.arms import Results

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


WEIGHTS = {"last epoch": "last", "best on validation": "best"}

Accuracies = dict[str, dict[str, list[float]]]
"""Test accuracy by label, then ``last`` or ``best`` (weights); one value a seed."""

Series = dict[str, list[PlotPoint]]


@dataclass(frozen=True)
class Claim:
    """An experiment; ``claims.yaml`` describes the fields."""

    id: str
    claim: str
    source: str
    design: str
    arms: list[str]
    labels: dict[str, tuple[str, str]] = field(default_factory=dict)
    gains: list[tuple[str, str, str]] = field(default_factory=list)
    statements: list[str] = field(default_factory=list)
    plots: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def test(self, results: Results) -> ExperimentResult:
        """The verdicts on the statements."""
        return TESTS.get(self.id, compare)(self, results)

    def result(
        self,
        statements: list[StatementResult],
        *series: Series,
        accuracies: Accuracies | None = None,
        **figures: object,
    ) -> ExperimentResult:
        """A result with the plots of these series, and with these figures in the notes."""
        plots = [ExperimentPlot(**axes, series=points) for axes, points in zip(self.plots, series, strict=True)]
        return ExperimentResult(statements, plots, [note.format(**figures) for note in self.notes], accuracies or {})


CLAIMS: dict[str, Claim] = {
    name: Claim(name, **fields)
    for name, fields in yaml.safe_load((files(__package__) / "claims.yaml").read_text(encoding="utf-8")).items()
}
"""Every experiment, by its id."""


def _accuracies(results: Results, labels: Mapping[str, tuple[str, str]]) -> Accuracies:
    def values(arm: str, which: str, weights: str) -> list[float]:
        read = results.accuracy if "students" in results.summary(arm) else results.row
        return read(arm, which, weights)

    return {
        label: {weights: values(arm, which, weights) for weights in WEIGHTS.values()}
        for label, (arm, which) in labels.items()
    }


def _by_weights(accuracies: Accuracies, x: Mapping[str, float | str]) -> Series:
    """Accuracy over ``x`` (by label), a series for each choice of weights."""
    return {
        name: [point(x[label], values[weights]) for label, values in accuracies.items()]
        for name, weights in WEIGHTS.items()
    }


def compare(claim: Claim, results: Results) -> ExperimentResult:
    """The gains of the claim, with the weights of the last epoch, and the accuracy of each arm."""
    accuracies = _accuracies(results, claim.labels)
    gains = [gain(text, accuracies[a]["last"], accuracies[b]["last"]) for a, b, text in claim.gains]
    bars = _by_weights(accuracies, {label: label for label in accuracies})
    caption = "Test accuracy of each arm: mean and interval."
    plot = ExperimentPlot("", "test accuracy", bars, percent=True, caption=caption)
    return ExperimentResult(gains, [plot], accuracies=accuracies)


def temperature(claim: Claim, results: Results) -> ExperimentResult:
    """Accuracy over T; validation chooses between T = 4 and T = 8."""
    accuracies = _accuracies(results, claim.labels)
    middle = max((4, 8), key=lambda t: results.validation(claim.labels[f"T={t}"][0]))
    logits = results.logits("teacher")
    classes, top = logits.shape[-1], logits.topk(2).values
    hot = (torch.softmax(logits / 1e6, -1) - 1 / classes).abs().max()
    clear = (top[:, 0] - top[:, 1]) > 1e-3
    one_hot = torch.nn.functional.one_hot(logits[clear].argmax(-1), classes)
    cold = (torch.softmax(logits[clear] / 1e-5, -1) - one_hot).abs().max()
    best, coldest, hottest = (accuracies[f"T={t}"]["last"] for t in (middle, 1, 20))
    over_coldest, over_hottest, uniform, largest = (text.format(middle=middle) for text in claim.statements)
    statements = [
        gain(over_coldest, best, coldest),
        gain(over_hottest, best, hottest),
        exact(uniform, float(hot), 1e-4),
        exact(largest, float(cold), 1e-9),
    ]
    series = _by_weights(accuracies, {label: int(label.removeprefix("T=")) for label in accuracies})
    return claim.result(statements, series, accuracies=accuracies)


def _soft_gradient(student: Tensor, teacher: Tensor, t: float, *, squared: bool) -> Tensor:
    """Gradient of the soft loss by the student's logits, row by row, with or without the factor T^2."""
    x = student.clone().requires_grad_()
    loss = losses.kd(x, teacher, temperature=t, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    return grad if squared else grad / t**2


def t_squared(claim: Claim, results: Results) -> ExperimentResult:
    """Norm of the gradient over T, on the validation split, of baseline students."""
    teacher = results.logits("teacher")
    ts = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
    norms: dict[bool, list[list[float]]] = {False: [], True: []}
    for seed in results.base.seeds:
        student = results.logits(f"baseline-seed{seed}")
        for squared, curves in norms.items():
            grads = (_soft_gradient(student, teacher, t, squared=squared) for t in ts)
            curves.append([float(grad.norm(dim=-1).mean()) for grad in grads])

    def slopes(squared: bool, start: int, stop: int | None = None) -> list[float]:
        x = [math.log(t) for t in ts[start:stop]]
        return [
            statistics.linear_regression(x, [math.log(v) for v in curve[start:stop]]).slope
            for curve in norms[squared]
        ]

    without, with_factor = claim.statements
    statements = [within(without, slopes(False, 4), -2.1, -1.9), within(with_factor, slopes(True, 4), -0.1, 0.1)]
    series = {
        name: [point(t, [curve[i] for curve in curves]) for i, t in enumerate(ts)]
        for name, curves in zip(("without the factor", "with T^2"), norms.values(), strict=True)
    }
    return claim.result(statements, series, usual=statistics.fmean(slopes(False, 1, 4)))


def gradient(claim: Claim, results: Results) -> ExperimentResult:
    """Autograd against the closed form, on real logits."""
    teacher = results.logits("teacher")
    points: list[PlotPoint] = []
    for t in (0.5, 1.0, 2.0, 4.0, 8.0, 20.0):
        errors = []
        for seed in results.base.seeds:
            student = results.logits(f"baseline-seed{seed}")
            closed_form = (torch.softmax(student / t, -1) - torch.softmax(teacher / t, -1)) / t
            autograd = _soft_gradient(student, teacher, t, squared=False)
            errors.append(float((closed_form - autograd).abs().max()))
        points.append(PlotPoint(t, max(errors)))
    statement = exact(claim.statements[0], max(p.mean for p in points), 1e-12)
    return claim.result([statement], {"autograd against closed form": points})


def dark_knowledge(claim: Claim, results: Results) -> ExperimentResult:
    """Whether classes that are similar for the teacher are similar for both students."""
    from scipy.stats import spearmanr

    t = 4
    teacher = results.similarity("teacher", t)
    distilled, baseline = (
        [
            float(spearmanr(results.similarity(f"{arm}-seed{seed}", t).numpy(), teacher.numpy()).statistic)
            for seed in results.base.seeds
        ]
        for arm in ("distilled", "baseline")
    )
    learned, closer = claim.statements
    statements = [within(learned, baseline, 0.3, 1.0), _rise(closer, distilled, baseline)]
    names = results.summary("kd").get("classes") or [str(i) for i in range(10)]
    i, j = torch.triu_indices(len(names), len(names), 1).unbind()
    pairs = [f"{names[int(i[k])]} and {names[int(j[k])]}" for k in teacher.argsort(descending=True)[:3]]
    series = {"rank correlation with the teacher": [point("baseline", baseline), point("distilled", distilled)]}
    return claim.result(statements, series, t=t, pairs="; ".join(pairs))


def _rise(statement: str, treated: Sequence[float], control: Sequence[float], unit: str = "") -> StatementResult:
    """A claimed rise of a metric other than accuracy."""
    rule = "reproduced above 0; not reproduced below"
    return replace(gain(statement, treated, control, relevant=0.0), unit=unit, rule=rule)


def self_distillation(claim: Claim, results: Results) -> ExperimentResult:
    """Generations 0 to 3 of one architecture, and their ensemble."""
    result = compare(claim, results)
    best = {label: values["best"] for label, values in result.accuracies.items()}
    over = gain("", best["ensemble of all"], best["generation 3"])
    bounds = "" if over.low is None or over.high is None else f" ({100 * over.low:+.2f} to {100 * over.high:+.2f})"
    figures = {"first": 100 * result.statements[0].mean, "ensemble": 100 * over.mean, "bounds": bounds}
    return replace(result, notes=[note.format(**figures) for note in claim.notes])


def capacity_gap(claim: Claim, results: Results) -> ExperimentResult:
    """The gain over the ratio of the student's to the teacher's parameters."""
    ratio = {arm: float(results.summary(arm)["capacity_ratio"]) for arm in claim.arms}
    arms = sorted(ratio, key=ratio.__getitem__)
    distilled, baseline = ({arm: results.accuracy(arm, which) for arm in arms} for which in ("distilled", "baseline"))
    gains = {arm: [a - b for a, b in zip(distilled[arm], baseline[arm], strict=True)] for arm in arms}
    teacher = results.summary("kd")["teacher"]["accuracy"]

    def mean(which: Sequence[str]) -> list[float]:
        return [sum(values) / len(values) for values in zip(*(gains[arm] for arm in which), strict=True)]

    def over_ratio(values: Mapping[str, list[float]]) -> list[PlotPoint]:
        return [point(ratio[arm], values[arm]) for arm in arms]

    large, small = mean([a for a in arms if ratio[a] > 0.1]), mean([a for a in arms if ratio[a] < 0.01])
    helps, helps_more = claim.statements
    statements = [gain(helps, large, [0.0] * len(large)), gain(helps_more, large, small)]
    level = [PlotPoint(ratio[a], teacher) for a in (arms[0], arms[-1])]
    accuracies = {"distilled": over_ratio(distilled), "baseline": over_ratio(baseline), "teacher": level}
    shares = ", ".join(f"{statistics.fmean(distilled[a]) / teacher:.1%} at r = {ratio[a]:.4f}" for a in arms)
    labels = {f"{which}, r = {ratio[a]:.4f}": (a, which) for a in arms for which in ("baseline", "distilled")}
    return claim.result(
        statements, {"gain": over_ratio(gains)}, accuracies, accuracies=_accuracies(results, labels), shares=shares
    )


def assistant(claim: Claim, results: Results) -> ExperimentResult:
    """Distillation through assistants against that from the teacher, for a student below a hundredth of its size."""
    rows = results.summary("assistant")["rows"]
    names = {row["role"]: row["name"] for row in rows}
    baseline, direct, through = (names[role] for role in ("baseline", "direct", "distilled"))
    labels = {name: ("assistant", name) for name in (baseline, direct, through)}
    result = compare(replace(claim, labels=labels, gains=[(through, direct, claim.statements[0])]), results)
    sizes = [f"{r['name']} {r['parameters']:,}" for r in rows if r["role"] in ("teacher", "assistant", "direct")]
    return replace(result, notes=[note.format(sizes=", ".join(sizes)) for note in claim.notes])


def distilbert(claim: Claim, results: Results) -> ExperimentResult:
    """The triple loss and every other layer of the teacher, against the loss without each term, and other weights."""
    result, summary = compare(claim, results), results.summary("triple")
    teacher, sizes = summary["teacher"]["accuracy"], summary["parameters"]
    full = next(iter(result.accuracies.values()))["last"]
    accuracy_share = within(claim.statements[0], [x / teacher for x in full], 0.97, math.inf)
    held_out = ", ".join(
        f"{label} {statistics.fmean(results.accuracy(arm, key='loss')):.3f}"
        for label, (arm, which) in claim.labels.items()
        if which == "distilled"
    )
    figures = {
        "teacher": teacher, "student_size": sizes["student"], "teacher_size": sizes["teacher"],
        "ratio": sizes["student"] / sizes["teacher"], "held_out": held_out,
    }  # fmt: skip
    notes = [note.format(**figures) for note in claim.notes]
    return replace(result, statements=[accuracy_share, *result.statements], notes=notes)


def closed_teacher(claim: Claim, results: Results) -> ExperimentResult:
    """Loss of a closed teacher's held-out answers before training, after it, and after training on shuffled ones."""
    held_out = {
        "before training": results.untrained("closed"),
        "trained on its answers": results.accuracy("closed", key="loss"),
        "trained on its answers to other prompts": results.accuracy("closed-shuffled", key="loss"),
    }
    before, own, other = held_out.values()
    lower, lower_than_shuffled = claim.statements
    statements = [
        _rise(lower, before, own, "nats a token"), _rise(lower_than_shuffled, other, own, "nats a token"),
    ]  # fmt: skip
    series = {"held-out loss": [point(label, values) for label, values in held_out.items()]}
    counts, size = llm.read_counts(results.out), results.summary("closed")["parameters"]["student"]
    accuracies = _accuracies(results, claim.labels)
    return claim.result(
        statements, series, accuracies=accuracies, pairs=counts["pairs"], held=counts["held"], size=size
    )


TESTS: dict[str, Callable[[Claim, Results], ExperimentResult]] = {
    "temperature": temperature, "t-squared": t_squared, "gradient": gradient, "dark-knowledge": dark_knowledge,
    "self-distillation": self_distillation, "capacity-gap": capacity_gap, "assistant": assistant,
    "distilbert": distilbert, "llm": closed_teacher,
}  # fmt: skip
"""The tests of claims that are more than gains, by id."""
