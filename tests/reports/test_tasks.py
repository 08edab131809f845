"""Scores by tasks of lm-evaluation-harness in the page: each in its place, with its error, and only as text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from support.fake_runs import make_run, make_summary
from tutelage.errors import DataError
from tutelage.reports import write_report

HOSTILE = "</table></script><script>alert(1)</script><img src=x onerror=alert(1)>"
TASKS = {
    "teacher": {"arc_easy": {"acc": 0.7012, "acc_stderr": 0.0094}, "wikitext": {"word_perplexity": 21.37}},
    "baseline": {"arc_easy": {"acc": 0.4, "acc_stderr": 0.01}},
    "distilled": {
        "arc_easy": {"acc": 0.5214, "acc_stderr": 0.0103}, "wikitext": {"word_perplexity": 36.02},
        "gsm8k": {"exact_match,strict-match": 0.125, "exact_match_stderr,strict-match": 0.02},
    },
}  # fmt: skip


def body_of(runs: list[Path], folder: Path) -> str:
    text = write_report(runs, folder / "report.html").read_text(encoding="utf-8")
    return text[text.index("<body>") : text.index("<footer>")].replace("\u00a0", " ")


def scored(path: Path, tasks: Any, **summary: Any) -> Path:
    return make_run(path, {**make_summary(**summary), "tasks": tasks})


def test_each_score_stands_below_its_model_with_its_error(tmp_path: Path) -> None:
    body = body_of([scored(tmp_path / "digits", TASKS)], tmp_path)
    section = body[body.index("Tasks of lm-evaluation-harness") :]
    section = section[: section.index("</section>")]
    heads = [re.sub(r"<.*?>", "", head) for head in re.findall(r'<th scope="col">(.*?)</th>', section)]
    assert heads == ["Task", "Metric", "teacher", "baseline student", "distilled student"]
    rows = [
        re.findall(r'<t[hd](?: scope="row")?>(.*?)</t[hd]>', row)
        for row in re.findall(r"<tr>(.*?)</tr>", section[section.index("<tbody>") :])
    ]
    assert rows == [
        ["arc_easy", "acc", "70.1 ± 0.9 %", "40.0 ± 1.0 %", "52.1 ± 1.0 %"],
        ["wikitext", "word_perplexity", "21.4", "–", "36.0"],
        ["gsm8k", "exact_match,strict-match", "–", "–", "12.5 ± 2.0 %"],
    ]


def test_runs_side_by_side_keep_their_tables_apart(tmp_path: Path) -> None:
    runs = [scored(tmp_path / "one", TASKS), make_run(tmp_path / "two"), scored(tmp_path / "three", TASKS)]
    body = body_of(runs, tmp_path)
    assert body.count("Tasks of lm-evaluation-harness") == 1
    assert "Scores of one</caption>" in body
    assert "Scores of three</caption>" in body
    assert "Scores of two</caption>" not in body


@pytest.mark.parametrize("tasks", [None, {}, {"teacher": {"empty": {}}}])
def test_a_run_without_scores_says_nothing_of_tasks(tmp_path: Path, tasks: Any) -> None:
    assert "lm-evaluation-harness" not in body_of([scored(tmp_path / "digits", tasks)], tmp_path)


def test_names_of_tasks_and_metrics_are_text(tmp_path: Path) -> None:
    hostile = {"distilled": {HOSTILE: {HOSTILE: 0.5, "acc": 0.25}}}
    body = body_of([scored(tmp_path / "digits", hostile)], tmp_path)
    assert "<script>alert" not in body
    assert "<img" not in body
    assert body.count("&lt;/table&gt;&lt;/script&gt;&lt;script&gt;alert(1)") == 3


def test_scores_that_are_no_numbers_are_refused_with_their_key(tmp_path: Path) -> None:
    run = scored(tmp_path / "digits", {"teacher": {"arc_easy": {"acc": "high"}}})
    with pytest.raises(DataError, match=r"tasks\.teacher\.arc_easy\.acc: "):
        body_of([run], tmp_path)
    assert json.loads((run / "summary.json").read_text())["tasks"]
