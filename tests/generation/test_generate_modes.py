"""Self-instruct, evolution, best of several, conversations and batches, over a server whose answers are known."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.closed_teacher import WORDS, Closed, said
from support.generations import answered, kept, made, prompts, recipe, rejected
from tutelage.errors import BudgetSpent, Interrupted
from tutelage.generation import client
from tutelage.generation.duplicates import NearDuplicateIndex
from tutelage.generation.prompts import read_tasks
from tutelage.generation.strategies import parse_list


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.02)


# Self-instruct -------------------------------------------------------------------------------------------------


def test_our_seeds_are_many_and_differ() -> None:
    rows = [
        json.loads(line)
        for line in (Path(client.__file__).parent / "seeds.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(rows) == len(read_tasks(None)) >= 60
    assert len({row["id"] for row in rows}) == len(rows)
    kinds = Counter(row["kind"] for row in rows)
    assert len(kinds) >= 12
    assert max(kinds.values()) <= len(rows) / 6
    near = NearDuplicateIndex(0.7)
    assert all(near.add_if_new(row["instruction"]) is None for row in rows)
    assert all(row["answer"].strip() for row in rows)


@pytest.mark.parametrize(
    ("text", "cut", "tasks"),
    [
        ("1. Write a poem.\n2. Name a river.", False, ["Write a poem.", "Name a river."]),
        ("9. Write a poem.\n10. Name a ri", True, ["Write a poem."]),
        ("Sure!\n1) Sort this:\n3, 1, 2\n2) Rest", False, ["Sort this:\n3, 1, 2", "Rest"]),
        ("**1. Write a poem.**\nTask 2: Name a river.", False, ["Write a poem.", "Name a river."]),
        ("- Write a poem.\n- Name a river.", False, ["Write a poem.", "Name a river."]),
        ("Write a poem.\n\nName a river.", False, ["Write a poem.", "Name a river."]),
        ("", False, []),
    ],
)
def test_lists_of_tasks_are_read(text: str, cut: bool, tasks: list[str]) -> None:
    assert parse_list(text, is_cut=cut) == tasks


def inventive(prompt: str) -> str:
    """Two tasks of which one was often had before, or an answer."""
    if "more tasks" not in prompt:
        return said(prompt)
    dice, pool = random.Random(prompt), WORDS.split()
    fresh = " ".join(dice.choice(pool) for _ in range(9))
    return f"9. Describe {fresh}\n10. {dice.choice(('Name a river in France', 'Describe the moon to a child'))}"


def test_self_instruct_makes_new_tasks_from_seeds_and_its_own_and_answers_each(tmp_path: Path) -> None:
    with Closed(answer=inventive) as server:
        path = recipe(
            tmp_path, server, kind="self-instruct", count=40, number=2, each_round=8,
            quality={"dedup_threshold": 0.7, "instruction_words": [3, 60]},
        )  # fmt: skip
        found = made(path, tmp_path / "out")
        asked = [call.prompt for call in server.calls if "more tasks" in call.prompt]
        assert len(server.calls) == found.summary["calls"]
        assert made(path, tmp_path / "out").summary["calls"] == 0
    rows = kept(tmp_path / "out")
    assert found.summary["kept"] == len(rows) == 40
    tasks = [row["messages"][0]["content"] for row in rows]
    assert len(set(tasks)) == 40
    seeds = read_tasks(None)
    shown = [re.findall(r"^\d+\. (.*)$", prompt, re.MULTILINE) for prompt in asked]
    assert all(len(prompt) >= 8 for prompt in shown)
    assert any(task in prompt for prompt in shown for task in tasks), "later rounds show tasks of earlier ones"
    assert any(seed.splitlines()[0] in prompt for prompt in shown for seed in seeds)
    for row in rows:
        assert len(row["keys"]) == 2, "that of the task, and that of its answer"
    reasons = Counter(row["reason"] for row in rejected(tmp_path / "out"))
    assert reasons["duplicate"] > 5


def test_another_filter_reads_the_same_tasks_and_pays_for_none(tmp_path: Path) -> None:
    """Requests for tasks show what was kept before, so that other filters would change and repeat them all."""
    with Closed(answer=inventive) as server:
        path = recipe(
            tmp_path, server, kind="self-instruct", count=24, number=2, each_round=8, quality={"dedup_threshold": 0.7}
        )
        made(path, tmp_path / "out")
        before = len(server.calls)
        changed = made(path, tmp_path / "out", "generate.quality.banned=[bridge]", "generate.count=12")
        new = [call.prompt for call in server.calls[before:]]
    assert 0 < changed.summary["kept"] <= 12
    assert changed.summary["rejected"]["banned"]
    assert not [prompt for prompt in new if "more tasks" in prompt]


def test_self_instruct_ends_where_nothing_new_comes(tmp_path: Path) -> None:
    with Closed(answer=lambda prompt: "1. Name a river in France") as server:
        path = recipe(
            tmp_path, server, kind="self-instruct", count=50, number=2, each_round=3, quality={"dedup_threshold": 0.7}
        )
        found = made(path, tmp_path / "out")
    assert found.summary["kept"] == 1


# Evolution -----------------------------------------------------------------------------------------------------


def evolving(prompt: str) -> str:
    task = prompt.partition("Task:\n")[2]
    if not task:
        return said(prompt)
    if "bad" in task:
        return task  # it is what it was
    return f"New task: {task.strip()} and say also why {said(prompt).split()[0]} {len(prompt)} matters"


def test_evolution_goes_on_from_what_succeeded(tmp_path: Path) -> None:
    tasks = [
        {"instruction": "Explain what rain is"},
        {"instruction": "Explain what a bad habit is", "input": "smoking"},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    with Closed(answer=evolving) as server:
        found = made(
            recipe(tmp_path, server, kind="evolve", prompts=str(tmp_path / "t.jsonl"), rounds=3), tmp_path / "out"
        )
        asked = [call.prompt for call in server.calls if "Task:" in call.prompt]
    rows = {row["id"]: row for row in kept(tmp_path / "out")}
    assert set(rows) == {"0", "1", "0-1", "0-2", "0-3"}
    first, last = rows["0-1"]["messages"][0]["content"], rows["0-3"]["messages"][0]["content"]
    assert last.startswith(rows["0-2"]["messages"][0]["content"])
    assert first.startswith("Explain what rain is and say")
    assert rows["0-2"]["source"].endswith("of 0-1")
    assert rows["1"]["messages"][0]["content"] == "Explain what a bad habit is\n\nsmoking"
    assert Counter(row["reason"] for row in rejected(tmp_path / "out")) == {"failed evolution": 3}
    assert len(asked) == 6
    assert found.summary["kept"] == 5


# Best of several -----------------------------------------------------------------------------------------------


class Samples:
    """Answers that differ by call: the judge gives each a score that the answer itself holds."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prompt: str) -> str:
        if "whole number from 1" in prompt:
            answer = prompt.partition("Answer:\n")[2]
            score = re.search(r"worth (\d+)", answer)
            return f"Score: {score.group(1)}" if score and score.group(1) != "3" else "no idea"
        self.calls += 1
        worth = (2, 9, 5, 3)[self.calls % 4]
        return f"The answer numbered {self.calls} is worth {worth}, and the result is {worth % 4}"


def test_the_judge_chooses(tmp_path: Path) -> None:
    answer = Samples()
    with Closed(answer=answer) as server, Closed(answer=answer, model="judge") as judge:
        path = recipe(
            tmp_path, server, prompts=str(prompts(tmp_path, 12)), samples=4, endpoint={"concurrency": 1},
            best={"by": "judge", "judge": {"url": judge.url, "model": "judge"}},
        )  # fmt: skip
        made(path, tmp_path / "out")
        assert len(server.calls) == 48
        assert len(judge.calls) == 48
    rows = kept(tmp_path / "out")
    assert len(rows) == 12
    assert {row["score"] for row in rows} == {9.0}
    assert all("worth 9" in row["messages"][-1]["content"] for row in rows)


def test_the_most_frequent_result_wins(tmp_path: Path) -> None:
    def answer(prompt: str, state: dict[str, int] = {}) -> str:  # noqa: B006
        state["n"] = state.get("n", 0) + 1
        return f"Number {state['n']}. First 7, then the result is {(4, 6, 6, 4, 6)[state['n'] % 5]}"

    with Closed(answer=answer) as server:
        path = recipe(
            tmp_path, server, prompts=str(prompts(tmp_path, 6)), samples=5, endpoint={"concurrency": 1},
            best={"by": "consistency", "extract": r"(\d+)\D*$"},
        )  # fmt: skip
        made(path, tmp_path / "out")
    rows = kept(tmp_path / "out")
    assert len(rows) == 6
    for row in rows:
        assert row["messages"][-1]["content"].endswith("is 6")
        assert row["score"] == 0.6


def test_without_a_result_the_answer_most_like_the_others_wins(tmp_path: Path) -> None:
    said_in_turn = [
        "cats sleep all day long",
        "dogs bark at cars",
        "cats sleep all day",
        "cats sleep most of the day",
    ]

    def answer(prompt: str, state: dict[str, int] = {}) -> str:  # noqa: B006
        state["n"] = state.get("n", -1) + 1
        return said_in_turn[state["n"] % 4]

    with Closed(answer=answer) as server:
        path = recipe(
            tmp_path, server, prompts=str(prompts(tmp_path, 1)), samples=4, endpoint={"concurrency": 1},
            best={"by": "consistency"},
        )  # fmt: skip
        made(path, tmp_path / "out")
    assert kept(tmp_path / "out")[0]["messages"][-1]["content"] == "cats sleep all day"


def test_all_samples_are_kept_where_nothing_chooses(tmp_path: Path) -> None:
    answer = Samples()
    with Closed(answer=answer) as server:
        path = recipe(tmp_path, server, prompts=str(prompts(tmp_path, 5)), samples=3)
        assert made(path, tmp_path / "out").summary["kept"] == 15
        bodies = [call["request"] for call in answered(tmp_path / "out")]
    assert len({json.dumps(body) for body in bodies}) == 5
    assert sorted(row["id"] for row in kept(tmp_path / "out"))[:3] == ["0/0", "0/1", "0/2"]


# Conversations -------------------------------------------------------------------------------------------------


def test_conversations_have_turns_that_follow_from_each_other(tmp_path: Path) -> None:
    def answer(prompt: str) -> str:
        if "same user says next" in prompt:
            return f"User: And what of {prompt.split('Assistant: ')[-1].split()[0]}?"
        return said(prompt)

    with Closed(answer=answer) as server:
        path = recipe(
            tmp_path, server, kind="conversation", prompts=str(prompts(tmp_path, 8)), turns=3, system="Be brief."
        )
        made(path, tmp_path / "out")
        assert len(server.calls) == 8 * 5
        sent = [call["request"]["messages"] for call in answered(tmp_path / "out")]
    rows = kept(tmp_path / "out")
    assert len(rows) == 8
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["system", *["user", "assistant"] * 3]
        assert len(row["keys"]) == 5
        first, second = row["messages"][2]["content"], row["messages"][3]["content"]
        assert second == f"And what of {first.split()[0]}?"
        assert row["messages"][:6] in sent, "the last answer was given to all that was said before"


# Batches -------------------------------------------------------------------------------------------------------

HALF = {"closed": {"input": 4.0, "output": 10.0}}


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_batches_give_the_same_for_half_the_price(tmp_path: Path, rate: float) -> None:
    given = str(prompts(tmp_path, 60))
    budget = {"max_cost": 5, "prices": HALF}
    with Closed(rate=rate) as server:
        path = recipe(tmp_path, server, prompts=given, endpoint={"api": "batch", "poll": 0.01}, budget=budget)
        batch = made(path, tmp_path / "batch")
        times = Counter(call.prompt for call in server.calls)
        tokens_in, tokens_out = server.billed
        assert len(server.batches) == (1 if rate == 0 else max(times.values()))
    with Closed() as server:
        live_one = made(recipe(tmp_path, server, prompts=given, budget=budget), tmp_path / "live")
    assert (tmp_path / "batch/data/train.parquet").read_bytes() == (tmp_path / "live/data/train.parquet").read_bytes()
    if rate == 0:
        assert batch.summary["spent"]["cost"] == pytest.approx(live_one.summary["spent"]["cost"] / 2)
    assert batch.summary["spent"]["cost"] >= (4 * tokens_in + 10 * tokens_out) / 2e6 - 1e-12
    assert len(times) == 60


@pytest.mark.parametrize("moment", ["file", "batch", "waiting"])
def test_a_batch_is_found_again_and_not_paid_for_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    from tutelage.generation.batch_api import BatchClient

    class Dead(BaseException):
        """As if the process were gone."""

    with Closed() as server:
        path = recipe(tmp_path, server, prompts=str(prompts(tmp_path, 20)), endpoint={"api": "batch", "poll": 0.01})
        with monkeypatch.context() as patch:
            if moment == "file":  # it is up, and the batch is not begun
                patch.setattr(BatchClient, "_start", _raises(Dead))
            elif moment == "batch":  # it is begun, and nobody noted its name
                real = BatchClient._start

                async def start(self: Any, file: str) -> str:
                    await real(self, file)
                    raise Dead

                patch.setattr(BatchClient, "_start", start)
            else:
                patch.setattr(BatchClient, "_wait", _raises(Dead))
            with pytest.raises(Dead):
                made(path, tmp_path / "out")
        found = made(path, tmp_path / "out")
        assert found.summary["kept"] == 20
        assert len(server.batches) == 1
        assert len(server.calls) == 20
        assert found.summary["spent"]["requests"] == 20


def _raises(error: type[BaseException]) -> Any:
    async def never(*_: Any) -> None:
        raise error

    return never


def test_a_person_may_leave_a_batch_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tutelage.generation import request_loop

    @contextmanager
    def asked_to_stop(*_: Any) -> Iterator[Callable[[], bool]]:
        yield lambda: bool(server.batches)

    with Closed() as server:
        path = recipe(tmp_path, server, prompts=str(prompts(tmp_path, 10)), endpoint={"api": "batch", "poll": 0.01})
        with monkeypatch.context() as patch:
            patch.setattr(request_loop, "catch_interrupts", asked_to_stop)
            with pytest.raises(Interrupted):
                made(path, tmp_path / "out")
        assert made(path, tmp_path / "out").summary["kept"] == 10
        assert len(server.batches) == 1


def test_a_batch_stays_within_the_budget(tmp_path: Path) -> None:
    with Closed() as server:
        path = recipe(
            tmp_path, server, prompts=str(prompts(tmp_path, 60)), endpoint={"api": "batch", "poll": 0.01},
            budget={"max_requests": 25},
        )  # fmt: skip
        with pytest.raises(BudgetSpent):
            made(path, tmp_path / "out")
        assert len(server.calls) == 25
