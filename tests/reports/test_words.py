"""The verdict claims no more than the figures show, and cells are never made up."""

from __future__ import annotations

import math

import pytest

from support.fake_runs import make_summary
from tutelage.reports import final_table, verdict
from tutelage.reports.formatting import ABSENT, duration, milliseconds, percent_spread, plain, points

KEEPS = "keeps 97.9 % of the teacher's accuracy with 8.2 % of its parameters."


def exact(summary):
    """The summary with means as given, without the noise of single seeds."""
    for arm, mean in (("baseline", 0.899), ("distilled", 0.9125)):
        if arm in summary["students"]:
            summary["students"][arm]["best"]["accuracy"]["mean"] = mean
    return summary


def test_an_interval_above_zero_is_a_gain():
    assert verdict(exact(make_summary())) == (
        "Distilled 91.2 % against baseline 89.9 %: +1.4 points (95 % interval +0.9 to +1.9, 3 seeds); "
        "keeps 97.9 % of the teacher's accuracy with 8.2 % of its parameters."
    )


def test_an_interval_around_zero_is_not_sold_as_a_gain():
    said = verdict(make_summary(low=-0.002, high=0.03))
    assert "+1.4 points, no difference shown (95 % interval −0.2 to +3.0, 3 seeds)" in said


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.02), (-0.02, 0.0), (0.0, 0.0)])
def test_an_interval_that_touches_zero_shows_no_difference(low, high):
    assert "no difference shown" in verdict(make_summary(low=low, high=high))


def test_a_loss_is_called_one():
    said = verdict(make_summary(distilled=0.88, low=-0.03, high=-0.008))
    assert "−1.9 points, distillation did worse (95 % interval −3.0 to −0.8, 3 seeds)" in said


def test_one_seed_has_no_interval():
    assert "+1.4 points (one seed: no interval); keeps" in verdict(make_summary(seeds=1))


def test_without_a_baseline_the_gain_is_unknown():
    said = verdict(exact(make_summary(baseline=None)))
    assert said == f"Distilled 91.2 %; no baseline was trained, so the gain is unknown; {KEEPS}"


def test_a_student_better_than_its_teacher_does_not_keep_but_reaches():
    summary = make_summary(distilled=0.95)
    summary["capacity_ratio"] = 1.0
    assert verdict(summary).endswith("reaches 101.9 % of the teacher's accuracy with as many parameters.")


def test_a_teacher_that_is_always_wrong_divides_nothing():
    summary = make_summary()
    summary["teacher"]["accuracy"] = 0.0
    assert verdict(summary).endswith("3 seeds).")


def test_the_table_has_a_row_for_each_model():
    teacher, alone, distilled = final_table(make_summary())
    assert teacher == {
        "name": "teacher", "accuracy": "93.2 %", "last": ABSENT, "agreement": ABSENT, "kl": ABSENT, "ece": "2.1 %",
        "loss": "0.241", "parameters": "637,450", "latency": "1.39 ms", "seconds": ABSENT,
    }  # fmt: skip
    assert [alone["name"], distilled["name"]] == ["baseline student", "distilled student"]
    assert distilled["accuracy"].startswith("91.3 ± 0.3")
    assert distilled["parameters"] == "52,298"
    assert distilled["latency"] == "0.41 ms"


def test_the_table_leaves_out_a_student_that_was_not_trained():
    assert [row["name"] for row in final_table(make_summary(baseline=None))] == ["teacher", "distilled student"]


def test_one_seed_shows_no_spread():
    assert "±" not in "".join(final_table(make_summary(seeds=1))[2].values())


def test_a_figure_that_was_not_measured_is_a_dash():
    summary = make_summary()
    del summary["students"]["distilled"]["best"]["agreement"], summary["latency"]
    summary["students"]["distilled"]["best"]["kl"]["mean"] = math.nan
    row = final_table(summary)[2]
    assert (row["agreement"], row["kl"], row["latency"]) == (ABSENT, ABSENT, ABSENT)


def test_a_tiny_difference_is_not_shown_as_zero():
    assert points(0.0004) == "+0.04"
    assert points(-0.0004) == "−0.04"
    assert points(0.0) == points(1e-9) == points(-1e-9) == "0.0"


def test_figures():
    assert percent_spread({"mean": 0.913, "std": 0.004}) == "91.3 ± 0.4 %"
    assert [milliseconds(p) for p in (0.0174, 1.386, 123.4)] == ["0.017 ms", "1.39 ms", "123.4 ms"]
    assert plain(12.345) == "12.3"
    assert [duration(s) for s in (1.234, 42.4, 94.6, 3700)] == ["1.2 s", "42 s", "1 min 35 s", "1 h 1 min"]
