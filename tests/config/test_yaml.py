"""Recipes are refused before their aliases are expanded, and no message repeats a large value."""

import time
from pathlib import Path

import pytest

from tutelage.config import build_recipe, load_recipe
from tutelage.config.lines import parse_yaml
from tutelage.errors import ConfigError, shorten
from tutelage.safe_yaml import MAX_ALIASED_NODES


def nested_aliases(levels: int, width: int) -> str:
    """A document of ``levels`` lines whose last value expands to more than ``width ** levels`` nodes."""
    lines = ["a0: &a0 [1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("levels", "width"), [(7, 8), (9, 9), (40, 9)])
def test_nested_aliases_are_refused_before_they_are_expanded(levels: int, width: int, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(nested_aliases(levels, width))
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="aliases in this value expand") as raised:
        load_recipe(path)
    assert time.perf_counter() - start < 0.5
    assert len(str(raised.value)) < 1000
    assert "recipe.yaml:" in str(raised.value)
    assert "write the values out" in str(raised.value)


def test_merge_keys_are_counted_as_well() -> None:
    text = "a: &a {x: 1, y: 2}\n" + "b: [" + ", ".join(["{<<: *a}"] * MAX_ALIASED_NODES) + "]\n"
    with pytest.raises(ConfigError, match="aliases"):
        parse_yaml(text, "r.yaml")


def test_an_alias_of_itself_is_refused() -> None:
    for text in ("a: &a [*a]\n", "a: &a {b: {c: *a}}\n"):
        with pytest.raises(ConfigError, match=r"r.yaml:1: an alias refers to a value that contains"):
            parse_yaml(text, "r.yaml")


def test_aliases_in_an_override_are_counted() -> None:
    value = "[&a [1, 1, 1, 1, 1, 1, 1, 1], &b [" + ", ".join(["*a"] * 30) + "], &c [" + ", ".join(["*b"] * 30) + "]]"
    with pytest.raises(ConfigError, match="override") as raised:
        build_recipe({}, overrides=[f"data.x={value}"])
    assert len(str(raised.value)) < 1000


def test_a_few_aliases_and_a_large_document_are_read() -> None:
    raw, _ = parse_yaml("a: &a [1, 2]\nb: [*a, *a]\n" + f"c: {list(range(3 * MAX_ALIASED_NODES))}\n", "r.yaml")
    assert raw["b"] == [[1, 2], [1, 2]]
    assert len(raw["c"]) == 3 * MAX_ALIASED_NODES


def test_a_given_value_is_shown_in_at_most_80_characters() -> None:
    assert shorten("a\nb") == r"'a\nb'"
    for value in ("x" * 10**6, ["x"] * 10**4, {"k" * 500: 1}, b"\0" * 500):
        assert len(shorten(value)) == 80
    base = {"data": "digits", "teacher": "mlp", "student": "mlp"}
    long = "z" * 10_000
    for change in ({long: 1}, {"method": long}, {"data": long}, {"train": {"steps": long}}, {"student": long},
                   {"method": {"soft": long}}, {"method": {"temperature": [long] * 99}}, {"teacher": {long: long}},
                   {"data": {"source": "digits", "augment": [long]}}, {"data": {"source": "digits", "classes": long}},
                   {"method": {"kind": "feature", "loss": long}}, {"train": {"optimizer": long}},
                   {"workflow": long}, {f"k{i}": long for i in range(50)}):  # fmt: skip
        with pytest.raises(ConfigError) as raised:
            build_recipe({**base, **change}, default_name="r")
        per_problem = str(raised.value).replace("\n  ->", "").splitlines()
        assert max(map(len, per_problem)) < 1000, raised.value
        assert len(per_problem) <= 21
