"""Dark knowledge on the page: the numbers are what the formula says, and no more is claimed than was found."""

from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pytest
from scipy.stats import spearmanr

from support.fake_runs import CLASSES, CONFIG, make_run, make_summary, similarity_file
from tutelage.errors import DataError
from tutelage.reports import write_report
from tutelage.reports.class_similarity import (
    ClassSimilarity,
    pairs_of,
    rank_correlation,
    shares,
    similarities_of,
    similarity_text,
    square,
)
from tutelage.reports.run_files import read_records
from tutelage.reports.sample_explorer import recipe_temperature

HOSTILE = "</script><script>alert(1)</script>"


def page_of(*runs, out):
    return write_report(runs, out / "r.html").read_text(encoding="utf-8")


def maps_in(page):
    (text,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page, flags=re.DOTALL)
    return [figure for figure in json.loads(text) if figure["data"][0]["type"] == "heatmap"]


def dark(page):
    return page[page.index("Dark knowledge</h2>") : page.index("Config</h2>")]


def named(upper):
    return {name: shares(square(values, 3)) for name, values in upper.items()}


def test_shares_by_hand():
    # p = (0.8, 0.1, 0.1) and (0.2, 0.6, 0.2): E[p] = (0.5, 0.35, 0.15)
    sim = square([0.34, 0.10, 0.06, 0.185, 0.065, 0.025], 3)
    assert np.array_equal(sim, sim.T)
    assert sim.sum() == pytest.approx(1)
    found = shares(sim)
    assert np.isnan(np.diag(found)).all()
    assert pairs_of(found) == pytest.approx([0.2 / 0.85, 0.12 / 0.65, 0.13 / 0.5])
    assert pairs_of(found.T) == pytest.approx(pairs_of(found))


def test_level_answers_share_one_in_c_and_one_hot_answers_nothing():
    assert pairs_of(shares(np.full((4, 4), 1 / 16))) == pytest.approx([0.25] * 6)
    assert pairs_of(shares(np.diag([0.5, 0.5, 0.0, 0.0]))) == pytest.approx([0.0] * 6)


def test_how_frequent_a_class_is_does_not_matter():
    p = np.array([[0.9, 0.1], [0.1, 0.9]])
    often, level = (np.einsum("n,ni,nj->ij", w, p, p) for w in (np.array([0.9, 0.1]), np.array([0.5, 0.5])))
    assert pairs_of(shares(often)) == pytest.approx(pairs_of(shares(level)))


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_spearmans_ties_included(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 6, 40).astype(float), rng.normal(size=40)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation(b, np.exp(b)) == pytest.approx(1)
    assert rank_correlation(b, -b) == pytest.approx(-1)


@pytest.mark.parametrize("b", [[1.0, 1.0, 1.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])
def test_where_there_is_no_order_there_is_no_correlation(b):
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array(b)) is None
    assert rank_correlation(np.array([1.0, 2.0]), np.array([1.0, 2.0])) is None


def test_a_run_read_from_its_files(tmp_path):
    run = make_run(tmp_path / "digits")
    (read,) = read_records([run])
    found = similarities_of(read)
    assert list(found) == ["1", "2", "4", "8", "20"]
    at = found["4"]
    kept = [json.loads((run / "similarity" / f"baseline-seed{s}.json").read_text())["sim"]["4"] for s in range(3)]
    by_hand = np.mean([shares(square(k, 10)) for k in kept], axis=0)
    assert np.allclose(at.mean["baseline"], by_hand, equal_nan=True)
    assert at.correlations["distilled"] == {f"distilled-seed{s}": pytest.approx(1.0) for s in range(3)}
    values = [at.mean["teacher"][pair] for pair in at.closest(45)]
    assert values == sorted(values, reverse=True)
    assert at.closer_seeds() == (3, 3)


def test_the_page_shows_teacher_and_students_at_every_temperature(tmp_path):
    page = page_of(make_run(tmp_path / "digits"), out=tmp_path)
    maps = maps_in(page)
    assert [m["data"][0]["name"] for m in maps] == ["teacher", "baseline student", "distilled student"]
    for figure in maps:
        assert [trace["show"]["T"] for trace in figure["data"]] == ["1", "2", "4", "8", "20"]
        for trace in figure["data"]:
            assert all(trace["z"][i][i] is None for i in range(10))
            assert trace["z"][2][5] == trace["z"][5][2]
    one = [trace["by"]["colours"]["one"] for trace in (m["data"][2] for m in maps)]
    assert one[0] == one[1] == one[2]
    shown = dark(page)
    assert shown.count('<tr><th scope="row">') == 5 * 10
    assert re.findall(r'data-when="T=(\d+)">', shown) == ["4"]
    assert len(re.findall(r'data-when="T=\d+" hidden>', shown)) == 4
    assert "1/C is 10.00\u00a0% here. Students: mean over 3 seeds." in shown
    assert "distilled student 1.00" in shown


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CONFIG, 4.0),
        (CONFIG.replace("4.0", "7"), 7.0),
        (CONFIG.replace("4.0", "-1"), 4.0),
        ("method: logit", 4.0),
        ("[", 4.0),
        ("null", 4.0),
        ("method: {temperature: .nan}", 4.0),
    ],
)
def test_the_temperature_of_the_recipe_is_where_the_page_begins(tmp_path, config, expected):
    run = make_run(tmp_path / "digits", config=config)
    (read,) = read_records([run])
    assert recipe_temperature(read) == expected
    preset = "8" if expected == 7 else "4"
    assert f'data-when="T={preset}">' in dark(page_of(run, out=tmp_path))


def test_what_is_said_of_the_students_is_what_was_found():
    teacher = [0.3, 0.05, 0.04, 0.2, 0.01, 0.25]
    other = [0.3, 0.01, 0.04, 0.2, 0.05, 0.25]

    def said(**students):
        return similarity_text(
            ClassSimilarity(named({"teacher": teacher, **{k.replace("_", "-"): v for k, v in students.items()}})),
            "4",
            "abc",
        )

    assert said() == "At T = 4 the most similar classes for the teacher are: a and b, a and c, and b and c."
    assert "closer" not in said(distilled_seed0=teacher)
    one = said(baseline_seed0=other, distilled_seed0=teacher)
    assert "distilled student is closer to the teacher's order in this one seed, which cannot rule out chance" in one
    both = {"baseline_seed0": other, "distilled_seed0": teacher}
    assert "in each of 2 seeds" in said(**both, baseline_seed1=other, distilled_seed1=teacher)
    assert "in 1 of 2 seeds, not in all" in said(**both, baseline_seed1=teacher, distilled_seed1=other)
    same = said(baseline_seed0=other, distilled_seed0=other, baseline_seed1=teacher, distilled_seed1=teacher)
    assert "in none of 2 seeds" in same


def test_a_run_from_before_has_a_page_without_it(tmp_path):
    run = make_run(tmp_path / "digits")
    shutil.rmtree(run / "similarity")
    assert "Dark knowledge" not in page_of(run, out=tmp_path)
    new = make_run(tmp_path / "new")
    both = page_of(run, new, out=tmp_path)
    assert len(maps_in(both)) == 3


def test_several_runs_have_a_panel_each(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", make_summary(baseline=None, seeds=1))]
    page = page_of(*runs, out=tmp_path)
    assert len(maps_in(page)) == 5
    shown = dark(page)
    assert shown.count('class="panel similarity"') == 2
    assert "<h3>a</h3>" in shown
    assert "<h3>b</h3>" in shown


def test_a_student_whose_file_is_missing_is_left_out(tmp_path):
    run = make_run(tmp_path / "digits")
    for file in (run / "similarity").glob("baseline-*"):
        file.unlink()
    assert [m["data"][0]["name"] for m in maps_in(page_of(run, out=tmp_path))] == ["teacher", "distilled student"]


def test_too_many_classes_are_said_to_be(tmp_path):
    run = make_run(tmp_path / "digits")
    for file in (run / "similarity").iterdir():
        file.write_text(json.dumps({"classes": 50_257, "n": 9, "sim": {}}))
    page = page_of(run, out=tmp_path)
    assert "This run has 50,257 classes, too many to store their similarities." in dark(page)
    assert maps_in(page) == []


def test_a_student_with_other_classes_or_no_number_does_not_break_the_page(tmp_path):
    run = make_run(tmp_path / "digits", make_summary(seeds=1))
    (run / "similarity" / "baseline-seed0.json").write_text(json.dumps(similarity_file(4, 0)))
    wrong = similarity_file(10, 0)
    wrong["sim"]["4"] = [math.nan] * 55
    (run / "similarity" / "distilled-seed0.json").write_text(json.dumps(wrong))
    page = page_of(run, out=tmp_path)
    assert [m["data"][0]["name"] for m in maps_in(page)] == ["teacher", "distilled student"]
    assert "nan" not in dark(page).lower()


def test_no_name_of_a_class_becomes_markup_and_equal_names_stay_two(tmp_path):
    names = [HOSTILE, "<b>x</b>", "long " * 20 + "1", "long " * 20 + "2", *CLASSES[4:]]
    page = page_of(make_run(tmp_path / "digits", make_summary(classes=names)), out=tmp_path)
    assert "<b>x" not in page
    assert "<script" not in dark(page)
    for figure in maps_in(page):
        labels = figure["data"][0]["x"]
        assert len(set(labels)) == 10
        assert not any("<" in text for text in [*labels, *figure["layout"]["xaxis"]["ticktext"]])


def test_a_hundred_classes_are_labelled_here_and_there_and_hold_no_text(tmp_path):
    summary = make_summary(classes=[f"class {i}" for i in range(100)], seeds=1)
    maps = maps_in(page_of(make_run(tmp_path / "many", summary), out=tmp_path))
    assert len(maps[0]["layout"]["xaxis"]["ticktext"]) == 25
    assert "texttemplate" not in maps[0]["data"][0]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not JSON"),
        ("[]", "should be a valid dictionary"),
        ('{"classes": 3, "n": 1, "sim": {"4": [1.0]}}', "not of 3 classes"),
        ('{"classes": 1, "n": 1, "sim": {"hot": [1.0]}}', "temperature"),
        ('{"classes": -1, "n": 1, "sim": {}}', "greater than or equal"),
    ],
)
def test_a_broken_file_is_named_with_what_to_do(tmp_path, text, why):
    run = make_run(tmp_path / "digits")
    file = run / "similarity" / "teacher.json"
    file.write_text(text)
    with pytest.raises(DataError, match=why) as error:
        write_report([run], tmp_path / "r.html")
    assert str(file) in str(error.value)
    assert "remove the file" in str(error.value)


def test_one_class_has_no_pair(tmp_path):
    run = make_run(tmp_path / "digits")
    for file in (run / "similarity").iterdir():
        file.write_text(json.dumps({"classes": 1, "n": 1, "sim": {"4": [1.0]}}))
    assert "Dark knowledge" not in page_of(run, out=tmp_path)
