"""An error of a recipe names the user's own line or override and key, in the package's own words."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from tutelage.config import Recipe, build_recipe, load_recipe
from tutelage.config.base import Section
from tutelage.config.judge import EndpointRecipe
from tutelage.config.messages import EXPECTED, must_be
from tutelage.errors import ConfigError, ModelError

TEXT = """\
name: small
data: {source: digits}
teacher: {model: mlp}
student: {model: mlp}
method:
  kind: feature
  pairs:
  - {student: a, teacher: b}
  - student: a
    teacher: b
train:
  epochs: 1
seeds: [0, 1]
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(TEXT)
    return Path("r.yaml")


@pytest.mark.parametrize(("override", "says"), [
    ("epochs=1", ["unknown key 'epochs' (did you mean 'train.epochs'?)"]),
    ("train.rank=4", ["unknown key 'train.rank' (did you mean 'student.lora.rank'?)"]),
    ("optimizer.lr=1", ["override 'optimizer.lr=1': unknown key 'optimizer' (did you mean 'train.optimizer'?)"]),
    ("--train.epochs=1", ["not of the form key=value", "for example train.epochs=1"]),
    ("--train.epochs", ["not of the form key=value", "for example train.epochs=VALUE"]),
    ("method.options.pool=max", ["method.options.pool: hint has no option 'pool'", "its options: none"]),
    ("method.soft_options.balance=3", ["method.soft_options.balance: kd has no option 'balance'"]),
    ("method.soft_options={balance: 3}", ["method.soft_options.balance: kd has no option 'balance'"]),
    ("method.pairs=[{student: a, teacher: b, options: 3}]", ["method.pairs.0.options is 3", "mapping of keys"]),
    ("seeds=3", ["seeds is 3\n  -> it must be a list"]),
    ("seeds=[0", ["the value is not YAML", "close the bracket"]),
    ("seeds=*a", ["undefined alias 'a'", "define it with &NAME before"]),
    ("teacher.cache.keep=all", ["teacher.cache.keep is 'all'", "allowed: dense, topk"]),
    ("data.path=3.5", ["data.path is 3.5\n  -> it must be text"]),
    ("teacher.weights=[1, -1]", ["teacher.weights.1 is -1\n  -> it must be at least 0"]),
    ("search.space={a: {low: x}}", ["search.space.a.low is 'x'\n  -> it must be a number"]),
    ("teacher.train.precision=bf16", ["teacher.train.precision is 'bf16', and train.precision is None"]),
    ("data.mean=[0.5]", ["data.mean: 'mean' and 'std' go together"]),
])  # fmt: skip
def test_an_override_is_named_as_typed(path: Path, override: str, says: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        load_recipe(path, [override])
    message = str(raised.value)
    assert message.startswith(f"override {override!r}"[:60])
    assert all(part in message for part in says), message
    assert "\n  -> " in message


@pytest.mark.parametrize(("old", "new", "says"), [
    ("    teacher: b", "    teacher: b\n    options: 3", ["r.yaml:11: method.pairs.1.options is 3"]),
    ("    teacher: b", "    teacher: b\n    options: {pool: max}", ["r.yaml:11: method.pairs.1.options.pool: hint"]),
    ("    teacher: b", "    teacher: b\n    loss: nst\n    norm: true", ["r.yaml:12: method.pairs.1.norm: nst"]),
    ("  kind: feature", "  kind: feature\n  options: {a: 1}", ["r.yaml:7: method.options.a: hint has no option"]),
    ("{source: digits}", "{source: digits, classes: *names}", ["undefined alias 'names'", "write the value out"]),
])  # fmt: skip
def test_the_line_and_the_whole_key_are_named(path: Path, old: str, new: str, says: list[str]) -> None:
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(ConfigError) as raised:
        load_recipe(path)
    assert all(part in str(raised.value) for part in says), raised.value


def test_all_problems_of_a_section_are_reported(path: Path) -> None:
    path.write_text(TEXT.replace("  kind: feature", "  kind: feature\n  alpha: 2\n  options: {a: 1, b: 2}"))
    with pytest.raises(ConfigError) as raised:
        load_recipe(path)
    places = [line.partition(": ")[0] for line in str(raised.value).splitlines() if not line.startswith("  ->")]
    assert places == ["r.yaml:7", "r.yaml:8", "r.yaml:8"], raised.value


def test_seed_replaces_the_seeds_of_the_file_but_not_those_of_another_override(path: Path) -> None:
    assert load_recipe(path, ["seed=3"]).seeds == [3]
    for overrides in (["seed=3", "seeds=[0]"], ["seeds=[0]", "seed=3"]):
        with pytest.raises(ConfigError, match="override 'seed=3': both 'seed' and 'seeds' are given"):
            load_recipe(path, overrides)


def test_a_recipe_without_its_folder_is_found(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tutelage recipes digits --out digits\.yaml"):
        load_recipe("digits")
    Path("recipes").mkdir()
    Path("recipes/digits.yaml").write_text(TEXT)
    for name in ("digits", "digits.yaml"):
        with pytest.raises(ConfigError, match=r"did you mean recipes/digits\.yaml\?"):
            load_recipe(name)


def test_an_error_with_a_key_is_located(path: Path) -> None:
    recipe = load_recipe(path, ["teacher.options.width=3"])
    for where, expected in (
        ("teacher.options.width", "override 'teacher.options.width=3': teacher.options.width"),
        ("teacher.model", "r.yaml:3: teacher.model"),
        ("method.pairs.1.teacher", "r.yaml:10: method.pairs.1.teacher"),
        ("student.checkpoint: w.pt", "r.yaml:4: student.checkpoint: w.pt"),
        ("some/file.pt", "some/file.pt"),
        (None, None),
    ):
        with pytest.raises(ModelError) as raised, recipe.locating():
            raise ModelError("what", where=where)
        assert raised.value.where == expected


def test_where_a_recipe_comes_from_is_no_setting(path: Path) -> None:
    assert load_recipe(path) == build_recipe(yaml.safe_load(TEXT))


# The words of pydantic -----------------------------------------------------------------------------------

WRONG: list[Any] = [None, True, -1, 2.5, float("nan"), "zzz", [], [{}, "zzz"], {"zzz": 1}, {3: 4}]


OF_PYDANTIC = ("Input should", "should be", "valid ", "Keys should", "Unable to", "constrained")


def keys(section: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in section.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from keys(value, (*prefix, key))


def examples() -> Iterator[tuple[type[BaseModel], dict[str, Any]]]:
    digits = yaml.safe_load(TEXT) | {"search": {}, "samples": {}, "evaluate": {"tasks": ["a"]}}
    texts = {"source": "table", "path": "a.csv", "task": "classes"}
    for change in (
        {"teacher": {"model": "mlp", "cache": {"path": "x"}, "inference": {}}},
        {"teacher": {"members": ["mlp", "mlp"], "weights": [1, 1]}},
        {"teacher": {"endpoint": {"url": "http://a/v1"}}},
        {"method": {"kind": "on-policy", "rollouts": {"url": "http://a"}}}, {"method": {"kind": "minilm"}},
        {"method": {"kind": "mutual"}}, {"method": {"kind": "tinybert", "layers": [1]}},
        {"student": {"model": "teacher", "lora": {"rank": 4}, "map": [1]}}, {"data": texts},
        {"workflow": "born-again"}, {"workflow": {"kind": "assistant-chain", "assistants": ["mlp"]}},
        {"train": {"optimizer": "sgd", "schedule": "cosine"}},
    ):  # fmt: skip
        yield Recipe, {**digits, **change}
    endpoint = {"endpoint": {"url": "http://a/v1", "model": "m"}}
    judge = {**endpoint, "prompts": "a.txt", "answers": {"a": "hf:x", "b": "given"}, "sampling": {}, "budget": {}}
    more = {"sampling": {}, "budget": {"prices": {"m": {"input": 1, "output": 1}}},
            "quality": {"decontaminate": {"path": "x"}}, "best": {"by": "judge"}}  # fmt: skip
    for kind in ("answer", "conversation", "evolve", "self-instruct"):
        generate = {"kind": kind, "prompts": "a.txt", **endpoint, **more}
        yield EndpointRecipe, {"generate": generate, "judge": judge}


def test_no_wrong_value_shows_the_words_of_pydantic() -> None:
    """Every key of the examples, and every other key of their sections, gets every wrong value."""
    refused, done = 0, set()
    for root, raw in examples():
        prepared = copy.deepcopy(raw)
        paths = dict.fromkeys(
            [*keys(raw), *((*path, name) for path in keys(raw) for name in names_below(root, path))]
        )
        for path in (path for path in paths if path not in done):
            done.add(path)
            for value in WRONG:
                changed = copy.deepcopy(prepared)
                section = changed
                for part in path[:-1]:
                    if not isinstance(section.get(part), dict):
                        section[part] = {}
                    section = section[part]
                section[path[-1]] = value
                try:
                    build_recipe(changed, default_name="r") if root is Recipe else root(name="r", **changed)
                except ConfigError as error:
                    refused += 1
                    seen = [words for words in OF_PYDANTIC if words in str(error)]
                else:
                    seen = []
                assert not seen, (path, value, seen)
    assert refused > 1500


def names_below(root: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """The fields of all sections that the key at ``path`` can hold."""
    found: list[Any] = [root]
    for part in path:
        found = [s for m in found if part in m.model_fields for s in sections(m.model_fields[part].annotation)]
    return [name for section in found for name in section.model_fields]


def sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [s for part in getattr(annotation, "__args__", ()) for s in sections(part)]


TYPES = {
    "bool": ["bool_type"], "dict": ["dict_type"], "list": ["list_type"], "str": ["string_type"],
    "int": ["int_type"], "float": ["float_type"], "model": ["model_type"], "literal": ["literal_error"],
    "tagged-union": ["model_attributes_type", "union_tag_invalid", "union_tag_not_found"], "none": ["none_required"],
    "any": [], "callable": [], "default": [], "definitions": [], "definition-ref": [], "function-after": [],
    "function-before": [], "function-wrap": [], "model-field": [], "model-fields": [], "nullable": [], "union": [],
    "tuple": [],
}  # fmt: skip
LIMITS = {
    "gt": "greater_than", "ge": "greater_than_equal", "lt": "less_than", "le": "less_than_equal",
    "min_length": "too_short", "max_length": "too_long", "allow_inf_nan": "finite_number",
    "pattern": "string_pattern_mismatch",
}  # fmt: skip


def test_every_error_type_of_the_schemas_has_words() -> None:
    def walk(schema: Any) -> Iterator[str]:
        if isinstance(schema, list | tuple):
            for part in schema:
                yield from walk(part)
        elif isinstance(schema, dict):
            if isinstance(kind := schema.get("type"), str):
                yield from TYPES[kind]
                yield from (error for key, error in LIMITS.items() if key in schema)
            yield from (
                found
                for key, part in schema.items()
                if key not in ("metadata", "function", "cls", "ref", "config")
                for found in walk(part)
            )

    def all_sections(section: type[Section]) -> Iterator[type[Section]]:
        yield section
        for below in section.__subclasses__():
            yield from all_sections(below)

    kinds = {found for section in all_sections(Section) for found in walk(section.__pydantic_core_schema__)}
    assert len(kinds) > 12
    for kind in kinds - {"literal_error"}:
        context = dict.fromkeys(("gt", "ge", "lt", "le", "min_length", "max_length", "expected_tags"), 1.0)
        details: Any = {"type": kind, "msg": "Input should be X", "ctx": context}
        words = must_be(ErrorDetails(**details))
        assert "X" not in words, f"{kind} has no words in {sorted(EXPECTED)}"
        assert "{" not in words
