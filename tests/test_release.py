"""What is released: the wheel holds all that the package reads, its version is one, its dependencies are few."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tutelage

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel, built from a copy as a checkout has it, links included."""
    pytest.importorskip("build", reason="needs the extra dev")
    pytest.importorskip("setuptools", reason="needs the extra dev")
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("src", "recipes"):
        unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=unwanted)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist")],
        cwd=copy, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return copy / "dist"


def test_wheel_and_sdist_hold_every_file_of_the_package(built: Path) -> None:
    files = [p for p in (ROOT / "src" / "tutelage").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    files += list((ROOT / "src" / "tutelage" / "recipes").glob("*.yaml"))  # behind a link, which rglob does not enter
    wanted = {p.relative_to(ROOT / "src").as_posix() for p in files}
    assert {f"tutelage/reports/{name}" for name in ("static/report.css", "templates/base.html.jinja")} <= wanted
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        digits = archive.read("tutelage/recipes/digits.yaml")
    assert wanted <= names, sorted(wanted - names)
    assert digits == (ROOT / "recipes" / "digits.yaml").read_bytes()
    with tarfile.open(sdist) as archive:
        inside = {m.name.partition("/src/")[2] for m in archive.getmembers() if m.isfile()}
    assert wanted <= inside, sorted(wanted - inside)
    assert wheel.name == f"tutelage-{tutelage.__version__}-py3-none-any.whl"


def test_core_has_under_fifteen_dependencies() -> None:
    assert len(PROJECT["dependencies"]) < 15


def test_every_dependency_names_its_oldest_version() -> None:
    extras = PROJECT["optional-dependencies"]
    released = [d for extra, ds in extras.items() if extra not in ("dev", "docs") for d in ds]
    for requirement in [*PROJECT["dependencies"], *released]:
        named = re.match(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?>=[0-9.]+", requirement)
        assert named or requirement.startswith("tutelage["), f"{requirement}: say the oldest version that is tested"


def test_declared_pythons_are_those_that_are_required() -> None:
    declared = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert f">={declared[0]}" == PROJECT["requires-python"]


def core_alone() -> set[str]:
    """Distributions that an installation without any extra has."""
    found: set[str] = set()
    wanted = list(PROJECT["dependencies"])
    while wanted:
        requirement = Requirement(wanted.pop())
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        with suppress(metadata.PackageNotFoundError):
            wanted += metadata.requires(name) or []
    return found


WITHOUT_EXTRAS = """
import sys

class CoreAlone:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {missing} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [CoreAlone(finder) for finder in sys.meta_path]
from tutelage.cli import main
main({command})
"""


def test_quickstart_runs_on_the_core_alone(tmp_path: Path) -> None:
    core = core_alone()
    missing = {
        module
        for module, names in metadata.packages_distributions().items()
        if not core & {canonicalize_name(n) for n in names} and module != "tutelage"
    }
    assert {"rapidfuzz", "transformers", "timm", "PIL"} & missing, "nothing is taken away"
    command = ["run", str(ROOT / "recipes" / "digits.yaml"), "seeds=[0]", "--out", str(tmp_path / "run")]
    command += ["teacher.train.epochs=null", "teacher.train.steps=40", "train.epochs=null", "train.steps=2"]
    script = WITHOUT_EXTRAS.format(missing=missing, command=command)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_a_newcomer_gets_from_the_wheel_to_an_answer_without_an_edit(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    reached = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path / "pip"), "typer"],
        capture_output=True, timeout=120,
    )  # fmt: skip
    if reached.returncode:
        pytest.skip("pip reaches no packages here")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(ROOT / ".ci" / "newcomer"), str(wheel), str(tmp_path / "work")],
        env={**environment, "PYTHON": sys.executable}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "work" / "digits.yaml").is_file()
    for run in ("pictures", "reviews"):
        for made in ("summary.json", "report.html", "bench.json", "export/onnx/model.onnx"):
            assert (tmp_path / "work" / "runs" / run / made).is_file(), (run, made)
