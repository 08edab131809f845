"""Broken recipes, files, keys and folders of `tutelage generate`: one message each, and no key anywhere."""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import python
from support.closed_teacher import FAULTS, Closed
from support.generations import answered, made, prompts, recipe
from tutelage import errors
from tutelage.cli import main
from tutelage.errors import JournalError, TutelageError
from tutelage.generation import client
from tutelage.generation.journal import Journal

CANARY = "sk-canary-4f1d0b7c9e"


def call(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code of the command line, and what it said."""
    try:
        main(words)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    heard = capsys.readouterr()
    return code, " ".join((heard.out + heard.err).split())


Break = Callable[[Path, Path], None]


def rewritten(old: str, new: str) -> Break:
    def change(path: Path, out: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def file(name: str, text: str) -> Break:
    def change(path: Path, out: Path) -> None:
        (path.parent / name).write_text(text)
        path.write_text(path.read_text() + f"  prompts: {path.parent / name}\n")

    return change


def added(text: str) -> Break:
    def change(path: Path, out: Path) -> None:
        path.write_text(path.read_text() + text)

    return change


def other_journal(path: Path, out: Path) -> None:
    out.mkdir()
    Journal(out / "journal.sqlite", {"kind": "answer", "model": "closed", "recipe": "other"}).close()


def damaged(path: Path, out: Path) -> None:
    path.write_text(path.read_text().replace("PROMPTS", str(prompts(path.parent, 5))))
    made(path, out)
    content = bytearray((out / "journal.sqlite").read_bytes())
    content[3 * 4096 : 3 * 4096 + 40] = bytes(40)  # the head of a page
    (out / "journal.sqlite").write_bytes(content)


def no_journal(path: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("precious")


PLAIN = "  prompts: PROMPTS\n"

CASES: dict[str, tuple[Break, list[str]]] = {
    "unknown placeholder": (
        added(PLAIN + "  user: 'Answer: {{ promt }}'\n"),
        ["closed.yaml:", "generate.user", "'promt'", "did you mean 'prompt'", "the template can use: prompt"],
    ),
    "unknown placeholder in a later line": (
        added(PLAIN + "  user: |\n    Answer this.\n    {{ question }}\n"), ["closed.yaml:13", "'question'"],
    ),
    "no template": (added(PLAIN + "  user: 'Answer: {{ prompt'\n"), ["is not a Jinja template"]),
    "a column is missing in one row": (
        file("some.jsonl", '{"prompt": "a b c", "topic": "x"}\n{"prompt": "d e f"}\n'), [],
    ),
    "empty prompts": (file("none.jsonl", "\n"), ["none.jsonl", "holds no prompts"]),
    "prompts that are no JSON": (file("bad.jsonl", '{"prompt": "a"}\n{oops\n'), ["bad.jsonl:2", "not a JSON object"]),
    "prompts of an unknown kind": (file("p.docx", "x"), ["p.docx", ".parquet"]),
    "no prompts": (added("  prompts: nowhere.jsonl\n"), ["nowhere.jsonl", "cannot be read"]),
    "two of one id": (file("twice.csv", "id,prompt\n1,a b c\n1,d e f\n"), ["twice.csv", "id '1'"]),
    "empty seeds": (
        lambda path, out: (
            (path.parent / "seeds.jsonl").write_text(""),
            path.write_text(path.read_text().replace("kind: answer", "kind: self-instruct")
                            + f"  seeds: {path.parent / 'seeds.jsonl'}\n"),
        )[0] and None,
        ["seeds.jsonl", "holds no tasks"],
    ),
    "model not served": (
        lambda path, out: path.write_text(path.read_text().replace("model: closed", "model: clothed")
                                          + PLAIN) and None,
        ["clothed", "does not have the model", "it serves: closed", "endpoint.model"],
    ),
    "no such page": (
        lambda path, out: path.write_text(path.read_text().replace("/v1", "/v2") + PLAIN) and None,
        ["/v2", "the server has no such address", "endpoint.url"],
    ),
    "a key in the recipe": (
        added(PLAIN + f"  api_key: {CANARY}\n"), ["unknown key", "not shown"],
    ),
    "a key in place of its variable's name": (
        lambda path, out: path.write_text(
            path.read_text().replace("model: closed", f"model: closed\n    key_env: {CANARY}") + PLAIN
        ) and None,
        ["generate.endpoint.key_env is no name of an environment variable"],
    ),
    "a variable that is not set": (
        lambda path, out: path.write_text(
            path.read_text().replace("model: closed", "model: closed\n    key_env: NOT_SET") + PLAIN
        ) and None,
        ["NOT_SET", "is not set", "export NOT_SET="],
    ),
    "no price": (added(PLAIN + "  budget: {max_cost: 1}\n"), ["budget.prices", "closed"]),
    "no regular expression": (added(PLAIN + "  best: {by: consistency, extract: '('}\n  samples: 2\n"), ["extract"]),
    "one sample": (added(PLAIN + "  best: {by: judge}\n"), ["samples"]),
    "journal of another recipe": (
        lambda path, out: (added(PLAIN)(path, out), other_journal(path, out))[0], ["then other, now closed", "--out"],
    ),
    "damaged journal": (
        lambda path, out: (added(PLAIN)(path, out), damaged(path, out))[0], ["is damaged", "restore the file"],
    ),
    "a folder of something else": (
        lambda path, out: (added(PLAIN)(path, out), no_journal(path, out))[0], ["no journal.sqlite"],
    ),
    "a file": (
        lambda path, out: (added(PLAIN)(path, out), out.write_text("x"))[0], ["is a file"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_message(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, says = CASES[name]
    out = tmp_path / "out"
    with Closed() as server:
        path = recipe(tmp_path, server)
        change(path, out)
        path.write_text(path.read_text().replace("PROMPTS", str(prompts(tmp_path, 5))))
        before = len(server.calls)
        code, heard = call(["generate", str(path), "--out", str(out)], capsys)
        if not says:
            assert code == 0
            return
        assert code == 2
        assert len(server.calls) == before
    for words in says:
        assert words in heard, heard
    assert "Traceback" not in heard
    assert CANARY not in heard
    if name == "a folder of something else":
        assert os.listdir(out) == ["thesis.tex"]


def test_two_writers(tmp_path: Path) -> None:
    with Closed(delay=0.2) as server:
        path = recipe(tmp_path, server, prompts=str(prompts(tmp_path, 16)), endpoint={"concurrency": 2, "timeout": 5})
        first = python.Popen(["-m", "tutelage", "generate", str(path), "--out", str(tmp_path / "o")])
        while not server.calls and first.poll() is None:
            time.sleep(0.01)
        with pytest.raises(JournalError, match="another process is writing to it"):
            made(path, tmp_path / "o")
        first.kill()
        first.wait()
        assert made(path, tmp_path / "o").summary["kept"] == 16


def test_a_disk_that_refuses_is_one_message_and_nothing_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sqlite3.connect
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "journal.sqlite").touch()

    def read_only(path: Path, **options: Any) -> sqlite3.Connection:
        return real(f"file:{path}?mode=ro", uri=True, **options)

    monkeypatch.setattr(sqlite3, "connect", read_only)
    with Closed() as server:
        path = recipe(tmp_path, server, prompts=str(prompts(tmp_path, 5)))
        code, heard = call(["generate", str(path), "--out", str(tmp_path / "out")], capsys)
        assert not server.calls
    assert code == 2
    assert "read-only" in heard
    assert "--out" in heard


def test_a_disk_that_fills_up_keeps_what_it_had_and_goes_on_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sqlite3.connect

    def small(path: Path, **options: Any) -> sqlite3.Connection:
        db = real(path, **options)
        db.execute("PRAGMA max_page_count = 14")
        return db

    with Closed() as server:
        path = recipe(tmp_path, server, prompts=str(prompts(tmp_path, 60)))
        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", small)
            code, heard = call(["generate", str(path), "--out", str(tmp_path / "out")], capsys)
        assert code == 2
        assert "free some space" in heard
        first = len(server.calls)
        count = len(answered(tmp_path / "out"))
        assert 0 < count < first < 60
        assert made(path, tmp_path / "out").summary["kept"] == 60
        assert len(server.calls) == 60 + first - count


# Keys ----------------------------------------------------------------------------------------------------------


def holds_canary(folder: Path) -> list[Path]:
    """Files that hold the key, plain or as a login is sent."""
    words = [CANARY.encode(), base64.b64encode(f"me:{CANARY}".encode())]
    return [p for p in folder.rglob("*") if p.is_file() and any(word in p.read_bytes() for word in words)]


FAILURES = {
    **{fault: {"rate": 1.0, "faults": [fault], "slow": 0.3, "after": "0"} for fault in FAULTS},
    **{str(status): {"status": status} for status in (400, 401, 402, 403, 404, 422, 503)},
    "a wrong key": {"key": "another"},
    "another model": {"model": "other"},
    "none": {},
}


@pytest.mark.parametrize("way", ["variable", "login", "override"])
@pytest.mark.parametrize("failure", FAILURES)
def test_the_key_is_nowhere_after_any_failure(
    failure: str, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.0)
    monkeypatch.setenv("THE_KEY", CANARY)
    out, words = tmp_path / "out", []
    with Closed(**FAILURES[failure], echo=True) as server:  # type: ignore[arg-type]
        endpoint = {"model": "closed", "attempts": 2, "max_retry_time": 0.1, "timeout": 0.1}
        address = server.url.replace("//", f"//me:{CANARY}@")
        if way == "variable":
            endpoint["key_env"] = "THE_KEY"
        if way == "login":
            endpoint["url"] = address
        if way == "override":
            words = [f"generate.endpoint.url={address}"]
        folder = tmp_path / "recipe"
        folder.mkdir()
        path = recipe(folder, server, prompts=str(prompts(tmp_path, 3)), endpoint=endpoint)
        _, heard = call(["generate", str(path), *words, "--out", str(out)], capsys)
        shown = {call.key for call in server.calls if call.key}
    assert not shown or all(CANARY in key or key.startswith("Basic ") for key in shown)
    assert CANARY not in heard
    assert holds_canary(out) == []


@pytest.mark.parametrize("way", ["variable", "login"])
def test_the_key_is_in_no_traceback_of_a_fault_of_our_own(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", CANARY)

    def broken(*_: object) -> None:
        raise RuntimeError("a fault of our own")

    monkeypatch.setattr(client, "parse_response", broken)
    with Closed(echo=True) as server:
        address = server.url if way == "variable" else server.url.replace("//", f"//me:{CANARY}@")
        endpoint = {"url": address, **({"key_env": "THE_KEY"} if way == "variable" else {})}
        path = recipe(tmp_path, server, prompts=str(prompts(tmp_path, 3)), endpoint=endpoint)
        with pytest.raises(RuntimeError) as caught:
            made(path, tmp_path / "out")
    assert CANARY not in "".join(traceback.format_exception(caught.value))
    assert holds_canary(tmp_path / "out") == []


def test_the_command_to_go_on_with_has_no_login(tmp_path: Path) -> None:
    import signal
    import time

    with Closed(delay=0.2) as server:
        path = recipe(tmp_path, server, prompts=str(prompts(tmp_path, 100)), endpoint={"timeout": 5})
        address = server.url.replace("//", f"//me:{CANARY}@")
        words = ["-m", "tutelage", "generate", str(path), f"generate.endpoint.url={address}"]
        process = python.Popen([*words, "--out", str(tmp_path / "o")], stderr=python.PIPE)
        until = time.monotonic() + 60
        while not server.calls and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, heard = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "continue with: tutelage generate" in heard
    assert CANARY not in heard


def test_a_key_with_words_around_it_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", f"Bearer {CANARY}")
    with Closed() as server:
        path = recipe(tmp_path, server, prompts=str(prompts(tmp_path, 3)), endpoint={"key_env": "THE_KEY"})
        code, heard = call(["generate", str(path), "--out", str(tmp_path / "out")], capsys)
    assert code == 2
    assert "THE_KEY" in heard
    assert CANARY not in heard


def test_errors_of_a_generation_are_also_the_standard_librarys() -> None:
    assert issubclass(errors.EndpointError, ConnectionError)
    assert issubclass(errors.JournalError, OSError)
    assert all(issubclass(e, TutelageError) for e in (errors.EndpointError, errors.JournalError, errors.BudgetSpent))
    assert json.dumps(str(errors.EndpointError("a", where="b", remedy="c"))) == json.dumps("b: a\n  -> c")
