"""CONTRIBUTING.md adds a loss on logits and a loss on features: its code blocks work in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from support import python

ROOT = Path(__file__).parents[1]
STEP = re.compile(
    r"(?:(?P<append>Append) to `(?P<to>[^`]+)`|(?P<create>Create) `(?P<new>[^`]+)`"
    r"|[Ii]n\s+`(?P<path>[^`]+)`, (?P<where>after|before)\s+`(?P<line>[^`]+)`):\n\n"
    r"(?P<block> *```python\n.*?\n *```\n)",
    re.DOTALL,
)
RECIPE = {
    "data": {"source": "digits", "limit": 200},
    "teacher": {"model": "mlp", "options": {"hidden": [16]}},
    "student": {"model": "mlp", "options": {"hidden": [8]}},
    "train": {"steps": 3, "batch_size": 16},
    "baseline": False,
    "samples": {"predictions": 0},
}
METHODS = {
    "on logits": {"kind": "logit", "soft": "renyi", "soft_options": {"order": 0.3}},
    "on features": {
        "kind": "feature", "loss": "absolute", "pairs": [{"student": "head:input", "teacher": "head:input"}]
    },
}  # fmt: skip
SCRIPT = """
import json, sys
for name in [name for name in sys.modules if name.partition(".")[0] in ("tutelage", "support")]:
    del sys.modules[name]  # the fork has imported the package itself, not its copy
sys.path[:0] = ["src", "tests"]
import pytest
from tutelage import api
from tutelage.config import build_recipe
from tutelage.progress import Terminal
assert sys.modules["tutelage"].__file__.startswith(sys.argv[1])
job = json.loads(sys.argv[2])
LOSSES = "renyi or absolute or table"
result = {"tests": int(pytest.main(["-q", "--assert=plain", "-p", "no:cacheprovider", "-k", LOSSES, *job["tests"]]))}
for name, method in job["methods"].items():
    recipe = build_recipe({**job["recipe"], "method": method}, default_name="new")
    run = api.run(recipe, out=job["out"] + "/" + name, terminal=Terminal(speaks=False))
    result[name] = run.summary["formula"]
try:
    build_recipe({**job["recipe"], "method": {"soft": "renyi", "soft_options": {"order": 3}}}, default_name="new")
except ValueError as error:
    result["error"] = str(error)
print("RESULT " + json.dumps(result))
"""


def apply(page: str, root: Path) -> list[Path]:
    """Carry out the steps of a page below ``root``; returns the created files."""
    created = []
    for step in STEP.finditer(page):
        indent = re.match(r" *", step["block"])[0]  # type: ignore[index]
        code = "".join(line.removeprefix(indent) for line in step["block"].splitlines(keepends=True)[1:-1])
        path = root / (step["to"] or step["new"] or step["path"])
        if step["create"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code, encoding="utf-8")
            created.append(path)
            continue
        text = path.read_text(encoding="utf-8")
        if step["append"]:
            text += "\n\n" + code
        else:
            assert text.count(step["line"] + "\n") == 1, f"{path} has no single line {step['line']!r}"
            gap = "\n\n" if code.startswith("class") else ""
            parts = [step["line"] + "\n", gap + code]
            text = text.replace(parts[0], "".join(parts if step["where"] == "after" else reversed(parts)))
        path.write_text(text, encoding="utf-8")
    return created


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "src", root / "src")
    for name in ("support/loss_cases.py", "losses/test_laws.py"):
        (root / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / name, root / "tests" / name)
    tests = apply((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), root)
    assert len(tests) == 2
    tests.append(root / "tests" / "losses" / "test_laws.py")
    job = {"tests": [str(path) for path in tests], "recipe": RECIPE, "methods": METHODS, "out": str(root / "runs")}
    done = python.run(["-c", SCRIPT, str(root), json.dumps(job)], cwd=root, env={**os.environ, "PYTEST_ADDOPTS": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.rpartition("RESULT ")[2])
    assert found["tests"] == 0, done.stdout
    return found


def test_a_loss_on_logits_is_added_as_the_page_says(result: dict[str, Any]) -> None:
    assert result["on logits"] == "0.9 * renyi(T=1, order=0.3) + 0.1 * ce"
    assert "renyi: order is 3" in result["error"]


def test_a_loss_on_features_is_added_as_the_page_says(result: dict[str, Any]) -> None:
    assert result["on features"] == "0.9 * kd(T=4) + 0.1 * ce + 10 * absolute(head:input)"
