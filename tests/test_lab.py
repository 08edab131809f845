"""The lab: arms shared, verdicts that follow from intervals, and a lab that goes on where it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.errors import ConfigError, ModelError
from tutelage.lab import CLAIMS, arms, run_lab
from tutelage.lab.arms import ARMS, FIRST, Results, recipe_of
from tutelage.lab.bench import base_recipe
from tutelage.lab.judge import Finding, exact, gain, needed, within
from tutelage.teachers import CachedTeacher
from tutelage.teachers.cache import info
from tutelage.workflows.progress import Terminal

TINY = (
    "data.labels=300", "train.epochs=3", "teacher.train.epochs=3", "teacher.model=mlp",
    "teacher.options={hidden: [32]}", "student={model: mlp, options: {hidden: [6]}}",
)  # fmt: skip


def silent() -> Terminal:
    return Terminal(speaks=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("lab") / "lab"
    ids = ["soft-labels", "t-squared", "gradient", "dark-knowledge"]
    return out, run_lab(ids, budget="small", overrides=TINY, out=out, terminal=silent())


def test_the_lecture_s_claims_about_images_are_all_there() -> None:
    assert list(CLAIMS) == [
        "soft-labels", "temperature", "t-squared", "gradient", "dark-knowledge", "fitnets", "attention-transfer",
        "self-distillation", "capacity-gap", "assistant", "augmentation",
    ]  # fmt: skip
    assert {arm for claim in CLAIMS.values() for arm in claim.arms} == set(ARMS), "an arm that nobody reads"


def test_figures_are_those_of_the_runs(found: tuple[Path, dict[str, Any]]) -> None:
    out, lab = found
    summary = json.loads((out / "arms" / FIRST / "summary.json").read_text())
    part = lab["experiments"]["soft-labels"]["parts"][0]
    assert part["mean"] == pytest.approx(summary["gain"]["last"]["mean"])
    assert (part["low"], part["high"]) == pytest.approx(
        (summary["gain"]["last"]["low"], summary["gain"]["last"]["high"])
    )
    assert json.loads((out / "lab.json").read_text()) == json.loads(json.dumps(lab))
    page, text = (out / "lab.html").read_text(), (out / "lab.md").read_text()
    for name in lab["experiments"]:
        assert f"id='{name}'" in page
        assert f"(lab-{name}.svg)" in text
        assert (out / f"lab-{name}.svg").read_text().lstrip().startswith("<?xml")


def test_laws_hold_on_real_logits(found: tuple[Path, dict[str, Any]]) -> None:
    experiments = found[1]["experiments"]
    assert experiments["gradient"]["verdict"] == "reproduced"
    slopes = [part["mean"] for part in experiments["t-squared"]["parts"]]
    assert slopes[0] == pytest.approx(-2, abs=0.1)
    assert slopes[1] == pytest.approx(0, abs=0.1)


def test_arms_differ_from_the_base_in_what_they_say(tmp_path: Path) -> None:
    base = base_recipe("full", None, [])
    assert len(base.seeds) >= 5
    found = {name: recipe_of(base, arm, tmp_path) for name, arm in ARMS.items()}
    assert found[FIRST].required_teacher.train is not None
    others = [recipe.required_teacher for name, recipe in found.items() if name not in (FIRST, "born-again")]
    assert {teacher.checkpoint for teacher in others} == {str(tmp_path / "arms" / FIRST / "models" / "teacher")}
    assert found["T8"].method.temperature == 8  # type: ignore[union-attr]
    assert found["hint"].method.alpha == 0  # type: ignore[union-attr]
    assert found["born-again"].teacher is None
    caches = {r.teacher.cache.path for r in found.values() if r.teacher is not None and r.teacher.cache is not None}
    assert caches == {str(tmp_path / "cache" / name) for name in ("images", "views", "hint", "attention")}
    for recipe in found.values():
        assert recipe.train == base.train, "the budget is the same for all"
        assert recipe.seeds == base.seeds


def test_the_teacher_is_asked_once_for_each_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine trainings by one teacher, on images as they are and in views: rows asked for are rows kept."""
    asked: list[int] = []
    ask = CachedTeacher._ask

    def counted(self: CachedTeacher, batch: Any, ids: Any, views: Any, missing: Any) -> Any:
        asked.append(len(missing))
        return ask(self, batch, ids, views, missing)

    monkeypatch.setattr(CachedTeacher, "_ask", counted)
    monkeypatch.setattr(arms, "VIEWS", 2)
    run_lab(
        ["temperature", "augmentation"], budget="small", overrides=TINY, out=tmp_path, resume=False, terminal=silent()
    )
    rows = {name: info(tmp_path / "cache" / name)["rows"] for name in ("images", "views")}
    images = rows["images"]
    assert rows["views"] == 2 * images
    assert 200 < images <= 300
    assert sum(asked) == 3 * images


def test_verdicts_follow_from_intervals() -> None:
    assert gain("", [0.9, 0.91, 0.92], [0.88, 0.89, 0.90]).verdict == "reproduced"
    assert gain("", [0.86, 0.87, 0.88], [0.88, 0.89, 0.90]).verdict == "not reproduced"
    nearly = gain("", [0.880, 0.891, 0.901], [0.88, 0.89, 0.90])
    assert nearly.verdict == "not reproduced", "a gain that matters is excluded"
    assert gain("", [0.9, 0.8, 0.95], [0.8, 0.9, 0.9]).verdict == "inconclusive"
    assert gain("", [0.95], [0.90]).verdict == "inconclusive", "one seed shows nothing"
    open_ = [0.03, -0.01, 0.02, 0.0, 0.01]
    few = needed(open_, 0.005)
    assert few is not None
    assert gain("", open_, [0.0] * 5).would_decide == few > 5
    assert within("", [1.0, 1.01, 0.99], 0.9, 1.1).verdict == "reproduced"
    assert within("", [1.3, 1.31, 1.29], 0.9, 1.1).verdict == "not reproduced"
    assert within("", [0.5, 1.5, 1.0], 0.9, 1.1).verdict == "inconclusive"
    assert exact("", 1e-9, 1e-6).verdict == "reproduced"
    good, bad, unknown = exact("", 0, 1), exact("", 2, 1), gain("", [0.95], [0.90])
    assert Finding([good, good], []).verdict == "reproduced"
    assert Finding([good, unknown], []).verdict == "inconclusive"
    assert Finding([good, unknown, bad], []).verdict == "not reproduced"


def test_similarity_is_read_as_it_was_kept(found: tuple[Path, dict[str, Any]]) -> None:
    """Of a pair, E[p_i p_j] over the mean of the masses of both: by hand, from the stored triangle."""
    out = found[0]
    raw = json.loads((out / "arms" / FIRST / "similarity" / "teacher.json").read_text())
    many, upper = raw["classes"], raw["sim"]["4"]
    row0 = upper[:many]
    mass0 = sum(row0)
    mass1 = row0[1] + sum(upper[many : 2 * many - 1])
    mine = Results(base_recipe("small", None, TINY), out).similarity("teacher", 4)
    assert float(mine[0]) == pytest.approx(2 * row0[1] / (mass0 + mass1), rel=1e-6)
    assert mine.shape == torch.Size([many * (many - 1) // 2])


def test_a_second_visit_trains_what_is_missing_only(found: tuple[Path, dict[str, Any]]) -> None:
    out, lab = found
    before = {file: file.stat().st_mtime_ns for file in (out / "arms").rglob("*.safetensors")}
    with pytest.raises(ConfigError, match="--resume"):
        run_lab(["gradient"], budget="small", overrides=TINY, out=out, terminal=silent())
    again = run_lab(["temperature"], budget="small", overrides=TINY, out=out, resume=True, terminal=silent())
    assert list(again["experiments"]) == ["soft-labels", "temperature", "t-squared", "gradient", "dark-knowledge"]
    assert again["experiments"]["soft-labels"] == json.loads(json.dumps(lab["experiments"]["soft-labels"]))
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no experiment 'temprature' \(did you mean 'temperature'\?\)"):
        run_lab(["temprature"], out=tmp_path / "lab", terminal=silent())
    with pytest.raises(ConfigError, match="no experiment is named"):
        run_lab(out=tmp_path / "lab", terminal=silent())
    assert not (tmp_path / "lab").exists()


def test_a_mistake_in_a_worker_ends_the_lab_with_its_message(tmp_path: Path) -> None:
    """The base's student is an mlp, which knows no widths: the arms of other sizes cannot be built."""
    with pytest.raises(ModelError, match="widths"):
        run_lab(["capacity-gap"], budget="small", overrides=TINY, out=tmp_path, jobs=2, terminal=silent())


@pytest.mark.slow
def test_killed_with_two_workers_it_finds_the_same(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [
        "soft-labels",
        "temperature",
        "self-distillation",
        "--budget",
        "small",
        "--jobs",
        "2",
        *TINY,
    ]
    command = [sys.executable, "-m", "tutelage", "lab", *words]

    def lab(out: str, *more: str) -> subprocess.Popen[bytes]:
        said = subprocess.DEVNULL
        return subprocess.Popen(
            [*command, "--out", out, *more], cwd=tmp_path, env=environment, stdout=said, stderr=said,
            start_new_session=True,
        )  # fmt: skip

    assert lab("whole").wait(timeout=400) == 0
    kills = 0
    for trainings in (3, 7, 12):  # finished ones, before the kill
        resume = ["--resume"] if (tmp_path / "killed" / "config.yaml").exists() else []
        job = lab("killed", *resume)
        while job.poll() is None and sum(1 for _ in (tmp_path / "killed").rglob("result.json")) < trainings:
            time.sleep(0.01)
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            kills += 1
        job.wait()
    assert lab("killed", "--resume").wait(timeout=400) == 0
    assert kills == 3
    found, wanted = (
        json.loads((tmp_path / name / "lab.json").read_text())["experiments"] for name in ("killed", "whole")
    )
    assert found == wanted
