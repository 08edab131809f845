"""The modules of a model and the shapes of their outputs, from one forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.config import Recipe
from tutelage.data import Batch
from tutelage.errors import ConfigError, ModelError, first_line
from tutelage.experiment.measure import parameters
from tutelage.experiment.prepare import build_teacher
from tutelage.experiment.recipe_source import load_data, recipe_spec
from tutelage.models import ModelSpec, build, load_model
from tutelage.models.files import read_card
from tutelage.progress import Terminal
from tutelage.students import eval_no_grad, find_stages
from tutelage.taps import Needs, observe
from tutelage.taps.tap import contents

ROWS = 3
"""Batch size of the forward pass; a first dimension of this size is printed as B."""

SIZES = {"torchvision": 224, "timm": 224, "hf": 224}
"""Default height and width of images, by library; else 32."""

TOKENS = 16


@dataclass(frozen=True)
class Node:
    """A module and its outputs.

    Attributes:
        path: path of the module; empty for the model itself.
        kind: name of its class.
        parameters: number of parameters, including those of its submodules.
        inside: number of its submodules, at all levels.
        calls: number of its calls.
        outputs: pairs (what a tap adds to the path, shape); one entry for calls with equal outputs.
    """

    path: str
    kind: str
    parameters: int
    inside: int
    calls: int
    outputs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Survey:
    """The modules of one model."""

    title: str
    inputs: str
    nodes: list[Node]
    stages: dict[tuple[int, int], str]


def survey(model: nn.Module, example: Batch, title: str, note: str = "") -> Survey:
    """Run ``model`` once on ``example``, in evaluation mode, and list the outputs of every module.

    Raises:
        ModelError: the model does not take the example.
    """
    rows = len(example.labels)
    given = example.inputs if isinstance(example.inputs, Mapping) else {"": example.inputs}
    shapes = ", ".join(f"{name} {shape(x, rows)}".strip() for name, x in given.items())
    calls: dict[str, list[dict[str, str]]] = {name: [] for name, _ in model.named_modules()}

    def recorder(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[path].append(dict(_items(output, rows)))

        return hook

    handles = [module.register_forward_hook(recorder(path)) for path, module in model.named_modules()]
    try:
        with eval_no_grad(model):
            observe(model, example.inputs, Needs(logits=False))
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError) as error:
        raise ModelError(
            f"does not take {shapes}: {first_line(error)}",
            where=title,
            remedy="give the shape of one input: --shape 3x64x64 for images, --shape 16 for tokens",
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    nodes = [
        Node(path, type(module).__name__, parameters(module),
             sum(1 for _ in module.modules()) - 1, len(calls[path]),
             tuple(_outputs(calls[path])))
        for path, module in model.named_modules()
    ]  # fmt: skip
    return Survey(title, shapes + note, nodes, find_stages(model, example, any_layout=True))


def shape(x: Tensor, rows: int) -> str:
    """``[B, 16, 8, 8]``."""
    return f"[{', '.join('B' if i == 0 and n == rows else str(n) for i, n in enumerate(x.shape))}]"


def _outputs(calls: list[dict[str, str]]) -> list[tuple[str, str]]:
    """One entry per item and call; one per item if all calls agree."""
    if len(calls) < 2:
        return [entry for call in calls for entry in call.items()]
    if all(call == calls[0] for call in calls):
        return [(f"@0 to @{len(calls) - 1}" + key, text) for key, text in calls[0].items()]
    return [(f"@{i}{key}", text) for i, call in enumerate(calls) for key, text in call.items()]


def _items(value: Any, rows: int, depth: int = 3) -> list[tuple[str, str]]:
    """The suffix of a tap for each tensor in ``value``, and its shape, or its type where it is no tensor."""
    if isinstance(value, Tensor):
        return [("", shape(value, rows))]
    inside = contents(value)
    if not inside or not depth:
        return [("", "None" if value is None else f"a {type(value).__name__}")]
    return [(f"[{key}]{rest}", text) for key, x in inside.items() for rest, text in _items(x, rows, depth - 1)]


def survey_recipe(recipe: Recipe, who: tuple[str, ...], terminal: Terminal | None = None) -> list[Survey]:
    """Survey ``student``, ``teacher`` or both of a recipe on three samples of its data.

    Raises:
        TutelageError: the data or a model cannot be loaded.
    """
    data = load_data(recipe, terminal or Terminal())
    spec = recipe_spec(recipe, data)
    example = next(iter(spec.evaluation.test)).rows(0, ROWS)
    surveys = {}
    where = f" ({recipe.data.source})"
    if "student" in who:
        student = spec.source.build_student(recipe.seeds[0])
        surveys["student"] = survey(student, example, f"student: {recipe.student.model}", where)
    teacher = build_teacher(spec) if "teacher" in who else None
    if recipe.teacher is not None and teacher is not None:
        what = recipe.teacher.model or f"ensemble of {len(recipe.teacher.each)}"
        surveys["teacher"] = survey(teacher, example.for_teacher(), f"teacher: {what}", where)
    if not surveys:
        raise ConfigError("the recipe has no teacher", where="teacher", remedy="use --of student")
    return [surveys[name] for name in who if name in surveys]


def survey_model(
    name: str,
    *,
    size: tuple[int, ...] | None = None,
    classes: int | None = None,
    options: dict[str, Any] | None = None,
) -> Survey:
    """Survey a model by its name in recipes, or from the folder of an exported model.

    ``size`` is (channels, height, width) or (tokens,). Default: the model's own, else 3x32x32, and 3x224x224 for the
    models of a library.

    Raises:
        TutelageError: the model is unknown, incomplete, needs an extra, or cannot be built or run.
    """
    channels, side = (size[0], size[-1]) if size and len(size) == 3 else (3, SIZES.get(name.partition(":")[0], 32))
    if Path(name).is_dir():
        for key, given in (("--classes", classes), ("-o", options)):
            if given:
                raise ModelError(f"{key} cannot change a trained model", where=name, remedy="leave it out")
        model = load_model(name)
        own = _own_size(model, read_card(Path(name)).get("spec") or {})
    elif "/" in name and ":" not in name:
        raise ModelError(
            "no such folder", where=name, remedy="give a recipe, the folder of an exported model, or a model's name"
        )
    else:
        with torch.random.fork_rng(devices=[]):
            model = build(ModelSpec(name, options or {}, classes or 10, channels, side))
        own = _own_size(model, {})
    texts = getattr(model, "main_input_name", "") == "input_ids"
    used = size or own or ((TOKENS,) if texts else (channels, side, side))
    origin = "its own size" if own else "the default"
    note = "" if size else f" ({origin}; --shape gives another)"
    inputs: Tensor | dict[str, Tensor] = torch.zeros(ROWS, *used)
    if texts:
        inputs = {"input_ids": torch.ones(ROWS, *used, dtype=torch.long)}
    return survey(model, Batch(inputs, torch.zeros(ROWS, dtype=torch.long)), name, note)


def _own_size(model: nn.Module, spec: Mapping[str, Any]) -> tuple[int, ...] | None:
    """(channels, height, width) from the model card, or from the config of timm or Hugging Face; else ``None``."""
    if spec.get("size"):
        return (spec["channels"], spec["size"], spec["size"])
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if size:
        return (getattr(config, "num_channels", 3), *(size if isinstance(size, (list, tuple)) else (size, size)))
    size = getattr(model, "pretrained_cfg", {}).get("input_size")
    return tuple(size) if size else None
