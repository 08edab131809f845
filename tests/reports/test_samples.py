"""Single samples, costs and what a run is judged by, in the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from support.fake_runs import CLASSES, make_run, make_samples, make_summary
from tutelage.errors import DataError
from tutelage.reports import write_report
from tutelage.reports.formatting import file_size
from tutelage.reports.results import model_names
from tutelage.reports.sample_explorer import disagreement_text

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


def body_of(*runs: Path) -> str:
    text = write_report(runs, runs[0].parent / "report.html").read_text(encoding="utf-8")
    return text[text.index("<body>") : text.index("<script>/**")].replace("\u00a0", " ")


def explored(body: str) -> list[dict[str, Any]]:
    (text,) = re.findall(r'<script type="application/json" id="samples">(.*?)</script>', body, flags=re.DOTALL)
    found: list[dict[str, Any]] = json.loads(text)
    return found


def test_where_they_disagree_comes_with_pictures_and_who_is_right(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits")
    make_samples(run, make_summary())
    body = body_of(run)
    assert "disagree on 99 of 900 test samples, 11.0 %" in body
    assert "Only the teacher is right on 60, only the distilled student on 20" in body
    assert "The baseline student disagrees with the teacher on 100." in body
    assert body.count('class="card disagree"') == 6
    assert body.count('class="card"') == 6
    assert body.count('<img src="data:image/png;base64,') == 12
    assert '<th scope="row">zero</th><td>one</td><td>9</td>' in body
    assert "Agreement with the teacher by class" in body
    assert 'data-recipe="4"' in body
    (data,) = explored(body)
    assert data["models"] == ["teacher", "baseline", "distilled"]
    assert len(data["samples"]) == 12
    assert data["names"] == CLASSES


def test_of_two_runs_each_has_its_explorer(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("one", "two", "three")]
    for run in runs[:2]:
        make_samples(run, make_summary(), texts=run is runs[1])
    body = body_of(*runs)
    assert body.count("data-explorer=") == len(explored(body)) == 2
    assert "sample0" in body
    assert "sample1" in body


def test_a_run_without_samples_has_a_page_too(tmp_path: Path) -> None:
    body = body_of(make_run(tmp_path / "digits"))
    assert "Sample by sample" not in body
    assert 'id="samples"' not in body


def test_texts_and_names_stay_text(tmp_path: Path) -> None:
    summary = make_summary(classes=[HOSTILE, "b", "c"])
    run = make_run(tmp_path / "digits", summary)
    make_samples(run, summary, texts=True)
    body = body_of(run)
    assert "<img src=x" not in body
    assert "alert(1)</script>" not in body
    assert explored(body)[0]["names"][0] == HOSTILE


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda one: one.update(image="javascript:alert(1)"), "image"),
        (lambda one: one.update(image="data:image/svg+xml;base64,AAAA"), "image"),
        (lambda one: one["logits"].pop("teacher"), "lacks the logits of teacher"),
        (lambda one: one["logits"]["teacher"].pop(), "not all of 10 classes"),
        (lambda one: one.update(label=10), "a class is not among 10"),
    ],
)
def test_what_no_run_writes_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    run = make_run(tmp_path / "digits")
    make_samples(run, make_summary())
    file = run / "samples" / "test.json"
    found = json.loads(file.read_text())
    change(found["samples"][0])
    file.write_text(json.dumps(found))
    with pytest.raises(DataError, match=rf"(?s)test\.json.*{says}.*remove the file"):
        body_of(run)


def test_the_finding_without_a_teacher_and_without_a_difference() -> None:
    found = {
        "exported": "distilled-seed0", "n": 10, "reference": "baseline", "student": "distilled",
        "agree": {"distilled": 10}, "right": {"both": 9, "reference": 0, "student": 0, "neither": 1},
    }  # fmt: skip
    text = disagreement_text(found, model_names({"uses_teacher": False}))
    assert text == (
        "The baseline student and the student with the method (distilled-seed0) disagree on 0 of 10 test samples, "
        "0.0 %."
    )


def test_costs_are_read_from_the_folders(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits")
    for folder, many in (("models/teacher", 4_000_000), ("student", 250_000), ("models/baseline-seed0", 250_000)):
        (run / folder).mkdir(parents=True)
        (run / folder / "model.safetensors").write_bytes(b"x" * many)
    (run / "models" / "teacher" / "result.json").write_text('{"seconds": 90.0}')
    body = body_of(run)
    assert '<th scope="row">Weights on disk</th><td>4.0 MB</td><td>250 kB</td><td>250 kB</td><td>6.2 %</td>' in body
    assert '<th scope="row">Latency, p95</th><td>1.71 ms</td><td>0.55 ms</td><td>0.55 ms</td>' in body
    assert '<th scope="row">Training</th><td>1 min 30 s</td><td>42 s</td><td>42 s</td>' in body
    (run / "models" / "teacher" / "result.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        body_of(run)
    assert [file_size(n) for n in (None, 12, 1_500, 52_298_000, 3 * 10**9)] == [
        "–",
        "12 bytes",
        "1.5 kB",
        "52.3 MB",
        "3.0 GB",
    ]


def test_a_run_judged_by_another_metric_does_not_speak_of_accuracy(tmp_path: Path) -> None:
    """Correlation with numbers: nothing in such a run is an accuracy."""
    summary = make_summary()
    summary["metric"], summary["classes"] = "spearman", None

    def renamed(scores: dict[str, Any]) -> None:
        scores["spearman"] = scores.pop("accuracy")
        for key in ("reliability", "per_class", "ece"):
            scores.pop(key, None)

    renamed(summary["teacher"])
    renamed(summary["teacher"]["validation"])
    for arm in summary["students"].values():
        for which in ("best", "last"):
            renamed(arm[which])
        arm.pop("reliability")
        arm.pop("per_class")
    run = make_run(tmp_path / "numbers", make_summary())
    (run / "summary.json").write_text(json.dumps(summary))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    for line in lines:
        if "validation" in line:
            line["validation"]["spearman"] = line["validation"].pop("accuracy")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    body = body_of(run)
    assert "ccurac" not in re.sub(r"<pre.*?</pre>", "", body, flags=re.DOTALL)
    for text in ("Test Spearman, seed by seed", "Validation Spearman", "Of the teacher&#39;s Spearman",
                 "Spearman, best on validation", "Spearman: times 100"):  # fmt: skip
        assert text in body, text
    both = body_of(run, make_run(tmp_path / "digits"))
    assert "Runs, test Spearman and accuracy" in both
