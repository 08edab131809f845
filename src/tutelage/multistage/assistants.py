"""``workflow: assistant-chain``: from a large teacher to a small student through models of sizes between them."""

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
from tutelage.experiment.recipe_source import model_spec
from tutelage.experiment.teacher_setup import checkpoint_path, with_trained_weights
from tutelage.models import build
from tutelage.multistage.stages import ResultRow, StageRunner, best_of, format_gain, load_result, write_summary

DIRECT, THROUGH_ASSISTANTS, BASELINE = "distilled directly", "distilled through assistants", "baseline student"
"""Names of rows."""

FAMILIES: dict[tuple[str, str], tuple[str, Any]] = {
    ("convnet", "width"): ("widths", (32, 64, 128)),
    ("resnet", "width"): ("widths", (16, 32, 64)),
    ("mlp", "width"): ("hidden", (64,)),
    ("convnet", "depth"): ("depth", 2),
    ("resnet", "depth"): ("blocks", 1),
}
"""For a model and a family the option that makes the model larger, with its default."""


def assistant_chain(stages: StageRunner, device: torch.device) -> dict[str, Any]:
    """Train assistants from the largest to the smallest, then the student, and compare with direct distillation.

    Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant" (AAAI 2020), section 4.
    """
    recipe, config = stages.recipe, stages.recipe.workflow
    assert isinstance(config, AssistantChainConfig)
    teacher = yaml.safe_load(dump_recipe(recipe))["teacher"]
    baseline: list[dict[str, Any]] = []
    direct: list[dict[str, Any]] = []
    first = None
    if config.direct:
        first = stages.run_stage("direct")
        teacher = with_trained_weights(teacher, first.path)
        baseline = [load_result(first, f"baseline-seed{s}") for s in recipe.seeds] if recipe.baseline else []
        direct = [load_result(first, f"distilled-seed{s}") for s in recipe.seeds]
    models = [*choose_assistants(recipe, config, stages.data(recipe), stages.terminal.say), recipe.student]
    chain: list[list[dict[str, Any]]] = [[] for _ in models]
    sizes: dict[str, int] = {}
    folders: list[tuple[Path, str]] = []
    for seed, training in ((seed, f"distilled-seed{seed}") for seed in recipe.seeds):
        if len(models) == 1 and config.direct:  # without assistants the student is the directly distilled one
            chain[0].append(direct[recipe.seeds.index(seed)])
            folders.append((stages.path("direct"), training))
            continue
        current: dict[str, Any] = teacher
        for i, model in enumerate(models):
            name = "student" if i == len(models) - 1 else f"assistant-{i + 1}"
            student = model.model_dump(mode="json", exclude_none=True)
            stage = stages.run_stage(
                f"seed{seed}/{name}", teacher=current, student=student, seeds=[seed], baseline=False
            )
            if first is None:
                first, teacher = stage, with_trained_weights(teacher, stage.path)
            chain[i].append(load_result(stage, training))
            sizes[name] = stage.summary["parameters"]["student"]
            checkpoint = checkpoint_path(stage.path, training)
            current = {"model": model.model, "options": model.options, "checkpoint": checkpoint}
            if recipe.required_teacher.cache is not None:  # each teacher has a cache folder of its own
                current["cache"] = {k: v for k, v in teacher["cache"].items() if k != "path"}
        folders.append((stage.path, training))
    assert first is not None
    teacher_size = first.summary["parameters"]["teacher"]
    student_size = sizes.get("student", first.summary["parameters"]["student"])
    scores = first.summary["teacher"]
    test = {k: scores[k] for k in ("accuracy", "loss", "ece")}
    teacher_result = {"best": test, "last": test, "validation": scores["validation"]}
    rows = [ResultRow("teacher", "teacher", [teacher_result] * len(recipe.seeds), teacher_size, step=0)]
    for i, results in enumerate(chain[:-1], 1):
        of = f"assistant {i - 1}" if i > 1 else "teacher"
        rows.append(ResultRow(f"assistant {i}", "assistant", results, sizes[f"assistant-{i}"], of, step=i))
    if baseline:
        rows.append(ResultRow(BASELINE, "baseline", baseline, student_size))
    against = [BASELINE] if baseline else []
    if direct:
        rows.append(ResultRow(DIRECT, "direct", direct, student_size, "teacher", against))
        against = [DIRECT, *against]
    if len(models) > 1:
        of, step = f"assistant {len(models) - 1}", len(models)
        rows.append(ResultRow(THROUGH_ASSISTANTS, "distilled", chain[-1], student_size, of, against, step))
    best = folders[best_of(chain[-1])]
    return write_summary(stages, "assistant-chain", rows, _verdict, best, ratio=student_size / teacher_size)


def choose_assistants(
    recipe: Recipe, config: AssistantChainConfig, data: Data, say: Callable[[str], None]
) -> list[ModelConfig]:
    """The assistants, from the largest to the smallest; none if the student is large enough."""
    if config.assistants is not None:
        return config.assistants
    kind = recipe.student.model
    teacher = sum(_size(one, data) for one in recipe.required_teacher.each)
    student = _size(recipe.student, data)
    ratio = student / teacher
    count = count_assistants(ratio, config.ratio)
    sizes = f"the student has {student:,} of the teacher's {teacher:,} parameters, a ratio of {ratio:.4f}"
    if count == 0:
        say(f"{sizes}: no assistant is needed above {config.ratio}")
        return []
    family = FAMILIES.get((kind, config.family))
    if family is None:
        known = ", ".join(f"{config.family} of {name}" for name, of in FAMILIES if of == config.family)
        raise ConfigError(
            f"no sizes between are known for {config.family} of {kind}", where="workflow.assistants",
            remedy=f"list the assistants; known: {known}",
        )  # fmt: skip
    assistants: dict[int, ModelConfig] = {}
    for i in range(1, count + 1):
        model = resize(recipe.student, family, teacher * ratio ** (i / (count + 1)), data)
        size = _size(model, data)
        if student < size < teacher:
            assistants.setdefault(size, model)
    if not assistants:
        raise ConfigError(
            f"{sizes}, and {config.family} of {kind} gives no size between", where="workflow.family",
            remedy="try the other family, or list the assistants",
        )  # fmt: skip
    say(f"{sizes}: through assistants of {', '.join(f'{size:,}' for size in assistants)} parameters")
    return list(assistants.values())


def count_assistants(ratio: float, minimum: float) -> int:
    """The smallest k with ``ratio ** (1 / (k + 1)) >= minimum``: so many assistants make each step at least that.

    ``ratio`` is the student's parameters over the teacher's; ``minimum`` is in (0, 1).
    """
    if ratio >= minimum:
        return 0
    return math.ceil(math.log(ratio) / math.log(minimum) - 1e-9) - 1


def resize(model: ModelConfig, family: tuple[str, Any], target: float, data: Data) -> ModelConfig:
    """The model with the option of its family enlarged so that it has about ``target`` parameters."""
    option, default = family
    base = model.options.get(option, default)

    def scaled(factor: float) -> ModelConfig:
        value = [max(1, round(v * factor)) for v in (base if isinstance(base, Sequence) else [base])]
        options = {**model.options, option: value if isinstance(base, Sequence) else value[0]}
        return ModelConfig(model=model.model, options=options)

    low, high = 1.0, 2.0
    while _size(scaled(high), data) < target and high < 1e6:
        high *= 2
    for _ in range(30):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _size(scaled(middle), data) < target else (low, middle)
    return min((scaled(low), scaled(high)), key=lambda m: abs(math.log(_size(m, data) / target)))


def _size(model: ModelConfig, data: Data) -> int:
    with torch.device("meta"):
        return parameters(build(model_spec(model, data), data.classes, where="workflow.assistants"))


def _verdict(rows: Mapping[str, Any]) -> str:
    if THROUGH_ASSISTANTS not in rows:
        return "The student is large enough for its teacher; there was no assistant."
    row = rows[THROUGH_ASSISTANTS]
    if DIRECT not in rows:
        return f"Distilled through assistants: {100 * row['best']['accuracy']['mean']:.2f} %."
    gain = row["against"][DIRECT]["best"]
    if gain["low"] is None:
        conclusion = "one seed only"
    elif gain["low"] > 0:
        conclusion = "the chain is better than direct distillation"
    elif gain["high"] < 0:
        conclusion = "the chain is worse than direct distillation"
    else:
        conclusion = "no significant difference"
    return f"Through assistants {format_gain(gain)} over direct distillation: {conclusion}."
