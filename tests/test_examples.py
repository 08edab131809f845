"""What the README, the examples and the recipes promise, run as a reader would run it."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tutelage.config import build_recipe, load_recipe
from tutelage.methods import FEATURE_LOSSES, LOGIT_LOSSES, METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHODS_PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    """The code blocks of a page in ``language``; of the README by default."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)


def run_python(script: Path, folder: Path) -> str:
    """Run a script in a folder of its own, warnings as errors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_has_the_blocks_that_are_tested_here() -> None:
    assert (len(blocks("python")), len(blocks("yaml"))) == (1, 1)


def test_python_of_the_readme_is_ten_lines_that_run(tmp_path: Path) -> None:
    (code,) = blocks("python")
    statements = [line for line in code.splitlines() if line.strip() and not re.match(r"(import|from) ", line)]
    assert len(statements) <= 10
    script = tmp_path / "readme.py"
    script.write_text(code, encoding="utf-8")
    assert "'mean'" in run_python(script, tmp_path)
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "student"):
        assert (tmp_path / "runs" / "mine" / name).exists()


def test_recipe_of_the_readme_is_short_and_valid(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    assert len(text.splitlines()) <= 15
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_recipe(path).method.temperature == 4


def test_methods_of_the_docs_and_of_the_benchmark_are_methods() -> None:
    (text,) = blocks("yaml", METHODS_PAGE)
    named = [yaml.safe_load(line)["method"] for line in text.splitlines()]
    groups = yaml.safe_load((ROOT / "benchmarks" / "methods.yaml").read_text(encoding="utf-8"))
    named += [method for group in groups.values() for method in group.values()]
    assert len(named) > 25
    for method in named:
        base = {"name": "x", "data": "digits", "teacher": "mlp", "student": "mlp", "method": copy.deepcopy(method)}
        config = build_recipe(base).method
        METHODS[config.kind](**config.model_dump(exclude={"kind"}))
    compared = {m["loss"] for m in named if isinstance(m, dict) and "loss" in m}
    compared |= {p["loss"] for m in named if isinstance(m, dict) for p in m.get("pairs", [])}
    only_text = {"attention_kl", "attention_mse", "value_relation"}
    assert compared == set(FEATURE_LOSSES) - only_text
    assert {m.get("soft", "kd") for m in named if isinstance(m, dict)} == set(LOGIT_LOSSES) - {"binary_kd"}
    for path in (ROOT / "benchmarks").glob("*.yaml"):
        if path.stem != "methods":
            load_recipe(path)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_files_that_the_readme_links_to_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_own_loop_is_under_30_lines_and_the_student_learns(tmp_path: Path) -> None:
    script = ROOT / "examples" / "your_own_loop.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 30
    said = dict(line.split(": ") for line in run_python(script, tmp_path).splitlines())
    assert set(said) == {"teacher", "student"}
    assert float(said["student"].rstrip("%")) > 80
