"""Build a module from the name that a recipe gives."""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from tutelage.errors import MissingDependencyError, ModelError, first_line, nearest, require, shorten, suggest
from tutelage.models.pretrained import load_pretrained, names_in
from tutelage.models.small import MLP, ConvNet, ResNet

ZOO: dict[str, Callable[..., nn.Module]] = {"convnet": ConvNet, "mlp": MLP, "resnet": ResNet}
"""The small networks of this package."""


@dataclass(frozen=True)
class ModelSpec:
    """The arguments that build a model.

    Attributes:
        model: ``convnet``, ``mlp``, ``resnet``, ``timm:NAME``, ``torchvision:NAME``, ``hf:ID``,
            ``package:NAME/FOLDER`` or ``package.module:callable``.
        options: for the constructor.
        classes: number of classes.
        channels: channels of the images.
        size: height and width of the images.
        task: of a transformers model: ``images``, or a text task.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    classes: int = 0
    channels: int = 3
    size: int = 0
    task: str = "images"

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def build(spec: ModelSpec, classes: list[str] | None = None, where: str = "model") -> nn.Module:
    """The module that ``spec`` describes.

    Args:
        spec: what to build.
        classes: class names for the config of a Hugging Face model.
        where: key of the recipe, for error messages.

    Raises:
        ModelError: the name is unknown, or the constructor rejects the options.
        MissingDependencyError: the model needs an extra.
    """
    kind, colon, name = spec.model.partition(":")
    try:
        if spec.model in ZOO:
            return ZOO[spec.model](classes=spec.classes, channels=spec.channels, size=spec.size, **spec.options)
        if colon and kind in ("hf", "package"):
            return load_pretrained(spec.model, spec.task, classes, spec.options)
        if colon and kind in ("timm", "torchvision"):
            return _timm(name, spec) if kind == "timm" else _torchvision(name, spec)
        if (colon and "." in kind) or (colon and importlib.util.find_spec(kind) is not None):
            return _callable(kind, name, spec)
    except (ModelError, MissingDependencyError) as error:
        error.where = where
        raise
    except (TypeError, ValueError, RuntimeError, OSError, AttributeError, LookupError, ImportError,
            SyntaxError) as error:  # fmt: skip
        known, remedy = _known_options(spec.model), "check its name and options"
        if spec.model.startswith("hf:") or "pretrained" in spec.options:
            remedy = "check its name, its options and the network; with HF_HUB_OFFLINE=1 only local files are used"
        elif known:
            remedy = f"options of {spec.model}: {', '.join(known)}"
        what = f"cannot build {spec.model!r} with options {shorten(spec.options)}: {first_line(error)}"
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown[1] in spec.options and where.endswith(".model"):
            where = f"{where.removesuffix('.model')}.options.{unknown[1]}"
            what = f"{spec.model} has no option {unknown[1]!r}{suggest(unknown[1], known)}"
        raise ModelError(what, where=where, remedy=remedy) from None
    names = [*ZOO, "timm:NAME", "torchvision:NAME", "hf:ID", "package:NAME/FOLDER", "package.module:callable"]
    raise ModelError(
        f"unknown model {spec.model!r}" + suggest(spec.model, names),
        where=where,
        remedy=f"allowed: {', '.join(names)}",
    )


def _known_options(model: str) -> list[str]:
    """The options of a network of this package; none for other models."""
    parameters = inspect.signature(ZOO[model]).parameters if model in ZOO else ()
    return [name for name in parameters if name not in ("classes", "channels", "size")]


def _nearest(name: str, known: list[str]) -> str:
    return f"nearest: {', '.join(nearest(name, known)) or 'none'}"


def _timm(name: str, spec: ModelSpec) -> nn.Module:
    require("timm", "vision", f"the model timm:{name}")
    import timm

    if name.partition(":")[0] not in ("local-dir", "hf-hub", "hf_hub") and not timm.is_model(name.split(".")[0]):
        raise ModelError(f"timm has no model {name!r}", remedy=_nearest(name, timm.list_models()))
    model: nn.Module = timm.create_model(name, num_classes=spec.classes, in_chans=spec.channels, **spec.options)
    card: Any = getattr(model, "pretrained_cfg", {})
    if spec.options.get("pretrained") and card.get("num_classes") != spec.classes:
        heads = card.get("classifier") or ()
        new = [p for head in ([heads] if isinstance(heads, str) else heads) for p in _parameters_of(model, head)]
        model.fresh = new  # type: ignore[assignment]  # timm leaves the classifier of other classes as it was built
    return model


def _parameters_of(model: nn.Module, path: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.startswith(f"{path}.")]


def _torchvision(name: str, spec: ModelSpec) -> nn.Module:
    require("torchvision", "vision", f"the model torchvision:{name}")
    from torchvision import models

    if name not in (known := models.list_models(module=models)):
        raise ModelError(f"torchvision has no classifier {name!r}", remedy=_nearest(name, known))
    if spec.channels != 3:
        raise ModelError(
            f"torchvision:{name} takes 3 channels, the images have {spec.channels}",
            remedy=f"use timm:{name}, which takes any number of channels",
        )
    model: nn.Module = models.get_model(name, num_classes=spec.classes, **spec.options)
    return model


def _callable(module: str, name: str, spec: ModelSpec) -> nn.Module:
    try:
        namespace = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"no module {error.name!r}", remedy="put its folder on PYTHONPATH, or install the package"
        ) from None
    factory = getattr(namespace, name, None)
    if factory is None:
        raise ModelError(
            f"{module} has no {name!r}", remedy=_nearest(name, [n for n in vars(namespace) if not n.startswith("_")])
        )
    parameters = inspect.signature(factory).parameters
    facts = {"classes": spec.classes, "num_classes": spec.classes, "channels": spec.channels, "size": spec.size}
    model = factory(**{**{k: v for k, v in facts.items() if k in parameters}, **spec.options})
    if not isinstance(model, nn.Module):
        raise ModelError(f"{module}:{name} returned a {type(model).__name__}", remedy="return a torch.nn.Module")
    return model


def label_names(model: nn.Module) -> list[str] | None:
    """The class names in the config of a model, in the order of its logits; ``None`` where it has none."""
    config = getattr(model, "config", None)
    return names_in(config) if getattr(config, "id2label", None) else None
