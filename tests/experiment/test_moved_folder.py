"""What a search, a workflow or a lab keeps about its own files holds after its folder is moved."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tutelage.errors import RunDirectoryError
from tutelage.experiment.run import check_same


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
