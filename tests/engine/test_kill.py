"""SIGKILL at any moment, checkpoints half-written included, and --resume: the same bits."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from support import python

RECIPE = """
data: {source: digits, labels: 300, augment: [{shift: 1}]}
teacher: {model: mlp, options: {hidden: [48]}, train: {steps: 60}}
student: {model: convnet, options: {widths: [4, 8], depth: 1}}
method: logit
train: {steps: 60, batch_size: 48, accumulate: 2, checkpoint_every: 5, log_every: 7, ema: 0.95, clip: 1.0}
seeds: [0, 1]
"""


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return ["-m", "tutelage", "run", str(recipe), "--out", str(out), *more]


def finish(recipe: Path, out: Path, *more: str) -> str:
    done = python.run(command(recipe, out, *more))
    assert done.returncode == 0, done.stderr
    return hashlib.sha256((out / "student" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    folder = tmp_path_factory.mktemp("whole")
    recipe = folder / "kill.yaml"
    recipe.write_text(RECIPE)
    start = time.monotonic()
    return recipe, finish(recipe, folder / "run"), time.monotonic() - start


def kill_and_resume(whole: tuple[Path, str, float], out: Path, delay: float) -> None:
    recipe, expected, _ = whole
    process = python.Popen(command(recipe, out), stdout=python.DEVNULL, stderr=python.DEVNULL)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    more = ["--resume"] if (out / "config.yaml").exists() else []
    assert finish(recipe, out, *more) == expected
    assert not list(out.rglob(".*")), "a killed writer's drafts are swept away"


def moments(count: int, seconds: float) -> list[float]:
    """Random moments of the whole run, its start-up included, drawn with a fixed seed."""
    draw = random.Random(0)
    return [draw.uniform(0.3, 0.98) * seconds for _ in range(count)]


@pytest.mark.parametrize("i", range(2))
def test_killed_and_resumed_gives_the_same_student(whole: tuple[Path, str, float], tmp_path: Path, i: int) -> None:
    kill_and_resume(whole, tmp_path / "run", moments(2, whole[2])[i])


@pytest.mark.slow
@pytest.mark.parametrize("i", range(20))
def test_killed_at_twenty_moments(whole: tuple[Path, str, float], tmp_path: Path, i: int) -> None:
    kill_and_resume(whole, tmp_path / "run", moments(20, whole[2])[i])


def test_killed_inside_a_checkpoint(tmp_path: Path) -> None:
    """A process that dies with a draft on disk leaves the checkpoint before it as the newest."""
    from tutelage.engine import checkpoint
    from tutelage.engine.run_directory import RunDirectory

    run = RunDirectory(tmp_path)
    folder = run.checkpoints("t")
    checkpoint.save_checkpoint(folder / "step-000000005", {"a": 1})

    child = os.fork()
    if child == 0:
        checkpoint.save_file = lambda tensors, path: (Path(path).write_bytes(b"half"), os._exit(9))  # type: ignore[assignment]
        checkpoint.save_checkpoint(folder / "step-000000010", {"a": 2})
    os.waitpid(child, 0)
    assert any(p.name.startswith(".") for p in folder.iterdir())
    newest = checkpoint.newest(folder)
    assert newest is not None
    assert checkpoint.load_checkpoint(newest) == {"a": 1}
    run.sweep()
    assert [p.name for p in folder.iterdir()] == ["step-000000005"]


def test_sigterm_saves_and_says_how_to_go_on(whole: tuple[Path, str, float], tmp_path: Path) -> None:
    recipe, expected, _ = whole
    out = tmp_path / "run"
    process = python.Popen(command(recipe, out), stderr=python.PIPE)
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/*/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "the state is saved" in stderr
    assert f"tutelage run {recipe} --out {out} --resume" in stderr
    assert "Traceback" not in stderr
    assert finish(recipe, out, "--resume") == expected
