"""A closed teacher that fails in every way: nothing paid for is lost or paid for twice, no limit is passed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from support import python
from support.closed_teacher import FAULTS, Closed
from support.generations import (
    answered,
    calls_made,
    command,
    in_flight,
    journal,
    kept,
    killed,
    made,
    prompts,
    recipe,
    rejected,
)
from tutelage.config import EndpointConfig
from tutelage.errors import BudgetSpent, EndpointError
from tutelage.generation import client
from tutelage.generation.client import RateLimit
from tutelage.generation.requests import FatalResponse, parse_response


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.1)


def asked_of(out: Path) -> list[str]:
    """Every prompt of the output, kept or set aside."""
    return [row["messages"][0]["content"] for row in [*kept(out), *rejected(out)]]


# Faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_with_every_fault_each_prompt_is_once_in_the_output(tmp_path: Path, count: int) -> None:
    given = prompts(tmp_path, count)
    with Closed(rate=0.3, slow=0.6) as server:
        limit = round(1.7 * count)
        found = made(
            recipe(
                tmp_path, server, prompts=str(given), endpoint={"concurrency": 32}, budget={"max_requests": limit}
            ),
            tmp_path / "out",
        )
        calls = len(server.calls)
        kinds = Counter(call.kind for call in server.calls)
        answered = {call.prompt for call in server.calls if call.kind == "good"}
    assert set(kinds) == {"good", *FAULTS}
    wanted = [json.loads(line)["prompt"] for line in given.read_text().splitlines()]
    assert sorted(asked_of(tmp_path / "out")) == sorted(wanted)
    assert {row["messages"][0]["content"] for row in kept(tmp_path / "out")} == answered
    assert {row["reason"] for row in rejected(tmp_path / "out")} <= {"content filter"}
    assert calls == found.summary["calls"] <= limit
    assert calls <= 1.6 * found.summary["kept"]


@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"content filter"}))
def test_a_request_that_never_succeeds_is_set_aside_and_asked_for_again_by_the_next_run(
    tmp_path: Path, fault: str
) -> None:
    given = prompts(tmp_path, 1)
    with Closed(rate=1.0, faults=[fault], slow=0.6, after="0") as server:
        path = recipe(tmp_path, server, prompts=str(given), endpoint={"attempts": 3})
        made(path, tmp_path / "out")
        assert len(server.calls) == 3
        (one,) = rejected(tmp_path / "out")
        assert one["reason"] != "content filter"
        server.rate = 0.0
        again = made(path, tmp_path / "out")
    # a reply that came whole and is no answer is the model's last word; all else may pass
    assert again.summary["kept"] == (0 if fault == "no choices" else 1)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_retry_can_mend_costs_one_call(tmp_path: Path, status: int) -> None:
    with Closed(status=status) as server:
        with pytest.raises(EndpointError, match=server.url):
            made(recipe(tmp_path, server, prompts=str(prompts(tmp_path, 40))), tmp_path / "out")
        assert len(server.calls) == 1


def test_a_server_that_is_not_there_is_given_up(tmp_path: Path) -> None:
    with Closed() as server:
        path = recipe(tmp_path, server, prompts=str(prompts(tmp_path, 3)))
    with pytest.raises(EndpointError, match="cannot be reached"):
        made(path, tmp_path / "out")


def test_a_server_that_comes_back_loses_nothing(tmp_path: Path) -> None:
    given = prompts(tmp_path, 60)
    with Closed(status=503) as server:
        server._loop.call_soon_threadsafe(lambda: server._loop.call_later(0.4, setattr, server, "status", None))
        path = recipe(tmp_path, server, prompts=str(given), endpoint={"max_retry_time": 60, "attempts": 2})
        assert made(path, tmp_path / "out").summary["kept"] == 60


# Limits --------------------------------------------------------------------------------------------------------

PRICES = {"closed": {"input": 3.0, "output": 15.0}}


def cost(server: Closed) -> float:
    """What the server's own books say."""
    tokens_in, tokens_out = server.billed
    return (3.0 * tokens_in + 15.0 * tokens_out) / 1e6


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_max_cost_is_never_passed_with_64_in_flight(tmp_path: Path, rate: float) -> None:
    most = 0.05
    with Closed(rate=rate, slow=0.6, delay=0.02) as server:
        path = recipe(
            tmp_path, server, prompts=str(prompts(tmp_path, 400)), sampling={"max_tokens": 40},
            endpoint={"concurrency": 64}, budget={"max_cost": most, "prices": PRICES},
        )  # fmt: skip
        with pytest.raises(BudgetSpent, match=r"budget\.max_cost is 0\.05"):
            made(path, tmp_path / "out")
        flying = max(call.flying for call in server.calls)
        spent = cost(server)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert flying >= 30
    assert spent <= most
    assert spent <= summary["spent"]["cost"] + 1e-12 <= most + 1e-12
    if rate == 0.0:  # what failed counts with all that it could have cost
        assert spent == pytest.approx(summary["spent"]["cost"])
        assert spent > 0.9 * most


@pytest.mark.parametrize(("key", "limit"), [("max_requests", 50), ("max_tokens", 4000)])
def test_other_limits_hold_over_all_runs_of_a_journal(tmp_path: Path, key: str, limit: int) -> None:
    with Closed() as server:
        path = recipe(
            tmp_path, server, prompts=str(prompts(tmp_path, 120)), budget={key: limit}, sampling={"max_tokens": 40}
        )
        for _ in range(2):
            with pytest.raises(BudgetSpent, match=key):
                made(path, tmp_path / "out")
        assert len(server.calls) <= 50 if key == "max_requests" else sum(server.billed) <= limit
        first = len(server.calls)
        assert len(kept(tmp_path / "out")) == first
        assert made(path, tmp_path / "out", f"generate.budget.{key}=null").summary["kept"] == 120
        assert len(server.calls) == 120


class _Virtual(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to whatever comes next."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


@pytest.mark.parametrize("limits", [{"requests_per_minute": 100}, {"tokens_per_minute": 20_000}])
def test_no_minute_has_more_than_its_limit(limits: dict[str, int]) -> None:
    dice = random.Random(0)
    sent: list[tuple[float, int]] = []

    async def send(minute: RateLimit) -> None:
        for _ in range(600):
            tokens = dice.randint(10, 900)
            while not minute.has_room(tokens):
                await asyncio.sleep(0.01)
            await minute.take(tokens)
            sent.append((asyncio.get_running_loop().time(), tokens))

    loop = _Virtual()
    loop.run_until_complete(send(RateLimit(EndpointConfig(url="http://x/v1", model="m", **limits))))
    loop.close()
    ((key, most),) = limits.items()
    for i, (start, _) in enumerate(sent):
        within = [tokens for when, tokens in sent[i:] if when < start + 60]
        assert (len(within) if key == "requests_per_minute" else sum(within)) <= most
    if key == "requests_per_minute":  # and the limit is made use of
        assert len(sent) / sent[-1][0] * 60 > 0.9 * most


def test_retry_after_is_honoured(tmp_path: Path) -> None:
    with Closed(rate=1.0, faults=["429"], after="0.4") as server:
        server._loop.call_soon_threadsafe(lambda: server._loop.call_later(0.2, setattr, server, "rate", 0.0))
        made(recipe(tmp_path, server, prompts=str(prompts(tmp_path, 1))), tmp_path / "out")
        first, second = server.times
    assert second - first >= 0.4


def test_fewer_are_in_flight_where_the_server_has_room_for_fewer(tmp_path: Path) -> None:
    with Closed(room=6, delay=0.02) as server:
        path = recipe(tmp_path, server, prompts=str(prompts(tmp_path, 300)), endpoint={"concurrency": 64})
        assert made(path, tmp_path / "out").summary["kept"] == 300
        refused = sum(call.kind == "429" for call in server.calls)
        late = max(call.flying for call in server.calls[len(server.calls) // 2 :])
    assert late < 32
    assert refused < 300


# The journal -----------------------------------------------------------------------------------------------------


def test_a_second_run_and_another_filter_pay_for_nothing(tmp_path: Path) -> None:
    with Closed() as server:
        path = recipe(tmp_path, server, prompts=str(prompts(tmp_path, 40)))
        made(path, tmp_path / "out")
        before = (tmp_path / "out" / "data" / "train.parquet").read_bytes()
        again = made(path, tmp_path / "out")
        assert (tmp_path / "out" / "data" / "train.parquet").read_bytes() == before
        fewer = made(path, tmp_path / "out", "generate.quality.answer_words=[20,40]")
        assert len(server.calls) == 40
    assert again.summary["calls"] == fewer.summary["calls"] == 0
    assert 0 < fewer.summary["kept"] < 40
    assert fewer.summary["kept"] + len(rejected(tmp_path / "out")) == 40


def test_a_moved_folder_pays_for_nothing_and_names_no_old_place(tmp_path: Path) -> None:
    with Closed() as server:
        path = recipe(tmp_path, server, prompts=str(prompts(tmp_path, 20)))
        made(path, tmp_path / "old")
        inside = [p for p in (tmp_path / "old").rglob("*") if p.is_file()]
        assert [p for p in inside if str(tmp_path / "old").encode() in p.read_bytes()] == []
        (tmp_path / "old").rename(tmp_path / "new")
        assert made(path, tmp_path / "new").summary["calls"] == 0
        assert len(server.calls) == 20


def test_only_what_is_missing_is_asked(tmp_path: Path) -> None:
    with Closed() as server:
        made(recipe(tmp_path, server, prompts=str(prompts(tmp_path, 30))), tmp_path / "out")
        more = recipe(tmp_path, server, prompts=str(prompts(tmp_path, 50, first=10)))
        assert made(more, tmp_path / "out").summary["calls"] == 30
        assert Counter(call.prompt for call in server.calls).most_common(1)[0][1] == 1
        # another way to ask is another answer
        assert made(more, tmp_path / "out", "generate.sampling.temperature=0.1").summary["calls"] == 50


def test_an_answer_counts_once_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = {"answers": 0}
    real, file = os.fdatasync, tmp_path / "out" / "journal.sqlite"

    def slow(handle: int) -> None:
        assert Path(os.readlink(f"/proc/self/fd/{handle}")).name == "journal.sqlite-wal"
        copy = tmp_path / "copy"  # what is in the file by now, and so on disk once it is synced
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for name in (file, file.with_name(f"{file.name}-wal")):
            shutil.copy(name, copy / name.name)
        time.sleep(0.02)
        real(handle)
        synced["answers"] = len(answered(copy))

    from tutelage.generation.scheduler import Scheduler

    counted = Scheduler._count_done

    def done(self: Scheduler) -> None:
        counted(self)
        assert self.counts.done <= synced["answers"]

    monkeypatch.setattr(os, "fdatasync", slow)
    monkeypatch.setattr(Scheduler, "_count_done", done)
    with Closed() as server:
        made(recipe(tmp_path, server, prompts=str(prompts(tmp_path, 60))), tmp_path / "out")
    assert synced["answers"] == 60


@pytest.mark.parametrize(("count", "kills"), [(160, 4), pytest.param(2000, 50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_no_paid_answer_is_lost_or_asked_twice(
    tmp_path: Path, count: int, kills: int
) -> None:
    given = prompts(tmp_path, count)
    out = tmp_path / "out"
    with Closed(delay=0.05) as server:
        path = recipe(tmp_path, server, prompts=str(given), endpoint={"concurrency": 8, "timeout": 5})
        lost, done = killed(path, out, server, kills)
        finished = python.run(command(path, out))
        assert finished.returncode == 0, finished.stderr
        calls = Counter(call.prompt for call in server.calls)
    assert done < kills / 4, "most processes are to be killed at work"
    assert len(calls) == count
    for prompt, times in calls.items():
        assert times <= 1 + lost[prompt], "only what was in flight may be asked again"
    with Closed() as server:
        whole = recipe(tmp_path, server, prompts=str(given))
        made(whole, tmp_path / "whole")
    for name in ("data/train.parquet", "rejected.jsonl", "README.md"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_waits_for_what_is_in_flight_and_says_how_to_go_on(tmp_path: Path) -> None:
    with Closed(delay=0.3) as server:
        path = recipe(tmp_path, server, prompts=str(prompts(tmp_path, 200)), endpoint={"timeout": 5})
        process = python.Popen(command(path, tmp_path / "out"), stderr=python.PIPE)
        calls_made(server, 5, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "every answer is in the journal" in said
        assert f"tutelage generate {path} --out {tmp_path / 'out'}" in said
        assert "Traceback" not in said
        asked = [call.prompt for call in server.calls]
        assert not list(in_flight(journal(tmp_path / "out")))
        answers = answered(tmp_path / "out")
        assert sorted(asked) == sorted(call["request"]["messages"][-1]["content"] for call in answers)
        assert len(asked) < 200
        done = made(path, tmp_path / "out")
        assert done.summary["kept"] == 200
        assert len(server.calls) == 200


def test_progress_says_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tutelage.generation import request_loop

    monkeypatch.setattr(request_loop, "LINE_INTERVAL", 0.05)
    with Closed(rate=0.2, faults=["500"], delay=0.05) as server:
        path = recipe(
            tmp_path, server, prompts=str(prompts(tmp_path, 60)), endpoint={"concurrency": 4},
            budget={"max_cost": 5, "prices": PRICES},
        )  # fmt: skip
        import io

        from rich.console import Console

        from tutelage.generation import generate
        from tutelage.progress import Terminal

        heard = io.StringIO()
        generate(path, out=tmp_path / "out", terminal=Terminal(Console(file=heard, width=200)))
    lines = heard.getvalue().splitlines()
    for words in ("/60", "in flight", "calls failed", "tokens", "spent"):
        assert any(words in line for line in lines), words


@pytest.mark.parametrize(
    ("status", "said", "what"),
    [
        (
            404,
            {"error": {"message": "The model `x` does not exist", "code": "model_not_found"}},
            "does not have the model",
        ),
        (400, {"detail": "Server is pinned to 'y'; requested 'x'."}, "does not have the model"),
        (404, {"detail": "Not Found"}, "no such address"),
        (429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, "no credit"),
        (301, {}, "redirects"),
    ],
)
def test_what_servers_say_of_the_end_is_understood(status: int, said: dict[str, object], what: str) -> None:
    verdict = parse_response(status, {}, json.dumps(said).encode())
    assert isinstance(verdict, FatalResponse)
    assert what in verdict.what
