"""Pages that are written from code must be those that the code writes."""

import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tutelage import config
from tutelage.config.lines import parse_yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recipes_page_is_up_to_date(generate: ModuleType) -> None:
    committed = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert committed == generate.page(), "run: python docs/generate.py"


def test_schema_is_up_to_date(generate: ModuleType) -> None:
    committed = (DOCS / "recipe.schema.json").read_text(encoding="utf-8")
    assert committed == generate.schema_text(), "run: python docs/generate.py"


def test_schema_takes_every_recipe_and_refuses_a_misspelt_key() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the extra dev")
    schema = json.loads((DOCS / "recipe.schema.json").read_text(encoding="utf-8"))
    check = jsonschema.Draft202012Validator(schema)
    paths = [
        *(ROOT / "recipes").glob("*.yaml"),
        *(p for p in (ROOT / "benchmarks").glob("*.yaml") if p.stem != "methods"),
    ]
    for path in paths:
        raw, _ = parse_yaml(path.read_text(encoding="utf-8"), path.name)
        assert not list(check.iter_errors(raw)), path.name
    short = {"data": "digits", "teacher": "mlp", "student": "mlp", "method": "logit", "seed": 1}
    assert check.is_valid(short)
    for wrong in ({"epoch": 3}, {"train": {"epochs": "many"}}, {"seed": -1}, {"teacher": {"modle": "mlp"}}):
        assert not check.is_valid({**short, **wrong}), wrong
    assert not check.is_valid({"data": "digits"})


def test_every_key_of_a_recipe_has_a_meaning(generate: ModuleType) -> None:
    for cls in (config.Recipe, *generate.SECTIONS.values()):
        for name in cls.model_fields:
            assert generate.meaning(cls, name), f"{cls.__name__}.{name}"


def test_every_option_of_a_schedule_is_described(generate: ModuleType) -> None:
    assert set(generate.SCHEDULES) == set(config.SCHEDULES)
    for kind, options in config.SCHEDULES.items():
        for option in options:
            assert f"`{option}`" in generate.SCHEDULES[kind], f"{kind}: {option}"


def test_every_method_has_a_section(generate: ModuleType) -> None:
    assert set(config.METHOD_KINDS.values()) <= set(generate.SECTIONS.values())


# Files ---------------------------------------------------------------------------------------------------

LONGER: dict[str, str] = {}
"""Files that have more than 500 lines all the same, each with the reason."""


@pytest.mark.parametrize("folder", ["src/tutelage", "tests"])
def test_no_file_grows_into_several_unnoticed(folder: str) -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert lengths
    long = {name: length for name, length in lengths.items() if length > 500 and name not in LONGER}
    assert not long, f"split at the seam that it has, or say in LONGER why not: {long}"


# Public names ------------------------------------------------------------------------------------------

ROOMS = (
    "tutelage", "tutelage.losses", "tutelage.methods", "tutelage.teachers", "tutelage.students", "tutelage.taps",
    "tutelage.data", "tutelage.models", "tutelage.engine", "tutelage.reports", "tutelage.lab", "tutelage.init",
    "tutelage.config", "tutelage.integrations", "tutelage.integrations.hf", "tutelage.integrations.lightning",
    "tutelage.generation",
)  # fmt: skip
NOT_LOSSES = {"coarse", "linear_sums"}
"""Functions among the losses that give no loss of one student and one teacher."""


def public(room: str) -> list[tuple[str, object]]:
    """Functions and classes that a room offers."""
    if room.endswith(("hf", "lightning")):
        pytest.importorskip(room.rpartition(".")[2].replace("hf", "transformers"), reason="needs its library")
    module = importlib.import_module(room)
    named = getattr(module, "__all__", None) or [n for n in vars(module) if "Distillation" in n]
    found = [(name, getattr(module, name)) for name in named]
    return [(name, value) for name, value in found if inspect.isclass(value) or inspect.isfunction(value)]


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_says_what_it_takes_and_returns(room: str) -> None:
    assert public(room)
    shared = importlib.import_module(room).__doc__ or ""  # may say once what all functions of a room take
    for name, value in public(room):
        text = " ".join((inspect.getdoc(value) or "").split())
        assert len(text) > 12, f"{room}.{name} has no docstring"
        if inspect.isfunction(value):
            parameters = inspect.signature(value).parameters
            # One argument, or a pair that the first sentence is about, needs no list.
            if len(parameters) > 3:
                unsaid = [p for p in parameters if not re.search(rf"\b{p}\b", text) and f"``{p}``" not in shared]
                assert not unsaid or "keys of a recipe's ``data``" in text, f"{room}.{name}: {unsaid}"


def test_every_objective_has_shapes_and_a_source() -> None:
    for name, value in public("tutelage.losses"):
        text = inspect.getdoc(value) or ""
        if not inspect.isfunction(value) or name in NOT_LOSSES:
            continue
        assert re.search(r"``?\[[^\]]*[A-Z]", text), f"{name} does not say shapes"
        assert re.search(r"Reference|et al|\(\d{4}\)|:func:|torch\.nn", text), f"{name} does not say where it is from"


# Links -------------------------------------------------------------------------------------------------

PAGES = sorted({
    *DOCS.rglob("*.md"), *(ROOT / "results").rglob("*.md"),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
})  # fmt: skip


def anchors(path: Path) -> set[str]:
    """What headings of a page can be linked to by, as GitHub makes it."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    heads = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h) for h in re.findall(r"^#+ +(.+?) *$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_link_is_dead(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", "", text)
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(link)
    assert not dead


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for page in ("index.html", "tutorials/images/index.html", "api/losses/index.html", "recipe.schema.json"):
        assert (tmp_path / "site" / page).is_file()
    losses = (tmp_path / "site" / "api" / "losses" / "index.html").read_text(encoding="utf-8")
    missing = [name for name, _ in public("tutelage.losses") if f"tutelage.losses.{name}" not in losses]
    assert not missing


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120


def test_tests_that_the_features_page_names_exist() -> None:
    named = re.findall(r"`(tests/[^`]+)`", (ROOT / "docs" / "features.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).exists()] == []
