"""``workflow: assistant-chain``: from a large teacher to a small student through models of sizes between."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from tutelage.config import AssistantChainConfig, ModelConfig, Recipe, dump_recipe
from tutelage.data import Data
from tutelage.errors import ConfigError
from tutelage.experiment.measure import parameters
from tutelage.experiment.run import model_spec
from tutelage.models import build
from tutelage.multistage.stages import (
    ResultRow,
    StageRunner,
    best_of,
    conclude,
    result_of,
    signed,
    weights_of,
    with_trained_weights,
)

FAMILIES: dict[tuple[str, str], tuple[str, Any]] = {
    ("convnet", "width"): ("widths", (32, 64, 128)),
    ("resnet", "width"): ("widths", (16, 32, 64)),
    ("mlp", "width"): ("hidden", (64,)),
    ("convnet", "depth"): ("depth", 2),
    ("resnet", "depth"): ("blocks", 1),
}
"""For a model and a family, the option that makes it larger, with its default."""


def assistant_chain(stages: StageRunner, device: torch.device) -> dict[str, Any]:
    """Teach assistants from the largest to the smallest, then the student, and compare with teaching it directly.

    Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant" (AAAI 2020), section 4.
    """
    recipe, asked = stages.recipe, stages.recipe.workflow
    assert isinstance(asked, AssistantChainConfig)
    teacher = yaml.safe_load(dump_recipe(recipe))["teacher"]
    many = len(recipe.seeds)
    alone: list[dict[str, Any]] = []
    straight: list[dict[str, Any]] = []
    known: dict[str, int] = {}
    taught_first = None
    if asked.direct:
        direct = stages.stage("direct")
        teacher, taught_first = with_trained_weights(teacher, direct.path), direct
        alone = [result_of(direct, f"baseline-seed{s}") for s in recipe.seeds] if recipe.baseline else []
        straight = [result_of(direct, f"distilled-seed{s}") for s in recipe.seeds]
    data = stages.data(recipe)
    models = [*chosen(recipe, asked, data, stages.terminal.say), recipe.student]
    chain: list[list[dict[str, Any]]] = [[] for _ in models]
    folders: list[tuple[Path, str]] = []
    for seed in recipe.seeds:
        above: dict[str, Any] = teacher
        for i, model in enumerate(models):
            last = i == len(models) - 1
            name = "student" if last else f"assistant-{i + 1}"
            if last and i == 0 and asked.direct:  # no assistant: the student is taught directly already
                chain[i].append(straight[recipe.seeds.index(seed)])
                folders.append((stages.path("direct"), f"distilled-seed{seed}"))
                continue
            stage = stages.stage(
                f"seed{seed}/{name}", teacher=above, student=model.model_dump(mode="json", exclude_none=True),
                seeds=[seed], baseline=False,
            )  # fmt: skip
            if taught_first is None:
                taught_first = stage
                teacher = with_trained_weights(teacher, stage.path)
            training = f"distilled-seed{seed}"
            chain[i].append(result_of(stage, training))
            known[name] = stage.summary["parameters"]["student"]
            above = {"model": model.model, "options": model.options, "checkpoint": weights_of(stage.path, training)}
            if recipe.required_teacher.cache is not None:  # an assistant's word is another's: a folder of its own
                above["cache"] = {k: v for k, v in teacher["cache"].items() if k != "path"}
            if last:
                folders.append((stage.path, training))
    assert taught_first is not None
    whole = taught_first.summary["teacher"]
    as_result = {k: whole[k] for k in ("accuracy", "loss", "ece")}
    whole = {"best": as_result, "last": as_result, "validation": whole["validation"]}
    sizes = {"teacher": taught_first.summary["parameters"]["teacher"], **known}
    student = known.get("student", taught_first.summary["parameters"]["student"])
    rows = [ResultRow("teacher", "teacher", [whole] * many, sizes["teacher"], step=0)]
    for i, results in enumerate(chain[:-1]):
        by = f"assistant {i}" if i else "teacher"
        rows.append(
            ResultRow(f"assistant {i + 1}", "assistant", results, known[f"assistant-{i + 1}"], by, step=i + 1)
        )
    if alone:
        rows.append(ResultRow("baseline student", "baseline", alone, student))
    if straight:
        rows.append(ResultRow("taught directly", "direct", straight, student, "teacher",
                        against=["baseline student"] if alone else []))  # fmt: skip
    if len(models) > 1:
        against = [name for name, there in (("taught directly", straight), ("baseline student", alone)) if there]
        rows.append(
            ResultRow("taught through assistants", "distilled", chain[-1], student, f"assistant {len(models) - 1}",
                against=against, step=len(models))
        )  # fmt: skip
    best = folders[best_of(chain[-1])]
    return conclude(stages, "assistant-chain", rows, _verdict, best, ratio=student / sizes["teacher"])


def chosen(recipe: Recipe, asked: AssistantChainConfig, data: Data, say: Callable[[str], None]) -> list[ModelConfig]:
    """The assistants, from the largest to the smallest; none where the student is large enough.

    Raises:
        ConfigError: ``auto``, and the student's model has no such family, or there is no size between.
    """
    if asked.assistants is not None:
        return asked.assistants
    kind = recipe.student.model
    members = recipe.required_teacher.each
    teacher = sum(_size(one, data) for one in members)
    student = _size(recipe.student, data)
    many = needed(student / teacher, asked.ratio)
    shown = f"the student has {student:,} of the teacher's {teacher:,} parameters, a ratio of {student / teacher:.4f}"
    if many == 0:
        say(f"{shown}: no assistant is needed above {asked.ratio}")
        return []
    family = FAMILIES.get((kind, asked.family))
    if family is None:
        kinds = ", ".join(f"{asked.family} of {name}" for name, what in FAMILIES if what == asked.family)
        raise ConfigError(
            f"no sizes between are known for {asked.family} of {kind}",
            where="workflow.assistants",
            remedy=f"list the assistants; known: {kinds}",
        )
    found: list[ModelConfig] = []
    seen = {student, teacher}
    for i in range(1, many + 1):
        target = teacher * (student / teacher) ** (i / (many + 1))
        model = resized(recipe.student, family, target, data)
        size = _size(model, data)
        if size not in seen and student < size < teacher:
            found.append(model)
            seen.add(size)
    if not found:
        raise ConfigError(
            f"{shown}, and {asked.family} of {kind} gives no size between",
            where="workflow.family",
            remedy="try the other family, or list the assistants",
        )
    sizes = ", ".join(f"{_size(model, data):,}" for model in found)
    say(f"{shown}: through assistants of {sizes} parameters")
    return found


def needed(ratio: float, least: float) -> int:
    """How many assistants make each step at least ``least``: the smallest k with ratio ** (1 / (k + 1)) >= least.

    Args:
        ratio: the student's parameters over the teacher's.
        least: the same of a student and its own teacher, in (0, 1).
    """
    if ratio >= least:
        return 0
    return math.ceil(math.log(ratio) / math.log(least) - 1e-9) - 1


def resized(model: ModelConfig, family: tuple[str, Any], target: float, data: Data) -> ModelConfig:
    """The model with the option of its family larger, so that it has ``target`` parameters, or nearly."""
    option, default = family
    base = model.options.get(option, default)

    def at(factor: float) -> ModelConfig:
        def scale(value: int) -> int:
            return max(1, round(value * factor))

        value = [scale(v) for v in base] if isinstance(base, Sequence) else scale(base)
        return ModelConfig(model=model.model, options={**model.options, option: value})

    low, high = 1.0, 2.0
    while _size(at(high), data) < target and high < 1e6:
        high *= 2
    for _ in range(30):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _size(at(middle), data) < target else (low, middle)
    return min((at(low), at(high)), key=lambda m: abs(math.log(_size(m, data) / target)))


def _size(model: ModelConfig, data: Data) -> int:
    with torch.device("meta"):
        return parameters(build(model_spec(model, data), data.classes, where="workflow.assistants"))


def _verdict(rows: Mapping[str, Any]) -> str:
    through, direct = rows.get("taught through assistants"), rows.get("taught directly")
    if through is None:
        return "The student is large enough for its teacher; there was no assistant."
    if direct is None:
        return f"Taught through assistants: {100 * through['best']['accuracy']['mean']:.2f} %."
    gain = through["against"]["taught directly"]["best"]
    if gain["low"] is None:
        found = "one seed only"
    elif gain["low"] > 0:
        found = "the chain is better than the teacher itself"
    elif gain["high"] < 0:
        found = "the chain is worse than the teacher itself"
    else:
        found = "no difference shown"
    return f"Through assistants {signed(gain)} over taught directly: {found}."
