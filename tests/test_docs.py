"""Pages that are written from code must be those that the code writes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tutelage import config

DOCS = Path(__file__).parents[1] / "docs"


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
