"""A run directory that exists, is damaged or is full: one message with the remedy, nothing overwritten."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import bad_input_files as broken
from support.bad_input import call, check_message, cut


def unfinish(place: Path) -> Path:
    """Make the run in ``out`` one that stopped before its last training ended; its checkpoint."""
    for gone in ("models/distilled-seed0", "student"):
        shutil.rmtree(place / "out" / gone)
    (place / "out" / "summary.json").unlink()
    return place / "out" / "checkpoints" / "distilled-seed0" / "step-000000002"


RESUME = ["--out", "out", "--resume"]


@pytest.mark.parametrize(
    ("args", "breakage", "says"),
    [
        pytest.param(["--out", "out"], None, ["out", "holds a run already", "--resume", "another --out"], id="taken"),
        pytest.param([*RESUME, "train.steps=3"], None,
                     ["out", "other settings: train.steps (then 2, now 3)", "same recipe and overrides"], id="steps"),
        pytest.param([*RESUME, "method.temperature=3", "train.clip=1"], None,
                     ["method.temperature (then 2.0, now 3.0)", "train.clip (then not set, now 1.0)"], id="two-keys"),
        pytest.param(RESUME, lambda place: cut(place / "out/config.yaml"), ["out/config.yaml", "cannot be read"],
                     id="config-cut"),
        pytest.param(RESUME, lambda place: (place / "out/config.yaml").write_bytes(b"\xff\x00"),
                     ["out/config.yaml", "cannot be read", "another --out"], id="config-binary"),
        pytest.param(RESUME, lambda place: (place / "out/config.yaml").write_text("- a"),
                     ["out/config.yaml", "no settings", "another --out"], id="config-is-a-list"),
        pytest.param(RESUME, lambda place: cut(place / "out/summary.json"),
                     ["out/summary.json", "is damaged", "delete this file"], id="summary-cut"),
        pytest.param(RESUME, lambda place: cut(unfinish(place) / "tensors.safetensors"),
                     ["step-000000002", "is damaged", "delete this folder"], id="checkpoint-cut"),
        pytest.param(RESUME, lambda place: cut(unfinish(place) / "state.json"),
                     ["step-000000002", "is damaged", "delete this folder"], id="state-cut"),
        pytest.param(RESUME, lambda place: (unfinish(place) / "state.json").write_text("[]"),
                     ["step-000000002", "is damaged", "delete this folder"], id="state-is-a-list"),
        pytest.param(RESUME, lambda place: (unfinish(place) / "tensors.safetensors").unlink(),
                     ["step-000000002", "is damaged", "delete this folder"], id="checkpoint-gone"),
        pytest.param(RESUME, lambda place: (unfinish(place), cut(place / "out/models/baseline-seed0/result.json")),
                     ["baseline-seed0/result.json", "is damaged", "--resume then trains"], id="result-cut"),
    ],
)  # fmt: skip
def test_a_run_that_is_there_is_not_touched(
    ran: Path,
    args: list[str],
    breakage: Callable[[Path], Any] | None,
    says: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if breakage is not None:
        breakage(ran)
    before = broken.snapshot(ran)
    assert call(["run", "recipe.yaml", *args]) == 2
    check_message(capsys.readouterr().err, says)
    assert broken.snapshot(ran) == before


def test_two_writers(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinish(ran)
    before = broken.snapshot(ran)
    with open(ran / "out" / "run.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call(["run", "recipe.yaml", *RESUME]) == 2
    check_message(capsys.readouterr().err, ["out", "another process is writing", "wait for it"])
    assert broken.snapshot(ran) == before


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_for_tensors(*args: Any, **kwargs: Any) -> Any:
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("target", "failure"),
    [
        ("tutelage.engine.checkpoint.save_file", no_space_for_tensors),
        ("tutelage.engine.checkpoint.save_file", no_space),
        ("tutelage.models.files.save_shared", no_space_for_tensors),
        ("tutelage.files.os.fsync", no_space),
        ("tutelage.files.os.replace", no_space),
        ("tutelage.files.tempfile.mkdtemp", no_space),
    ],
)
def test_full_disk(
    ran: Path, target: str, failure: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinish(ran)
    shutil.rmtree(ran / "out" / "checkpoints" / "distilled-seed0")
    before = broken.snapshot(ran)
    with monkeypatch.context() as m:
        m.setattr(target, failure)
        assert call(["run", "recipe.yaml", *RESUME]) == 2
    check_message(
        capsys.readouterr().err, ["out", "the disk is full", "free some space, then continue with --resume"]
    )
    after = broken.snapshot(ran)
    assert not (ran / "out" / "student").exists()
    assert not (ran / "out" / "models" / "distilled-seed0").exists()
    assert {k: v for k, v in after.items() if k in before and "metrics" not in k} == {
        k: v for k, v in before.items() if "metrics" not in k
    }
    assert call(["run", "recipe.yaml", *RESUME]) == 0, "once there is space, it goes on"
    assert (ran / "out" / "student" / "model.safetensors").exists()
    assert not list((ran / "out").rglob(".*")), "no draft is left behind"


def test_a_small_full_disk(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = ran / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        code = call(["run", "recipe.yaml", "--out", "disk/out", "student.options={hidden: [64]}"])
        check_message(capsys.readouterr().err, ["disk/out", "the disk is full", "--resume"])
        assert code == 2
        assert not (disk / "out" / "student").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
