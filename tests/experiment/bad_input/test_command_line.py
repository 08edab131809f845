"""Wrong commands, and commands in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import bad_input_files as broken
from support import python
from support.bad_input import call, check_message, cut


@pytest.mark.parametrize(
    ("breakage", "args", "says"),
    [
        (lambda place: None, ["nowhere"], ["nowhere", "no such run directory", "check the path"]),
        (lambda place: None, ["teacher"], ["teacher", "is not a run directory", "tutelage run"]),
        (lambda place: (place / "out/summary.json").unlink(), ["out"], ["out", "not finished", "--resume"]),
        (lambda place: (place / "out/summary.json").rename(place / "out/lab.json"), ["out"], ["a lab", "lab.html"]),
        (lambda place: cut(place / "out/summary.json"), ["out"], ["summary.json", "is not JSON", "--resume"]),
        (lambda place: (place / "out/metrics.jsonl").write_text("{}\n{}\n"), ["out"],
         ["metrics.jsonl, line 1", "remove the line"]),
        (lambda place: None, ["out", "--out", "recipe.yaml/page.html"],
         ["recipe.yaml/page.html", "cannot be written", "another --out"]),
        (lambda place: None, ["out", "--out", "teacher"], ["teacher"]),
    ],
    ids=["missing", "no-run", "unfinished", "lab", "summary-cut", "metrics", "out-below-a-file", "out-is-a-folder"],
)  # fmt: skip
def test_report(
    ran: Path,
    breakage: Callable[[Path], Any],
    args: list[str],
    says: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    breakage(ran)
    before = broken.snapshot(ran)
    assert call(["report", *args]) == 2
    check_message(capsys.readouterr().err, says)
    assert broken.snapshot(ran) == before


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["rn", "recipe.yaml"], "rn"),
        (["run"], "RECIPE"),
        (["run", "recipe.yaml", "--steps", "3"], "--steps"),
        (["run", "recipe.yaml", "--out"], "--out"),
        (["report"], "RUN"),
    ],
)
def test_the_command_line_itself(place: Path, args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = broken.snapshot(place)
    assert call(args) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert broken.snapshot(place) == before


def fresh_python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("change", "fresh", "says"),
    [
        (("steps: 2", "step: 2"), True, ["recipe.yaml:11", "'train.step'", "did you mean 'steps'"]),
        (("checkpoint: teacher", "checkpoint: w.pt"), True, ["w.pt", "would run code"]),
        (("source: digits\n  limit: 200", "source: imagefolder\n  path: pics"), False, ["pics", "no such folder"]),
    ],
    ids=["typo", "code-in-weights", "no-images"],
)
def test_as_a_command(place: Path, change: tuple[str, str], fresh: bool, says: list[str]) -> None:
    (place / "recipe.yaml").write_text(broken.RECIPE.replace(*change))
    broken.pickled_with_code(place / "w.pt")
    before = broken.snapshot(place)
    command = ["-m", "tutelage", "run", "recipe.yaml", "--out", "out"]
    done = fresh_python(*command) if fresh else python.run(command)
    check_message(done.stderr, says)
    assert (done.returncode, done.stdout) == (2, "")
    assert broken.snapshot(place) == before


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["run", "recipe.yaml", "train.step=2"], ["run", "recipe.yaml", "data=digts"]]
)
def test_an_answer_needs_no_torch(place: Path, args: list[str]) -> None:
    code = f"""
import sys
from tutelage.cli import main
try:
    main({args!r})
except SystemExit as stop:
    code = stop.code or 0
heavy = [m for m in ("torch", "numpy", "accelerate", "sklearn", "plotly", "transformers") if m in sys.modules]
print("code", code, "heavy", heavy)
"""
    expected = 0 if args[0].startswith("--") else 2
    assert fresh_python("-c", code).stdout.splitlines()[-1] == f"code {expected} heavy []"
