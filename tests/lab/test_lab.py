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

from tutelage.config import dump_recipe
from tutelage.errors import ConfigError, DataError, ModelError
from tutelage.lab import CLAIMS, arms, llm, run_lab
from tutelage.lab.arms import ARMS, FIRST, Results, recipe_of
from tutelage.lab.claims import ExperimentResult, exact, gain, needed, within
from tutelage.lab.page import facts
from tutelage.lab.runner import base_recipes, missing_requirement
from tutelage.progress import Terminal
from tutelage.teachers import CachedTeacher
from tutelage.teachers.cache import inspect_cache

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


def test_all_claims_are_there() -> None:
    assert list(CLAIMS) == [
        "soft-labels", "temperature", "t-squared", "gradient", "dark-knowledge", "fitnets", "attention-transfer",
        "self-distillation", "capacity-gap", "assistant", "augmentation", "distilbert", "llm",
    ]  # fmt: skip
    assert {arm for claim in CLAIMS.values() for arm in claim.arms} == set(ARMS), "an arm that nobody reads"


def test_figures_are_those_of_the_runs(found: tuple[Path, dict[str, Any]]) -> None:
    out, lab = found
    summary = json.loads((out / "arms" / FIRST["images"] / "summary.json").read_text())
    part = lab["experiments"]["soft-labels"]["statements"][0]
    assert part["mean"] == pytest.approx(summary["gain"]["last"]["mean"])
    assert (part["low"], part["high"]) == pytest.approx(
        (summary["gain"]["last"]["low"], summary["gain"]["last"]["high"])
    )
    assert json.loads((out / "lab.json").read_text()) == json.loads(json.dumps(lab))
    page, text = (out / "lab.html").read_text(), (out / "lab.md").read_text()
    for name in lab["experiments"]:
        assert f'id="{name}"' in page
        assert f"(lab-{name}.svg)" in text
        assert (out / f"lab-{name}.svg").read_text().lstrip().startswith("<?xml")


def test_laws_hold_on_real_logits(found: tuple[Path, dict[str, Any]]) -> None:
    experiments = found[1]["experiments"]
    assert experiments["gradient"]["verdict"] == "reproduced"
    slopes = [part["mean"] for part in experiments["t-squared"]["statements"]]
    assert slopes[0] == pytest.approx(-2, abs=0.1)
    assert slopes[1] == pytest.approx(0, abs=0.1)


def test_arms_differ_from_the_base_in_what_they_say(tmp_path: Path) -> None:
    bases = base_recipes("full", None, [])
    base = bases["images"]
    assert len(base.seeds) >= 5
    found = {name: recipe_of(bases, arm, tmp_path) for name, arm in ARMS.items() if arm.base == "images"}
    assert found["kd"].required_teacher.train is not None
    others = [recipe.required_teacher for name, recipe in found.items() if name not in ("kd", "born-again")]
    assert {teacher.checkpoint for teacher in others} == {str(tmp_path / "arms" / "kd" / "models" / "teacher")}
    assert found["T8"].method.temperature == 8  # type: ignore[union-attr]
    assert found["hint"].method.alpha == 0  # type: ignore[union-attr]
    assert found["born-again"].teacher is None
    caches = {r.teacher.cache.path for r in found.values() if r.teacher is not None and r.teacher.cache is not None}
    assert caches == {str(tmp_path / "cache" / name) for name in ("images", "views", "hint", "attention")}
    for recipe in found.values():
        assert recipe.train == base.train, "the budget is the same for all"
        assert recipe.seeds == base.seeds


def test_arms_on_texts_differ_in_one_thing_each(tmp_path: Path) -> None:
    bases = base_recipes("full", None, ["texts.train.epochs=1", "train.epochs=7"])
    assert (bases["texts"].train.epochs, bases["images"].train.epochs) == (1, 7)
    found = {name: recipe_of(bases, arm, tmp_path) for name, arm in ARMS.items() if arm.base == "texts"}
    whole = dump_recipe(found["triple"].model_copy(update={"name": ""}))
    for name, recipe in found.items():
        assert recipe.train == bases["texts"].train
        assert (recipe.required_teacher.train is not None) == (name == "triple")
        if name != "triple":
            rest = recipe.model_copy(update={"name": "", "teacher": found["triple"].teacher, "baseline": True})
            lines = set(dump_recipe(rest).splitlines()) ^ set(whole.splitlines())
            assert 1 <= len(lines) <= 2, (name, lines)


def test_an_experiment_without_its_data_is_left_out_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"(?s)'distilbert' lacks.*debian_sections"):
        run_lab(["distilbert"], out=tmp_path / "lab", terminal=silent())
    with pytest.raises(ConfigError, match="given here: no such file"):
        run_lab(["distilbert"], overrides=["texts.data.path=given here"], out=tmp_path / "lab", terminal=silent())
    with pytest.raises(ConfigError, match=r"(?s)'llm' lacks.*tutelage generate recipes/alpaca"):
        run_lab(["llm"], out=tmp_path / "lab", terminal=silent())
    assert missing_requirement("images", base_recipes("small", None, [])["images"]) is None
    missing = missing_requirement(
        "images", base_recipes("small", None, ["data={source: imagefolder, path: nowhere}"])["images"]
    )
    assert missing == "nowhere: no such file; check data.path", "images are not what debian_sections makes"


# A closed teacher ----------------------------------------------------------------------------------------


def answers(folder: Path, many: int = 60) -> list[str]:
    """What a closed teacher said, as files; overrides that name them."""
    from support import language_worlds

    for name, rows in (
        ("train", language_worlds.conversations(many)),
        ("test", language_worlds.conversations(20, 1)),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"llm.data.path={{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}", "llm.train.steps=20",
            "llm.student.options={hidden: 32, layers: 2}", "llm.data.max_length=64"]  # fmt: skip


def test_a_closed_teacher_s_answers_are_learned_and_shuffled_ones_less(tmp_path: Path) -> None:
    """Sums of two numbers in the prompt: what an answer has to do with its prompt can be learned."""
    given = [*answers(tmp_path, 100), "llm.samples.generations=0"]
    found = run_lab(["llm"], budget="small", overrides=given, out=tmp_path / "lab", terminal=silent())
    first, second = found["experiments"]["llm"]["statements"]
    assert first["unit"] == "nats a token"
    assert first["mean"] > 1
    summaries = [
        json.loads((tmp_path / "lab" / "arms" / arm / "summary.json").read_text())["students"]["distilled"]["last"]
        for arm in ("closed", "closed-shuffled")
    ]
    assert second["mean"] == pytest.approx(summaries[1]["loss"]["mean"] - summaries[0]["loss"]["mean"])
    page = (tmp_path / "lab" / "lab.html").read_text()
    assert "a closed teacher&#39;s answers in train.jsonl, 20 steps, 2 seeds an arm; budget small." in page
    assert "fashion-mnist" not in page.partition("<script")[0], "of data that no experiment here is of"
    (tmp_path / "train.jsonl").write_text((tmp_path / "test.jsonl").read_text())
    with pytest.raises(ConfigError, match="not those that this lab started with"):
        run_lab(["llm"], budget="small", overrides=given, out=tmp_path / "lab", resume=True, terminal=silent())


def test_shuffled_answers_are_the_same_and_none_is_to_its_prompt() -> None:
    rows = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(50)]
    other = llm.shuffle_answers(rows)
    assert [row[:-1] for row in other] == [row[:-1] for row in rows]
    assert sorted(row[-1]["content"] for row in other) == sorted(row[-1]["content"] for row in rows)
    assert all(a[-1] != b[-1] for a, b in zip(other, rows, strict=True))
    assert llm.shuffle_answers(rows) == other


def test_arms_on_answers_differ_in_the_pairing_alone(tmp_path: Path) -> None:
    bases = base_recipes("full", None, [])
    own, other = (recipe_of(bases, ARMS[name], tmp_path) for name in ("closed", "closed-shuffled"))
    lines = set(dump_recipe(own).splitlines()) ^ set(dump_recipe(other).splitlines())
    assert {line.split(":")[0].strip() for line in lines} == {"name", "train"}
    assert own.teacher is None
    with pytest.raises(ConfigError, match="uses stored answers"):
        base_recipes("full", None, ["llm.teacher=hf:x"])


def test_too_few_answers_are_refused(tmp_path: Path) -> None:
    given = answers(tmp_path, 1)
    with pytest.raises(DataError, match="1 conversations with an answer"):
        run_lab(["llm"], budget="small", overrides=given, out=tmp_path / "lab", terminal=silent())


def test_the_page_says_on_which_data_each_kind_of_claim_was_measured() -> None:
    found = {
        "budget": "full", "seeds": [0],
        "recipe": {"data": {"source": "digits", "labels": 100}, "train": {"epochs": 3}},
        "texts": {"data": {"source": "table", "path": {"train": "data/a.parquet"}, "limit": 6000},
                  "train": {"epochs": 2}, "seeds": [0, 1]},
        "experiments": {"distilbert": {"bases": ["texts"]}},
    }  # fmt: skip
    assert facts(found) == "a.parquet, 6,000 texts, 2 epochs, 2 seeds an arm; budget full."
    found["experiments"]["soft-labels"] = {}  # of a lab before experiments said what they are of
    assert facts(found).startswith("digits, 100 labelled images, 3 epochs, 1 seeds an arm; a.parquet")


def test_the_teacher_computes_each_view_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine trainings with one teacher, on images and on their views: computed rows are stored rows."""
    computed: list[int] = []
    compute = CachedTeacher._compute

    def counted(self: CachedTeacher, batch: Any, ids: Any, views: Any, missing: Any) -> Any:
        computed.append(len(missing))
        return compute(self, batch, ids, views, missing)

    monkeypatch.setattr(CachedTeacher, "_compute", counted)
    monkeypatch.setattr(arms, "VIEWS", 2)
    run_lab(
        ["temperature", "augmentation"], budget="small", overrides=TINY, out=tmp_path, resume=False, terminal=silent()
    )
    rows = {name: inspect_cache(tmp_path / "cache" / name)["rows"] for name in ("images", "views")}
    images = rows["images"]
    assert rows["views"] == 2 * images
    assert 200 < images <= 300
    assert sum(computed) == 3 * images


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
    assert gain("", open_, [0.0] * 5).seeds_needed == few > 5
    assert within("", [1.0, 1.01, 0.99], 0.9, 1.1).verdict == "reproduced"
    assert within("", [1.3, 1.31, 1.29], 0.9, 1.1).verdict == "not reproduced"
    assert within("", [0.5, 1.5, 1.0], 0.9, 1.1).verdict == "inconclusive"
    assert exact("", 1e-9, 1e-6).verdict == "reproduced"
    good, bad, unknown = exact("", 0, 1), exact("", 2, 1), gain("", [0.95], [0.90])
    assert ExperimentResult([good, good], []).verdict == "reproduced"
    assert ExperimentResult([good, unknown], []).verdict == "inconclusive"
    assert ExperimentResult([good, unknown, bad], []).verdict == "not reproduced"


def test_similarity_is_read_as_it_was_kept(found: tuple[Path, dict[str, Any]]) -> None:
    """Of a pair, E[p_i p_j] over the mean of the masses of both: by hand, from the stored triangle."""
    out = found[0]
    raw = json.loads((out / "arms" / FIRST["images"] / "similarity" / "teacher.json").read_text())
    many, upper = raw["classes"], raw["sim"]["4"]
    row0 = upper[:many]
    mass0 = sum(row0)
    mass1 = row0[1] + sum(upper[many : 2 * many - 1])
    mine = Results(base_recipes("small", None, TINY), out).similarity("teacher", 4)
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


@pytest.mark.usefixtures("forked_workers")
def test_a_mistake_in_a_worker_ends_the_lab_with_its_message(tmp_path: Path) -> None:
    """The base's student is an mlp, which has no widths and no depth: the arms of other sizes cannot be built."""
    with pytest.raises(ModelError, match=r"student\.options\.(depth|widths): mlp has no option"):
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
