"""Broken inputs of a command, and the check that it refuses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from support import bad_input_files as broken
from tutelage.cli import main

Setup = Callable[[Path, pytest.MonkeyPatch], Any]


@dataclass
class Case:
    """A broken input of ``tutelage run``.

    ``change`` replaces parts of the small recipe, or is the whole text of another; ``says`` is what the
    message must hold: what was given, where, and the remedy.
    """

    name: str
    says: list[str]
    change: dict[str, str] | str | bytes = field(default_factory=dict)
    setup: Setup | None = None
    args: list[str] = field(default_factory=list)
    command: str = "run"
    recipe: str = "recipe.yaml"


def call(args: list[str]) -> int:
    """The command's exit code."""
    try:
        main(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def check_message(err: str, says: list[str]) -> None:
    assert "Traceback" not in err
    assert "Warning" not in err
    start = err.find("tutelage: ")
    assert start >= 0, err
    message = err[start:]
    assert "\n  -> " in message, f"no remedy in:\n{message}"
    missing = [part for part in says if part not in message]
    assert not missing, f"{missing} not in:\n{message}"
    assert len(message) < 1500, message


def weights(make: Callable[[Path], None], name: str) -> Setup:
    return lambda place, _: make(place / name)


def folder(*splits: tuple[str, dict[str, int]], then: Callable[[Path], Any] = lambda place: None) -> Setup:
    def make(place: Path, _: pytest.MonkeyPatch) -> None:
        pytest.importorskip("PIL")
        (place / "pics").mkdir()
        for split, classes in splits:
            broken.images(place / "pics", classes, split)
        then(place / "pics")

    return make


def check_refused(
    case: Case, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints one message, ends with exit code 2 and writes nothing."""
    prepare(case, place, monkeypatch)
    before = broken.snapshot(place)
    args = [case.command, case.recipe, *case.args]
    code = call(args if "--out" in args or case.command != "run" else [*args, "--out", "out"])
    captured = capsys.readouterr()
    check_message(captured.err, case.says)
    assert code == 2
    assert captured.out == ""
    monkeypatch.undo()
    assert broken.snapshot(place) == before, "something was written, overwritten or removed"


def prepare(case: Case, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(case.change, dict):
        text = broken.RECIPE
        for old, new in case.change.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (place / "recipe.yaml").write_text(text)
    else:
        text_or_bytes = case.change
        (place / "recipe.yaml").write_bytes(
            text_or_bytes if isinstance(text_or_bytes, bytes) else text_or_bytes.encode()
        )
    if case.setup is not None:
        case.setup(place, monkeypatch)


def cut(path: Path, keep: int = 40) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def small(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 4), nn.Linear(4, classes))
