"""Texts side by side: what models write, and what a judge said of them, in the page and only as text."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from support import language_worlds
from support.closed_teacher import Closed
from support.fake_runs import make_judged, make_run, make_summary, make_written
from tutelage import api
from tutelage.errors import DataError
from tutelage.progress import Terminal
from tutelage.reports import write_report
from tutelage.reports.judgements import verdict_text

HOSTILE = "</p></script><script>alert(1)</script><img src=x onerror=alert(1)>"


def body_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return text[text.index("<body>") : text.index("<footer>")]


def test_answers_and_their_judgement_are_side_by_side(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    make_written(run)
    make_judged(run / "judged" / "alpaca-judge.json")
    body = body_of(write_report([run], tmp_path / "report.html"))
    assert body.index('class="verdict"') < body.index("Answers compared by a judge") < body.index("Generated texts")
    tile = re.search(r'Wins of after over before</dt><dd class="value">(.*?)</dd><dd class="note">(.*?)</dd>', body)
    assert tile is not None
    assert tile[1].replace("\u00a0", " ") == "73.0 %", "the rate of the student, whichever side it stands on"
    assert "66.0" in tile[2]
    assert "80.0" in tile[2]
    assert "10.8" in body
    assert "before and after: after preferred in both orders" in body
    assert "before and after: after preferred in one order, a tie in the other" in body
    assert "before and after: a tie: the judge contradicted itself" in body
    assert "before and after: no verdict" in body
    assert body.count("<article") == 11 + 10
    assert "<summary>7 more</summary>" in body
    assert "<summary>6 more</summary>" in body


def test_what_the_judge_said_in_words() -> None:
    assert verdict_text(("a", "b"), ["win", "win"]) == "a and b: a preferred in both orders"
    assert verdict_text(("a", "b"), ["tie", "loss"]) == "a and b: b preferred in one order, a tie in the other"
    assert verdict_text(("a", "b"), ["tie", "win"]) == "a and b: a preferred in one order, a tie in the other"
    assert verdict_text(("a / b", "c"), ["loss", "win"]) == "a / b and c: a tie: the judge contradicted itself"


def test_a_folder_of_a_judgement_has_a_page_of_its_own(tmp_path: Path) -> None:
    make_judged(tmp_path / "j" / "judged.json")
    (tmp_path / "j" / "config.yaml").write_text("name: alpaca\n")
    body = body_of(write_report([tmp_path / "j"], tmp_path / "report.html"))
    assert "<h1>Answers compared by a judge: j</h1>" in body
    both = body_of(write_report([make_run(tmp_path / "run"), tmp_path / "j"], tmp_path / "both.html"))
    assert "<h2>Answers compared by a judge: j</h2>" in both


def test_answers_stay_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", make_summary())
    make_written(run, HOSTILE)
    make_judged(run / "judged" / "a.json", HOSTILE)
    page = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("samples/written.json", lambda found: {**found, "texts": [{"prompt": "x"}]}, "a text lacks one of"),
        ("judged/a.json", lambda found: {**found, "pairs": [{"pair": ["a"]}]}, r"pairs\.0"),
        ("judged/a.json", lambda found: {**found, "judge": 7}, "judge"),
    ],
)
def test_a_broken_file_is_named_with_what_to_do(tmp_path: Path, name: str, change: object, says: str) -> None:
    run = make_run(tmp_path / "mine")
    make_written(run)
    make_judged(run / "judged" / "a.json")
    file = run / name
    file.write_text(json.dumps(change(json.loads(file.read_text()))))  # type: ignore[operator]
    with pytest.raises(DataError, match=rf"(?s){name}.*{says}.*remove the file"):
        write_report([run], tmp_path / "report.html")


# From the judge to the page ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_worlds.llama(tmp_path_factory.mktemp("judge") / "model", layers=2)


def longer(prompt: str) -> str:
    first, second = prompt.partition("Answer A:\n")[2].split("\n\nAnswer B:\n")
    second = second.split("\n\nReply with")[0]
    return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def recipe(folder: Path, server: Closed, run: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "x" * (i * 7)}]}
        for i in range(1, 13)
    ]
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {
        "endpoint": {"url": server.url, "model": "closed", "timeout": 5}, "prompts": str(folder / "held.jsonl"),
        "answers": {"after": f"hf:{run}/student", "teacher": "given"}, "max_tokens": 6,
    }  # fmt: skip
    path = folder / "judged.yaml"
    path.write_text(yaml.safe_dump({"judge": section}))
    return path


def test_the_page_of_the_run_shows_its_student_before_the_judge(tmp_path: Path, model: Path) -> None:
    """A model that lies in a finished run takes the judgement along: figures, answers, who won in both orders."""
    run = make_run(tmp_path / "mine")
    shutil.copytree(model, run / "student")
    with Closed(answer=longer) as server:
        path = recipe(tmp_path, server, run)
        found = api.judge(path, out=tmp_path / "out", terminal=Terminal(Console(quiet=True), speaks=False))
    assert found.runs == [run]
    kept = json.loads((run / "judged" / "out.json").read_text())
    assert kept == json.loads((tmp_path / "out" / "judged.json").read_text())
    assert kept["roles"] == {"after": "distilled", "teacher": "teacher"}
    assert kept["pairs"] == found.summary["pairs"]
    assert len(kept["samples"]) == 12
    for page in (run / "report.html", tmp_path / "out" / "report.html"):
        text = page.read_text()
        assert "Answers compared by a judge" in text
        assert "teacher preferred in both orders" in text
        assert "What is 3?" in text
    assert "Wins of after over teacher" in (run / "report.html").read_text()


def test_a_run_that_cannot_be_written_does_not_lose_the_judgement(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "mine")
    shutil.copytree(model, run / "student")
    (run / "judged").write_text("a file where a folder should be")
    with Closed(answer=longer) as server:
        path = recipe(tmp_path, server, run)
        found = api.judge(path, out=tmp_path / "out", terminal=Terminal(Console(quiet=True), speaks=False))
    assert found.runs == []
    assert (tmp_path / "out" / "summary.json").exists()
