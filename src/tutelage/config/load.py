"""From YAML and overrides to a checked recipe, and back."""

import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tutelage.config.base import LocatedSection, Section
from tutelage.config.data import DATA_KINDS, TEACHER_ONLY_TASKS, kind_of
from tutelage.config.generate import GENERATE_KINDS
from tutelage.config.judge import EndpointRecipe
from tutelage.config.lines import Key, Place, parse_yaml, yaml_remedy
from tutelage.config.messages import Source, explain
from tutelage.config.methods import METHOD_KINDS
from tutelage.config.methods.losses import SOFT_OF_TASK
from tutelage.config.multistage import WORKFLOW_KINDS
from tutelage.config.own_paths import read_own_paths
from tutelage.config.recipe import Recipe
from tutelage.errors import ConfigError, nearest, shorten, suggest
from tutelage.safe_yaml import load_yaml

Checked = TypeVar("Checked", bound=LocatedSection)

SHORTHANDS = {"data": "source", "teacher": "model", "student": "model", "method": "kind", "workflow": "kind"}
TRAIN_SHORTHANDS = {"optimizer": "kind", "schedule": "kind"}


def _expand(raw: dict[str, Any]) -> None:
    """Expand shorthands in place: ``data: digits`` is ``data: {source: digits}``."""

    def expand(section: Any, table: dict[str, str]) -> None:
        if isinstance(section, dict):
            for key, field in table.items():
                if isinstance(section.get(key), str):
                    section[key] = {field: section[key]}

    expand(raw, SHORTHANDS)
    expand(raw.get("train"), TRAIN_SHORTHANDS)
    workflow = raw.get("workflow")
    assistants = workflow.get("assistants") if isinstance(workflow, dict) else None
    if isinstance(assistants, list):
        assistants[:] = [{"model": model} if isinstance(model, str) else model for model in assistants]
    if isinstance(raw.get("teacher"), dict):
        expand(raw["teacher"].get("train"), TRAIN_SHORTHANDS)
        members = raw["teacher"].get("members")
        for i, member in enumerate(members if isinstance(members, list) else []):
            if isinstance(member, str):
                members[i] = {"model": member}
            elif isinstance(member, dict):
                expand(member.get("train"), TRAIN_SHORTHANDS)


KINDS: dict[str, Mapping[str, type[Section]]] = {
    "data": DATA_KINDS, "generate": GENERATE_KINDS, "method": METHOD_KINDS, "workflow": WORKFLOW_KINDS,
}  # fmt: skip
"""The classes of sections that have a ``kind``."""

BUDGETS = {"epochs": "steps", "steps": "epochs"}
"""Two keys for the length of a training: an override of one replaces the other."""

DASHES = ("-", "\N{EN DASH}", "\N{EM DASH}")


def _named(text: str) -> str:
    """How messages show an override. The value of an endpoint's key may be a secret."""
    return (
        f"override {text.partition('=')[0] + '=...' if text.startswith(('generate.', 'judge.')) else shorten(text)}"
    )


def _override(raw: dict[str, Any], text: str) -> Key:
    """Apply one override and return its key."""
    key, equals, value = text.partition("=")
    where = _named(text)
    if not equals or not all(key.split(".")) or key.startswith(DASHES):
        bare = text.lstrip("".join(DASHES))
        example = bare if "=" in bare else f"{bare}=VALUE" if bare != text else "method.temperature=8"
        raise ConfigError("not of the form key=value", where=where, remedy=f"for example {example[:80]}")
    try:
        parsed, _ = load_yaml(value)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"the value is not YAML: {problem}", where=where, remedy=yaml_remedy(problem)) from None
    except ConfigError as error:
        raise ConfigError(error.what, where=where, remedy=error.remedy) from None
    except (RecursionError, ValueError, AttributeError, TypeError, LookupError):
        raise ConfigError("the value is not YAML", where=where, remedy="quote it: name='a: b'") from None
    if key == "seed":
        key, parsed = "seeds", [parsed]
    *path, last = key.split(".")
    section: Any = raw
    for i, part in enumerate(path):
        section = section.setdefault(part, {})
        if section is None or not isinstance(section, dict):
            raise ConfigError(
                f"{shorten('.'.join(path[: i + 1]))} is not a section that holds keys",
                where=where,
                remedy="override all of it: KEY=VALUE",
            )
    if parsed is not None and last in BUDGETS:
        section.pop(BUDGETS[last], None)
    section[last] = parsed
    _expand(raw)
    return (*path, last)


def _has_weights(teacher: dict[str, Any]) -> bool:
    """Whether a teacher without a checkpoint comes with weights of its own."""
    if isinstance(teacher.get("trained"), bool):
        return bool(teacher["trained"])
    options = teacher.get("options")
    options = options if isinstance(options, dict) else {}
    return teacher["model"].startswith(("hf:", "package:")) or bool(
        options.get("pretrained") or options.get("weights")
    )


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        if "kind" in over and over["kind"] != base.get("kind"):
            keep = {k: v for k, v in base.items() if k in ("lr", "weight_decay", "decay_vectors", "warmup")}
            return {**keep, **over}
        merged = {k: v for k, v in base.items() if not (k in BUDGETS and BUDGETS.keys() & over.keys())}
        return {**merged, **{k: _merge(base.get(k), v) for k, v in over.items()}}
    return over


def _plan_training(teacher: dict[str, Any], base: Any) -> None:
    """Complete in place the training of the teacher, or of each member, if it has no weights."""
    members = teacher.get("members")
    if isinstance(members, list) and teacher.get("model") is None:
        base = _merge(base, teacher.pop("train", None) or {})
    for one in members if isinstance(members, list) else [teacher]:
        if isinstance(one, dict) and one.get("checkpoint") is None and isinstance(one.get("model"), str):
            own = one.get("train")
            if own is not None or not _has_weights(one):
                one["train"] = _merge(base, own or {})


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override, check and resolve a recipe.

    Args:
        path: the YAML file.
        overrides: ``key=value`` with dots between sections and a YAML value; ``seed=1`` stands for ``seeds=[1]``.

    Raises:
        ConfigError: names the file, line, key, what was given and what is allowed.
    """
    raw, lines, default_name = _read(Path(path))
    return build_recipe(raw, lines, name=str(path), default_name=default_name, overrides=overrides)


def load_endpoint_recipe(
    path: str | Path, overrides: Iterable[str], section: Literal["generate", "judge"]
) -> EndpointRecipe:
    """The sections ``generate`` and ``judge`` of a recipe, which may hold nothing else; ``section`` is required.

    Raises:
        ConfigError: names the file, line, key, what was given and what is allowed.
    """
    raw, lines, default_name = _read(Path(path))
    source = _prepare(raw, lines, str(path), default_name, overrides)
    if section not in raw:
        raise ConfigError(
            f"has no section {section!r}", where=source.name,
            remedy=f"add a section {section!r}; recipes/alpaca-smollm2.yaml shows one",
        )  # fmt: skip
    if not raw.keys() & {"data", "student"}:
        return _validate(EndpointRecipe, raw, source)
    recipe = _validate(Recipe, raw, source)
    part = EndpointRecipe(name=recipe.name, generate=recipe.generate, judge=recipe.judge)
    part._source = source
    return part


def _read(path: Path) -> tuple[dict[str, Any], dict[Key, int], str]:
    """A recipe's mapping, the lines of its keys, and its default name."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("no such recipe", where=str(path), remedy=_similar_recipe(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot be read: {reason}", where=str(path), remedy="give a YAML file") from None
    raw, lines = parse_yaml(text, str(path))
    raw = read_own_paths(raw, path.parent)
    default_name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "recipe"
    return raw, lines, default_name


def _similar_recipe(path: Path) -> str:
    """The remedy for a recipe that does not exist."""
    name = path.name.removesuffix(".yaml")
    if (Path("recipes") / f"{name}.yaml").is_file():
        return f"did you mean recipes/{name}.yaml?"
    if (resources.files("tutelage") / "recipes" / f"{name}.yaml").is_file():
        return f"this recipe of the package has to be written first: tutelage recipes {name} --out {name}.yaml"
    folder = path.parent if path.parent.is_dir() else Path()
    close = nearest(str(path), [str(p) for p in folder.glob("*.y*ml")])
    return f"did you mean {close[0]}?" if close else "give the path of a YAML file; `tutelage recipes` lists examples"


def build_recipe(
    raw: dict[str, Any],
    lines: Mapping[Key, int] | None = None,
    *,
    name: str = "recipe",
    default_name: str | None = None,
    overrides: Iterable[str] = (),
) -> Recipe:
    """A checked recipe from a mapping.

    Args:
        raw: the mapping; changed in place: shorthands are expanded.
        lines: of its keys in a file, for error messages.
        name: of the file, for error messages.
        default_name: the name of a recipe without ``name``.
        overrides: ``key=value``, as of :func:`load_recipe`.

    Raises:
        ConfigError: names the file, line, key, what was given and what is allowed.
    """
    return _validate(Recipe, raw, _prepare(raw, lines, name, default_name, overrides))


def _prepare(
    raw: dict[str, Any],
    lines: Mapping[Key, int] | None,
    name: str,
    default_name: str | None,
    overrides: Iterable[str],
) -> Source:
    """Expand shorthands and apply overrides in place; returns the places of the keys."""
    places: dict[Key, Place] = dict(lines or {})
    overrides, both = list(overrides), {"seed", "seeds"}
    if both <= raw.keys() or both <= {text.partition("=")[0] for text in overrides}:
        second = [_named(text) for text in overrides if text.startswith("seed=")]
        raise ConfigError(
            "both 'seed' and 'seeds' are given",
            where=Source(name, places).where(("seed",)) if both <= raw.keys() else second[0],
            remedy="give one; 'seeds' takes a list",
        )
    if "seed" in raw:
        raw["seeds"] = [raw.pop("seed")]
        if ("seed",) in places:
            places["seeds",] = places["seed",]
    _expand(raw)
    for text in overrides:
        key = _override(raw, text)
        places = {k: v for k, v in places.items() if k[: len(key)] != key}
        places[key] = _named(text)
    if default_name is not None:
        raw.setdefault("name", default_name)
    if isinstance(raw.get("method"), dict):
        raw["method"].setdefault("kind", "logit")
    if isinstance(raw.get("data"), dict):
        raw["data"].setdefault("kind", kind_of(raw["data"]))
    set_task_defaults(raw)
    return Source(name, places)


def _validate(model: type[Checked], raw: dict[str, Any], source: Source) -> Checked:
    """The mapping as ``model``; raises :class:`ConfigError` with a message for each problem."""
    for key, known in KINDS.items():
        section = raw.get(key)
        kind = section.get("kind") if isinstance(section, dict) else None
        if isinstance(section, dict) and (not isinstance(kind, str) or kind not in known):
            raise ConfigError(
                f"unknown {key} {shorten(kind)}{suggest(str(kind), known)}",
                where=source.where((key, "kind")),
                remedy=f"allowed: {', '.join(known)}",
            )
    teacher = raw.get("teacher")
    if isinstance(teacher, dict):
        _plan_training(teacher, raw.get("train", {}))
    try:
        checked = model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, model, raw, source)) from None
    checked._source = source
    return checked


def set_task_defaults(raw: dict[str, Any]) -> None:
    """Set in place the defaults that depend on the task of the data."""
    data, method = raw.get("data"), raw.get("method")
    task = data.get("task", "classes") if isinstance(data, dict) else "classes"
    soft = SOFT_OF_TASK.get(str(task))
    if soft is not None and isinstance(method, dict) and method.get("kind") in ("logit", "feature"):
        method.setdefault("soft", soft)
    if task in TEACHER_ONLY_TASKS:  # no labels to train a baseline on
        raw.setdefault("baseline", False)


def dump_recipe(recipe: BaseModel) -> str:
    """The resolved recipe as YAML that :func:`load_recipe` reads back to the same."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested mappings."""
    keys: list[str] = []
    for key in [*a, *(k for k in b if k not in a)]:
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            keys += differing_keys(x, y, f"{prefix}{key}.")
        elif x != y:
            keys.append(f"{prefix}{key}")
    return keys
