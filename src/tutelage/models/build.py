"""From a model's name to a module."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from tutelage.errors import MissingDependencyError, ModelError, nearest, require, suggest
from tutelage.models.pretrained import load_pretrained
from tutelage.models.small import MLP, ConvNet, ResNet

ZOO: dict[str, Callable[..., nn.Module]] = {"convnet": ConvNet, "mlp": MLP, "resnet": ResNet}
"""Our own small networks."""


@dataclass(frozen=True)
class ModelSpec:
    """Enough to build a model again.

    Attributes:
        model: ``convnet``, ``mlp``, ``resnet``, ``timm:NAME``, ``torchvision:NAME``, ``hf:ID``,
            ``package:NAME/FOLDER`` or ``package.module:callable``.
        options: for the constructor.
        classes: number of classes.
        channels: channels of the images.
        size: height and width of the images.
        task: what a transformers model is to do: ``images``, or a task of texts.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    classes: int = 0
    channels: int = 3
    size: int = 0
    task: str = "images"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def build(spec: ModelSpec, classes: list[str] | None = None, where: str = "model") -> nn.Module:
    """The module that ``spec`` describes.

    Args:
        spec: what to build.
        classes: class names, which a Hugging Face model keeps in its config.
        where: the recipe's key, for error messages.

    Raises:
        ModelError: unknown name, or options that the constructor refuses.
        MissingDependencyError: the name needs an extra.
    """
    kind, colon, name = spec.model.partition(":")
    try:
        if spec.model in ZOO:
            return ZOO[spec.model](classes=spec.classes, channels=spec.channels, size=spec.size, **spec.options)
        if colon and kind in _LIBRARIES:
            return _LIBRARIES[kind](name, spec, classes)
        if (colon and "." in kind) or (colon and importlib.util.find_spec(kind) is not None):
            return _callable(kind, name, spec)
    except (ModelError, MissingDependencyError) as error:
        raise type(error)(error.what, where=where, remedy=error.remedy) from None
    except (
        TypeError,
        ValueError,
        RuntimeError,
        OSError,
        AttributeError,
        KeyError,
        ImportError,
        SyntaxError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot build {spec.model!r} with options {spec.options}: {reason}",
            where=where,
            remedy=_signature(spec.model, spec.options),
        ) from None
    names = [*ZOO, "timm:NAME", "torchvision:NAME", "hf:ID", "package:NAME/FOLDER", "package.module:callable"]
    raise ModelError(
        f"unknown model {spec.model!r}" + suggest(spec.model, names),
        where=where,
        remedy=f"allowed: {', '.join(names)}",
    )


def _signature(model: str, options: dict[str, Any]) -> str:
    if model.startswith("hf:") or "pretrained" in options:
        return "check its name, its options and the network; HF_HUB_OFFLINE=1 allows only what is on disk"
    if model not in ZOO:
        return "check its name and options"
    fixed = {"classes", "channels", "size", "self"}
    known = [p for p in inspect.signature(ZOO[model]).parameters if p not in fixed]
    return f"options of {model}: {', '.join(known)}"


def _timm(name: str, spec: ModelSpec, classes: list[str] | None) -> nn.Module:
    require("timm", "vision", f"the model timm:{name}")
    import timm

    if not timm.is_model(name.split(".")[0]):
        raise ModelError(
            f"timm has no model {name!r}", remedy=f"nearest: {', '.join(nearest(name, timm.list_models())) or 'none'}"
        )
    model: nn.Module = timm.create_model(name, num_classes=spec.classes, in_chans=spec.channels, **spec.options)
    return model


def _torchvision(name: str, spec: ModelSpec, classes: list[str] | None) -> nn.Module:
    require("torchvision", "vision", f"the model torchvision:{name}")
    from torchvision import models

    if name not in (known := models.list_models(module=models)):
        raise ModelError(
            f"torchvision has no classifier {name!r}", remedy=f"nearest: {', '.join(nearest(name, known)) or 'none'}"
        )
    if spec.channels != 3:
        raise ModelError(
            f"torchvision:{name} takes 3 channels, the images have {spec.channels}",
            remedy=f"timm:{name} takes any number of channels",
        )
    model: nn.Module = models.get_model(name, num_classes=spec.classes, **spec.options)
    return model


def _huggingface(name: str, spec: ModelSpec, classes: list[str] | None) -> nn.Module:
    return load_pretrained(spec.model, spec.task, classes, spec.options)


_LIBRARIES: dict[str, Callable[[str, ModelSpec, list[str] | None], nn.Module]] = {
    "hf": _huggingface,
    "package": _huggingface,
    "timm": _timm,
    "torchvision": _torchvision,
}


def _callable(module: str, name: str, spec: ModelSpec) -> nn.Module:
    try:
        factory = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"no module {error.name!r}", remedy="the folder it is in must be on PYTHONPATH, or the package installed"
        ) from None
    except AttributeError:
        known = [n for n in vars(importlib.import_module(module)) if not n.startswith("_")]
        raise ModelError(
            f"{module} has no {name!r}", remedy=f"nearest: {', '.join(nearest(name, known)) or 'none'}"
        ) from None
    takes = inspect.signature(factory).parameters
    facts = {"classes": spec.classes, "num_classes": spec.classes, "channels": spec.channels, "size": spec.size}
    built = factory(**{**{k: v for k, v in facts.items() if k in takes}, **spec.options})
    if not isinstance(built, nn.Module):
        raise ModelError(
            f"{module}:{name} returned a {type(built).__name__}", remedy="it must return a torch.nn.Module"
        )
    return built


def label_names(model: nn.Module) -> list[str] | None:
    """The class names that a model carries, in the order of its logits; ``None`` where it has none."""
    table = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(table, dict) or not table:
        return None
    names = [str(table[key]) for key in sorted(table, key=int)]
    return None if all(n == f"LABEL_{i}" for i, n in enumerate(names)) else names
