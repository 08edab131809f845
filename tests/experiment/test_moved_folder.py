"""What a search, a workflow or a lab keeps about its own files holds after its folder is moved."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import tutelage
from tutelage import api
from tutelage.cli.bench_models import bench
from tutelage.config import build_recipe, load_recipe
from tutelage.errors import RunDirectoryError
from tutelage.experiment.fill_cache import fill_cache
from tutelage.experiment.run import check_same
from tutelage.progress import Terminal
from tutelage.search.search import search_recipe


def settings(root: str) -> dict[str, Any]:
    return {
        "teacher": {
            "members": [{"checkpoint": f"{root}/teacher/models/teacher-{i}"} for i in range(2)],
            "cache": {"path": f"{root}/cache/views"},
        },
        "data": {"path": {"train": f"{root}/data/train.jsonl"}, "tokenizer": f"hf:{root}/data/tokenizer"},
    }


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A run below a folder that another run holds."""
    path = tmp_path / "new" / "stages" / "one"
    path.mkdir(parents=True)
    (tmp_path / "new" / "run.lock").touch()
    return path


@pytest.mark.parametrize("before", ["/old/place", "runs/old"])
def test_own_files_are_the_same_in_another_place(stage: Path, before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (stage / "config.yaml").write_text(yaml.safe_dump(settings(before)))
    root = stage.parents[1]
    check_same(stage, settings(str(root)), resume=True)
    monkeypatch.chdir(root.parent)
    check_same(stage, settings("new"), resume=True)


@pytest.mark.parametrize("before", ["/old/other", "/old/place/teacher/models/teacher-2"])
def test_another_file_is_still_refused(stage: Path, before: str) -> None:
    (stage / "config.yaml").write_text(yaml.safe_dump({"teacher": {"checkpoint": before}}))
    now = {"teacher": {"checkpoint": str(stage.parents[1] / "teacher" / "models" / "teacher")}}
    with pytest.raises(RunDirectoryError, match=r"other settings: teacher\.checkpoint"):
        check_same(stage, now, resume=True)


def test_a_run_of_its_own_compares_paths_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"teacher": {"checkpoint": "/a/models/teacher"}}))
    with pytest.raises(RunDirectoryError, match="other settings"):
        check_same(tmp_path, {"teacher": {"checkpoint": str(tmp_path / "models" / "teacher")}}, resume=True)


RECIPE: dict[str, Any] = {
    "data": {"source": "digits", "limit": 200},
    "student": {"model": "mlp", "options": {"hidden": [8]}},
    "method": "logit",
    "train": {"epochs": 2, "batch_size": 64},
    "baseline": False,
}


def names_in(folder: Path) -> list[str]:
    """The files that contain a path of ``old``, absolute or as the caller gave it."""
    inside = [p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl", ".yaml", ".md")]
    return [str(p) for p in inside if "old/" in p.read_text(encoding="utf-8")]


def test_a_workflow_and_its_exports_hold_no_path_of_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = Terminal(speaks=False)
    workflow = {"kind": "born-again", "generations": 2}
    recipe = build_recipe({**RECIPE, "name": "t", "workflow": workflow, "train": {"epochs": 12, "batch_size": 32}})
    api.run(recipe, out="old/run", terminal=quiet)
    tutelage.export_student("old/run/student", "safetensors", terminal=quiet)
    assert names_in(tmp_path / "old") == []
    Path("new").mkdir()
    Path("old/run").rename("new/run")
    stage = next(Path("new/run/stages").rglob("generation-1"))
    assert "$HERE/../generation-0" in (stage / "config.yaml").read_text()
    rows = bench([stage], columns=["eager"], rounds=1, memory=False, terminal=quiet)["models"]
    assert [row["role"] for row in rows] == ["teacher", "student"], "the teacher of the stage is found"
    (stage / "summary.json").unlink()
    Path("new/run/summary.json").unlink()
    again = build_recipe({**RECIPE, "name": "t", "workflow": workflow, "train": {"epochs": 12, "batch_size": 32}})
    assert api.run(again, out="new/run", resume=True, terminal=quiet).path == Path("new/run")


def test_the_best_recipe_of_a_moved_search_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    search = {"trials": 1, "space": {"method.temperature": {"low": 1, "high": 8}}}
    teacher = {"model": "mlp", "train": {"epochs": 8, "batch_size": 32}}
    recipe = build_recipe({**RECIPE, "name": "t", "teacher": teacher, "search": search})
    search_recipe(recipe, out="old/search", terminal=Terminal(speaks=False))
    assert names_in(tmp_path / "old") == []
    Path("old").rename("new")
    best = load_recipe("new/search/best.yaml")
    assert best.teacher is not None
    assert best.teacher.checkpoint == "new/search/teacher/models/teacher"
    api.run(best, out="run", terminal=Terminal(speaks=False))


def test_a_cache_holds_no_path_of_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    api.run(build_recipe({**RECIPE, "name": "t", "student": {"model": "mlp"}, "method": "supervised"}), out="first",
            terminal=Terminal(speaks=False))  # fmt: skip
    teacher = {"model": "mlp", "checkpoint": "first/student"}
    recipe = build_recipe({**RECIPE, "name": "t", "teacher": {**teacher, "cache": {"path": "old/cache"}}})
    fill_cache(recipe, terminal=Terminal(speaks=False))
    assert names_in(tmp_path / "old") == []
    Path("old").rename("new")
    moved = build_recipe({**RECIPE, "name": "t", "teacher": {**teacher, "cache": {"path": "new/cache"}}})
    before = {p: p.stat().st_mtime_ns for p in Path("new/cache").rglob("*.arrow")}
    fill_cache(moved, terminal=Terminal(speaks=False))
    assert {p: p.stat().st_mtime_ns for p in Path("new/cache").rglob("*.arrow")} == before != {}
