"""Opens the cache of an experiment's teacher outputs, and records everything that they depend on."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutelage.config import CacheConfig, DataConfig, Recipe
from tutelage.data import Batch, Data, TextData
from tutelage.engine import Accelerator, resolve_precision
from tutelage.errors import CapabilityError
from tutelage.experiment.measure import fingerprint, short_hash
from tutelage.experiment.prepare import all_needs
from tutelage.experiment.spec import ModelTeacher
from tutelage.experiment.teacher_setup import inference_facts
from tutelage.methods import Method
from tutelage.students import feature_shapes
from tutelage.taps import Needs, evaluating, observe, output_head
from tutelage.teachers import CachedTeacher, Layout, RemoteTeacher

FOLDER = Path("runs") / "cache"


def open_recipe_cache(
    recipe: Recipe,
    data: Data,
    teacher: ModelTeacher | RemoteTeacher,
    classes: int,
    method: Method,
    accelerator: Accelerator,
) -> CachedTeacher:
    """The cache of a recipe's teacher outputs, new or existing."""
    config = recipe.required_teacher.cache
    assert config is not None
    if isinstance(teacher, RemoteTeacher):
        layout = Layout("topk", classes, config.dtype, teacher.k, temperatures=(1.0,), tokens=True)
    else:
        example = data.test.fetch(torch.zeros(1, dtype=torch.int64))
        layout = cache_layout(config, example, teacher, classes, method)
    return open_cache(config, recipe.name, recipe_provenance(recipe, data, teacher), layout, teacher, accelerator)


def cache_layout(config: CacheConfig, example: Batch, teacher: ModelTeacher, classes: int, method: Method) -> Layout:
    """What a cache stores for each row, as the method needs it; ``example`` is a batch of one sample."""
    needs = all_needs(method)
    if needs.head and config.keep != "hidden" and not method.takes_sparse:
        raise CapabilityError(
            f"the method needs the teacher's output head, and the cache keeps {config.keep} logits",
            remedy="set teacher.cache.keep: hidden, or leave the cache out",
        )
    if config.keep == "hidden":
        check_head_is_exact(teacher.model, example.for_teacher())
    tokens = example.labels.ndim == 2
    shapes = feature_shapes(teacher.model, example.for_teacher(), needs.hidden)
    default = [] if needs.temperature is None else [needs.temperature]
    return Layout(
        keep=config.keep if needs.logits or needs.head else None,
        classes=classes,
        dtype=config.dtype,
        k=min(config.k, classes),
        draws=config.draws,
        head=min(config.head, classes - 1),
        temperatures=() if config.keep in ("dense", "hidden") else tuple(config.temperatures or default),
        hidden={tap: shape[2 if tokens else 1 :] for tap, shape in shapes.items()},
        power=config.power,
        width=output_head(teacher.model).in_features if config.keep == "hidden" else 0,
        tokens=tokens,
    )


def check_head_is_exact(model: nn.Module, example: Batch) -> None:
    """Raise :class:`CapabilityError` if a model's logits cannot be computed from the inputs of its output head."""
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        head = observe(model, example.to(device).inputs, Needs(logits=False, head=True)).head
    assert head is not None
    if head.is_dense:
        raise CapabilityError(
            f"the logits of the teacher, a {type(model).__name__}, are not its output layer with a scale and a soft "
            "cap that its config names; they cannot be computed from the inputs of that layer",
            where="teacher.cache.keep",
            remedy="set keep to dense, topk or stochastic_rounding",
        )


def open_cache(
    config: CacheConfig,
    name: str,
    made_from: dict[str, Any],
    layout: Layout,
    teacher: ModelTeacher | RemoteTeacher,
    accelerator: Accelerator,
) -> CachedTeacher:
    """The cache of a teacher's outputs, new or existing; ``made_from`` is everything that a row depends on."""
    text = json.dumps([made_from, layout.to_dict()], sort_keys=True)
    path = config.path or FOLDER / f"{name}-{short_hash(text)[:12]}"
    return CachedTeacher(
        Path(path), layout, made_from, teacher, device=accelerator.device, rank=accelerator.process_index
    )


def teacher_provenance(teacher: ModelTeacher, **facts: Any) -> dict[str, Any]:
    """What a teacher in this process computes its outputs from, as JSON."""
    runs = inference_facts(teacher) | facts
    return fingerprint(teacher.model) | ({"runs": runs} if runs else {})


def recipe_provenance(recipe: Recipe, data: Data, teacher: ModelTeacher | RemoteTeacher) -> dict[str, Any]:
    """Everything that a row of the cache depends on, as JSON."""
    routes = {"routes": [recipe.data.route, data.route_names]} if data.route_names else {}
    if isinstance(teacher, RemoteTeacher):  # its address and its longest input do not matter
        who: dict[str, Any] = {"served": {k: v for k, v in teacher.facts.items() if k != "longest"}}
    else:
        who = teacher_provenance(teacher, **routes)
    template = getattr(getattr(data, "tokenizer", None), "chat_template", None)
    if isinstance(recipe.data, DataConfig):
        own: dict[str, Any] = {"image_column": recipe.data.image_column}
    else:
        assert isinstance(data, TextData)
        own = {"task": data.task, **data.settings}
    return {
        "teacher": who,
        "data": {
            "source": recipe.data.source,
            "options": {k: str(v) for k, v in recipe.data.options.items()},
            **own,
        },
        "preprocessing": _preprocessing(data) | ({"chat_template": short_hash(str(template))} if template else {}),
        "augment": recipe.data.augment,
        "views": recipe.data.views if data.train.is_augmented else None,
        # an image that is mixed with others depends on which others there are
        "rows": short_hash(data.train.ids.numpy().tobytes()) if data.train.mix_augments else None,
        "precision": resolve_precision(recipe.train.precision),
    }


def _preprocessing(data: Data) -> dict[str, Any]:
    """What the teacher's inputs depend on: its own preprocessing; with augmentation also the student's size."""
    if isinstance(data, TextData):
        return data.preprocessing()
    train = data.train
    members = [each.to_dict() for each in train.teachers or (train.preprocessing,)]
    shared = train.is_augmented and len(train.geometries) > 1
    return {"teacher": members, **({"augmented_with": train.preprocessing.geometry.to_dict()} if shared else {})}
