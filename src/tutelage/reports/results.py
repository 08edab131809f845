"""Verdicts in a sentence, and the rows of result tables as text, for the terminal and for pages."""

from collections.abc import Iterable, Mapping
from typing import Any

from tutelage.reports.formatting import (
    ABSENT,
    count,
    duration,
    interval,
    milliseconds,
    percent,
    percent_spread,
    plain,
    plain_spread,
    points,
    seeds_text,
    values_text,
)

TEACHER, BASELINE, DISTILLED = "teacher", "baseline student", "distilled student"
WITH_METHOD = "student with the method"
"""Name of the distilled student where the method has no teacher."""

CELLS = ("name", "accuracy", "last", "agreement", "kl", "ece", "loss", "parameters", "latency", "seconds")
"""Keys of a row of the final table."""

NEEDS_TEACHER = ("agreement", "kl")
"""Those that exist only with a teacher."""


METRIC_LABELS = {
    "accuracy": "accuracy", "f1": "F1, x100", "matthews": "Matthews, x100", "spearman": "Spearman, x100",
    "pearson": "Pearson, x100", "r2": "R², x100",
}  # fmt: skip
"""The metrics by which a run can select its weights, by their names in a summary."""


def metric_of(summary: Mapping[str, Any]) -> str:
    """The name of a run's metric."""
    return str(summary.get("metric", "accuracy"))


def metric_label(summary: Mapping[str, Any]) -> str:
    """A run's metric, for use in a sentence."""
    return METRIC_LABELS.get(metric_of(summary), metric_of(summary)).partition(",")[0]


def metric_labels(summaries: Iterable[Mapping[str, Any]]) -> str:
    """The metrics of several runs, each once."""
    return " and ".join(dict.fromkeys(metric_label(summary) for summary in summaries))


def with_accuracy(record: Any, metric: str) -> Any:
    """The record with the metric copied to ``accuracy``, which pages show, wherever the record holds the metric.

    ``tasks`` stay as they are.
    """
    if metric == "accuracy" or not isinstance(record, Mapping | list):
        return record
    if isinstance(record, list):
        return [with_accuracy(item, metric) for item in record]
    copied = {key: value if key == "tasks" else with_accuracy(value, metric) for key, value in record.items()}
    return copied | ({"accuracy": copied[metric]} if metric in copied else {})


def model_names(summary: Mapping[str, Any]) -> dict[str, str]:
    """The name of each role in a run."""
    distilled = DISTILLED if summary.get("uses_teacher", True) else WITH_METHOD
    return {"teacher": TEACHER, "baseline": BASELINE, "distilled": distilled}


def role_of_model(name: str) -> str:
    """The role of a model by its name in :func:`final_table`."""
    roles = {BASELINE: "baseline", DISTILLED: "distilled", WITH_METHOD: "distilled"}
    return roles.get(name, "teacher" if name.startswith(TEACHER) else "other")


def short_names(summary: Mapping[str, Any]) -> dict[str, str]:
    """The same without the word student, for legends."""
    return {
        role: name.removeprefix("student ").removesuffix(" student") for role, name in model_names(summary).items()
    }


def verdict(summary: Mapping[str, Any]) -> str:
    """The result of a run in one sentence.

    A gain counts as shown only when its interval excludes zero. The sentence says so where there is one seed, and
    thus no interval, and where there is no baseline, and thus no gain.
    """
    summary = with_accuracy(summary, metric_of(summary))
    return f"{_against_baseline(summary)}{_against_teacher(summary)}."


def _against_baseline(summary: Mapping[str, Any]) -> str:
    students, has_teacher = summary["students"], summary.get("uses_teacher", True)
    head = f"{'Distilled' if has_teacher else 'With the method'} {_mean_accuracy(students['distilled'], summary)}"
    if not students.get("baseline") or not summary.get("gain"):
        return f"{head}; no baseline was trained, so the gain is unknown"
    gain = summary["gain"]["best"]
    outcome = ""
    if gain["low"] is not None and gain["high"] is not None:
        if gain["low"] <= 0 <= gain["high"]:
            outcome = ", no difference shown"
        elif gain["mean"] < 0:
            outcome = f", {'distillation' if has_teacher else 'the method'} did worse"
    baseline = _mean_accuracy(students["baseline"], summary)
    repeated = summary.get("repeated_seeds") or []
    equal = f"; {seeds_text(repeated).lower()} gave identical weights" if repeated else ""
    return f"{head} against baseline {baseline}: {points(gain['mean'])} points{outcome} ({interval(gain)}{equal})"


CORRELATIONS = ("spearman", "pearson", "matthews")
"""Metrics from -1 to 1: they are no percentages, and a share of one means nothing."""


def _mean_accuracy(arm: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    mean, metric = arm["best"]["accuracy"]["mean"], metric_of(summary)
    return f"{METRIC_LABELS[metric]} {100 * mean:.1f}" if metric in CORRELATIONS else percent(mean)


def _against_teacher(summary: Mapping[str, Any]) -> str:
    teacher = (summary.get("teacher") or {}).get("accuracy")
    if not teacher:
        return ""
    if metric_of(summary) in CORRELATIONS:
        return f"; the teacher has {100 * teacher:.1f}"
    share = summary["students"]["distilled"]["best"]["accuracy"]["mean"] / teacher
    ratio = summary.get("capacity_ratio")
    size = "as many parameters" if ratio == 1 else f"{percent(ratio)} of its parameters"
    size = "" if ratio is None else f" with {size}"
    verb = "keeps" if share <= 1 else "reaches"
    return f"; {verb} {percent(share)} of the teacher's {metric_label(summary)}{size}"


def final_table(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row for each model: teacher, members of an ensemble, baseline student and distilled student.

    Without a teacher its rows are missing. Peers and exits, which are trained together with a student, follow it.

    Returns:
        Texts under the keys of :data:`CELLS`; an en dash where there is no such figure.
    """
    summary = with_accuracy(summary, metric_of(summary))
    teacher, latency, sizes = summary.get("teacher"), summary.get("latency") or {}, summary["parameters"]

    def speed(model: str) -> str:
        return milliseconds((latency.get(model) or {}).get("p50_ms"))

    rows = []
    if teacher is not None:
        rows.append(_model_row(TEACHER, teacher, sizes["teacher"]) | {"latency": speed("teacher")})
        rows += [
            _model_row(f"{member['name']}, weight {member['weight']:.2f}", member["test"], member["parameters"])
            for member in (teacher.get("ensemble") or {}).get("members", [])
        ]
    names = model_names(summary)
    for arm in ("baseline", "distilled"):
        if result := summary["students"].get(arm):
            took = duration((result.get("seconds") or {}).get("mean"))
            rows.append(
                _student_row(names[arm], result, sizes["student"]) | {"latency": speed("student"), "seconds": took}
            )
            rows += [
                _student_row(name, other, other["parameters"]) for name, other in (result.get("others") or {}).items()
            ]
    if metric_of(summary) in CORRELATIONS:
        rows = [row | {key: row[key].removesuffix(" %") for key in ("accuracy", "last")} for row in rows]
    return rows


def _model_row(name: str, metrics: Mapping[str, Any], parameters: int) -> dict[str, str]:
    return dict.fromkeys(CELLS, ABSENT) | {
        "name": name,
        "accuracy": percent(metrics["accuracy"]),
        "ece": percent(metrics.get("ece")),
        "loss": plain(metrics.get("loss")),
        "parameters": count(parameters),
    }


def _student_row(name: str, result: Mapping[str, Any], parameters: int) -> dict[str, str]:
    best = result["best"]
    return dict.fromkeys(CELLS, ABSENT) | {
        "name": name,
        "accuracy": percent_spread(best.get("accuracy")),
        "last": percent_spread(result["last"].get("accuracy")),
        "agreement": percent_spread(best.get("agreement")),
        "kl": plain_spread(best.get("kl")),
        "ece": percent_spread(best.get("ece")),
        "loss": plain_spread(best.get("loss")),
        "parameters": count(parameters),
    }


def speed_up(summary: Mapping[str, Any]) -> str:
    """``3.1 times faster``; empty where latency was not measured."""
    latency = summary.get("latency") or {}
    teacher, student = ((latency.get(model) or {}).get("p50_ms", 0) for model in ("teacher", "student"))
    if min(teacher, student) <= 0:
        return ""
    ratio = teacher / student
    if 0.95 < ratio < 1.05:
        return "as fast"
    return f"{ratio:.1f} times faster" if ratio > 1 else f"{1 / ratio:.1f} times slower"


def test_samples(summary: Mapping[str, Any]) -> int:
    """Samples of the test split; 0 where the summary does not hold their number."""
    if (teacher := summary.get("teacher")) is not None:
        return teacher.get("n") or 0
    bins = summary["students"]["distilled"].get("reliability") or {}
    return int(sum(bins.get("count", [])))


def multistage_table(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of a multi-stage run.

    Returns:
        Texts under ``name``, ``parameters``, ``accuracy``, ``last`` and ``over``: the gain over the first row that it
        is compared with.
    """
    return [
        {
            "name": row["name"],
            "parameters": count(row["parameters"]),
            "accuracy": percent_spread(row["best"]["accuracy"]),
            "last": percent_spread(row["last"]["accuracy"]),
            "over": next(
                (f"{points(pair['best']['mean'])} over {other}" for other, pair in row["against"].items()), ABSENT
            ),
        }
        for row in summary["rows"]
    ]


def search_verdict(search: Mapping[str, Any]) -> str:
    """The result of a search in three sentences.

    The gain on validation is named as what it is: that of the best of many trials, by the metric that chose it. The
    gain on the test split counts as shown only when its interval excludes zero.
    """
    trials, test = search["trials"], search["test"]
    states = [trial["state"] for trial in trials]
    stopped = "".join(
        f", {count(states.count(state))} {text}"
        for state, text in {"pruned": "stopped early", "diverged": "diverged", "failed": "failed"}.items()
        if state in states
    )
    best = next(trial for trial in trials if trial["number"] == search["best"])
    head = f"{count(len(trials))} trials{stopped}"
    if search["same"]:
        return (
            f"{head}: none is better on validation than the unchanged recipe, {percent(best['validation'])}. "
            f"Test, measured once: {percent(test['default']['last']['mean'])}."
        )
    gain = test["gain"]["last"]
    outcome = ""
    if gain["low"] is not None and gain["high"] is not None:
        outcome = (
            ", no difference shown" if gain["low"] <= 0 <= gain["high"] else ", worse" if gain["mean"] < 0 else ""
        )
    chosen, default = (percent(test[which]["last"]["mean"]) for which in ("chosen", "default"))
    default_validation = percent(search["default"]["validation"])
    validation_gain = points(search["gain_on_validation"]["mean"])
    return (
        f"{head}: {values_text(best['values'])} has {percent(best['validation'])} on validation, the unchanged "
        f"recipe {default_validation}: {validation_gain} points, for the best of {count(len(trials))}. Test, "
        f"measured once: {chosen} against {default}: {points(gain['mean'])} points{outcome} ({interval(gain)})."
    )


def judge_wins(judgement: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Win rates of the distilled student: title, rate, explanation."""
    wins = []
    for pair in judgement["pairs"]:
        first, second = pair["pair"]
        roles, rate, low, high = judgement["roles"], pair["rate"], pair["low"], pair["high"]
        if roles.get(first) != "distilled":  # then the rate is that of the other side
            first, second = second, first
            rate = None if rate is None else 1 - rate
            low, high = (None, None) if low is None else (1 - high, 1 - low)
        if roles.get(first) == "distilled" and rate is not None:
            bounds = "" if low is None else f", 95 % interval {percent(low)} to {percent(high)}"
            how = f"{pair['judged']:,} prompts, judged by {judgement['judge']}{bounds}"
            wins.append((f"Wins of {first} over {second}", percent(rate), how))
    return wins
