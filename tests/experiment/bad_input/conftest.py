"""A folder with a small recipe, its teacher and its run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from torch import nn

from support import bad_input_files as broken
from support.bad_input import call


@pytest.fixture(scope="session")
def teacher() -> nn.Module:
    return broken.taught()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher: nn.Module) -> Path:
    """A folder with the small recipe and its finished run in ``out``."""
    folder = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(folder)
    try:
        broken.save_teacher(teacher, folder / "teacher")
        (folder / "recipe.yaml").write_text(broken.RECIPE)
        assert call(["run", "recipe.yaml", "--out", "out"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def place(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the small recipe and the teacher that it names."""
    shutil.copytree(finished / "teacher", tmp_path / "teacher")
    (tmp_path / "recipe.yaml").write_text(broken.RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ran(finished: Path, place: Path) -> Path:
    """The current folder, with a finished run in ``out``."""
    shutil.copytree(finished / "out", place / "out")
    return place
