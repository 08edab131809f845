"""A judge in both orders: what does not depend on the order counts, what does is a tie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from support import language_worlds
from support.closed_teacher import Closed
from tutelage.cli import main
from tutelage.errors import BudgetSpent, DataError
from tutelage.generation import judge_answers
from tutelage.generation.judge import pair_figures
from tutelage.progress import Terminal


def told(prompt: str) -> tuple[str, str]:
    """The two answers that a judge was shown."""
    first, second = prompt.partition("Answer A:\n")[2].split("\n\nAnswer B:\n")
    return first, second.split("\n\nReply with")[0]


def longer(prompt: str) -> str:
    first, second = told(prompt)
    return "tie" if len(first) == len(second) else ("A" if len(first) > len(second) else "B") + " is better"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_worlds.llama(tmp_path_factory.mktemp("judge") / "model", layers=2)


def recipe(folder: Path, server: Closed, model: Path, **more: object) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "x" * (i * 7)}]}
        for i in range(1, 13)
    ]
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {
        "endpoint": {"url": server.url, "model": "closed", "timeout": 5},
        "prompts": str(folder / "held.jsonl"),
        "answers": {"model": f"hf:{model}", "teacher": "given"},
        "max_tokens": 6,
        **more,
    }
    path = folder / "judged.yaml"
    path.write_text(yaml.safe_dump({"judge": section}))
    return path


def quiet() -> Terminal:
    return Terminal(Console(quiet=True), speaks=False)


def test_each_pair_is_judged_in_both_orders_and_what_wins_in_both_wins(tmp_path: Path, model: Path) -> None:
    with Closed(answer=longer) as server:
        path = recipe(tmp_path, server, model)
        found = judge_answers(path, out=tmp_path / "out", terminal=quiet())
        shown = [told(call.prompt) for call in server.calls]
        inside = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
        assert [p for p in inside if str(tmp_path / "out").encode() in p.read_bytes()] == []
        (tmp_path / "out").rename(tmp_path / "moved")
        assert judge_answers(path, out=tmp_path / "moved", terminal=quiet()).summary["calls"] == 0
    (tmp_path / "moved").rename(tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    for line in lines:
        mine, theirs = line["answers"]["model"], line["answers"]["teacher"]
        assert (mine, theirs) in shown
        assert (theirs, mine) in shown
        expected = "win" if len(mine) > len(theirs) else "loss" if len(mine) < len(theirs) else "tie"
        assert line["verdicts"] == {"model / teacher": [expected, expected]}
        assert theirs == "x" * len(theirs)
    (pair,) = found.summary["pairs"]
    assert pair["wins"] + pair["ties"] + pair["losses"] == 12
    assert pair["wins"] == sum(len(li["answers"]["model"]) > len(li["answers"]["teacher"]) for li in lines)
    assert pair["opposed"] == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| model | teacher |" in text
    assert "What is 3?" in text


def test_a_judge_that_goes_by_the_order_says_nothing(tmp_path: Path, model: Path) -> None:
    with Closed(answer=lambda prompt: "A") as server:
        found = judge_answers(recipe(tmp_path, server, model), out=tmp_path / "out", terminal=quiet())
    (pair,) = found.summary["pairs"]
    assert (pair["wins"], pair["losses"], pair["rate"]) == (0, 0, 0.5)
    assert pair["opposed"] == 12
    assert pair["first_place"] == 1.0


def test_what_is_no_verdict_is_counted_and_left_out(tmp_path: Path, model: Path) -> None:
    with Closed(answer=lambda prompt: "I like both") as server:
        found = judge_answers(recipe(tmp_path, server, model), out=tmp_path / "out", terminal=quiet())
    (pair,) = found.summary["pairs"]
    assert pair["judged"] == 0
    assert pair["without_verdict"] == 24
    assert pair["rate"] is None


def test_figures_by_hand() -> None:
    found = pair_figures(
        ("a", "b"), [["win", "win"], ["win", "tie"], ["win", "loss"], ["loss", "loss"], ["tie", "tie"], ["win", None]]
    )
    assert (found["wins"], found["ties"], found["losses"], found["judged"]) == (2, 2, 1, 5)
    assert found["rate"] == pytest.approx((1 + 0.75 + 0.5 + 0 + 0.5) / 5)
    assert found["low"] < found["rate"] < found["high"]
    assert found["opposed"] == 1
    # as shown: first, second | first, tie | first, first | second, first | - | first, -
    assert found["first_place"] == pytest.approx(6 / 8)


def test_the_budget_holds_for_a_judge_too(tmp_path: Path, model: Path) -> None:
    with Closed(answer=longer) as server:
        path = recipe(tmp_path, server, model, budget={"max_requests": 10})
        with pytest.raises(BudgetSpent):
            judge_answers(path, out=tmp_path / "out", terminal=quiet())
        assert len(server.calls) == 10
        assert judge_answers(path, ["judge.budget.max_requests=null"], out=tmp_path / "out", terminal=quiet()).path
        assert len(server.calls) == 24


def test_rows_without_an_answer_cannot_be_given(tmp_path: Path, model: Path) -> None:
    with Closed() as server:
        path = recipe(tmp_path, server, model)
        (tmp_path / "held.jsonl").write_text('{"prompt": "What is one?"}\n')
        with pytest.raises(DataError, match=r"row 1: the row has no answer"):
            judge_answers(path, out=tmp_path / "out", terminal=quiet())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answers": {"a": "given"}}, "answers"),
        ({"answers": {"a": "given", "b": "gpt-9"}}, "hf:FOLDER"),
        ({"answers": {"a": "given", "b": "given"}}, "are the same"),
        ({"template": "{{ prompt }} {{ frist }}"}, "did you mean 'first'"),
        ({"choice": "A|B"}, "has no group"),
        ({"prompts": "nowhere.jsonl"}, "cannot be read"),
    ],
)
def test_mistakes_are_one_message(
    tmp_path: Path, model: Path, change: dict[str, object], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Closed() as server:
        path = recipe(tmp_path, server, model, **change)
        with pytest.raises(SystemExit) as end:
            main(["judge", str(path), "--out", str(tmp_path / "out")])
        assert not server.calls
    assert end.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())
