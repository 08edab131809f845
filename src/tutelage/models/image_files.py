"""What the files of an image model say about the images that it reads."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutelage.errors import ModelError, first_line
from tutelage.files import silence_transformers
from tutelage.models.pretrained import resolve_source

CARD = "model.json"


@dataclass(frozen=True)
class ImageFiles:
    """What the files of a model say about its images.

    Attributes:
        source: the file, for messages.
        entries: those of our own card, if the model has one.
        pipeline: else the library's own pipeline: a PIL image in RGB -> ``[3, H, W]``.
        candidates: geometries, one of which may give what the pipeline gives.
    """

    source: str
    entries: Mapping[str, Any] | None = None
    pipeline: Callable[[Any], Any] | None = None
    candidates: list[dict[str, Any]] = field(default_factory=list)


def read_image_files(model: str, options: Mapping[str, Any], checkpoint: str | None) -> ImageFiles | None:
    """The preprocessing in the files that a model's weights come with; ``None`` if no file describes any.

    Args:
        model: as a recipe names it.
        options: for its constructor.
        checkpoint: a file or folder of weights.

    Raises:
        ModelError: the files cannot be read.
    """
    if checkpoint is not None:
        path = Path(checkpoint)
        if (files := _read_card(path if path.is_dir() else path.parent)) is not None:
            return files
    kind, _, name = model.partition(":")
    if kind == "timm":
        return _read_timm(name, options)
    if kind == "torchvision" and options.get("weights") is not None:
        return _read_torchvision(name, options["weights"])
    if kind in ("hf", "package"):
        source = resolve_source(model)[0]
        return _read_card(Path(source)) or _read_huggingface(model, source)
    return None


def _read_card(folder: Path) -> ImageFiles | None:
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a broken card is reported where the model is loaded
        return None
    entries = card.get("preprocessing") if isinstance(card, dict) else None
    return ImageFiles(str(path), entries) if isinstance(entries, dict) and "mean" in entries else None


def _read_timm(name: str, options: Mapping[str, Any]) -> ImageFiles | None:
    import timm
    from timm.models import _hub
    from timm.models._builder import resolve_pretrained_cfg

    if not options.get("pretrained"):
        return None
    source, _, place = name.partition(":")
    given = options.get("pretrained_cfg")
    try:
        if source == "local-dir":
            given, name, _ = _hub.load_model_config_from_path(place)
        elif source in ("hf-hub", "hf_hub"):
            given, name, _ = _hub.load_model_config_from_hf(place)
        else:
            name, _, tag = name.partition(".")
            given = given or tag or None
        config = resolve_pretrained_cfg(name, given, options.get("pretrained_cfg_overlay")).to_dict()
    except (OSError, ValueError, RuntimeError, KeyError, AssertionError, AttributeError) as error:
        raise ModelError(f"timm:{name}: {first_line(error)}", remedy="check its name and options") from None
    size = {"img_size": options["img_size"]} if isinstance(options.get("img_size"), int) else {}
    return _timm_pipeline(f"the pretrained_cfg of timm:{name}", timm.data.resolve_data_config(size, config))


def _timm_pipeline(source: str, config: Mapping[str, Any]) -> ImageFiles:
    from timm.data import create_transform

    fit = {"squash": "squash", "border": "pad"}.get(config["crop_mode"], "crop")
    resize = math.floor(config["input_size"][-1] / config["crop_pct"])
    candidate = {"fit": fit, "resize": resize, "interpolation": config["interpolation"]}
    return ImageFiles(source, pipeline=create_transform(**config, is_training=False), candidates=[candidate])


def _read_torchvision(name: str, given: Any) -> ImageFiles:
    from torchvision.models import get_model_weights, get_weight

    try:
        weights = get_weight(given) if "." in str(given) else get_model_weights(name)[given]
    except (ValueError, KeyError, AttributeError):
        known = ", ".join(w.name for w in get_model_weights(name))
        raise ModelError(
            f"torchvision:{name} has no weights {str(given)[:80]!r}", remedy=f"it has: {known}"
        ) from None
    transforms: Any = weights.transforms()
    candidate = {"resize": transforms.resize_size[0], "interpolation": transforms.interpolation.value}
    return ImageFiles(f"the transforms of {weights}", pipeline=transforms, candidates=[candidate])


def _read_huggingface(model: str, source: str) -> ImageFiles | None:
    from transformers import AutoImageProcessor
    from transformers.utils import cached_file

    known = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    names = ("preprocessor_config.json", "processor_config.json")
    name = next((name for name in names if cached_file(source, name, **known)), None)
    if name is None and not _is_timm_folder(source, known):
        return None
    try:
        with silence_transformers():
            processor: Any = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(
            f"the image processor of {model} cannot be loaded: {first_line(error)}",
            remedy=f"repair {name}, or remove it: its images are then read as the recipe's data section says",
        ) from None
    if (config := getattr(processor, "data_config", None)) is not None:
        return _timm_pipeline(f"the config.json of {model}", config)

    def pipeline(image: Any) -> Any:
        return processor(images=[image], return_tensors="pt")["pixel_values"][0]

    return ImageFiles(f"{name} of {model} ({type(processor).__name__})", None, pipeline, _geometries(processor))


def _is_timm_folder(source: str, known: dict[str, bool]) -> bool:
    from transformers.utils import cached_file

    path = cached_file(source, "config.json", **known)
    return path is not None and "pretrained_cfg" in json.loads(Path(path).read_text(encoding="utf-8"))


def _geometries(processor: Any) -> list[dict[str, Any]]:
    """The geometries that an image processor of transformers may mean by its settings."""
    size: Any = getattr(processor, "size", None) or {}
    sides = {int(side) for k in ("shortest_edge", "height") if (side := getattr(size, k, None))}
    share = getattr(processor, "crop_pct", None)
    sides |= {int(side / share) for side in sides if share} | {int(256 / 224 * side) for side in sides}
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
    resample = getattr(processor, "resample", 2)
    interpolation = names.get(int(resample)) if isinstance(resample, int) else getattr(resample, "value", None)
    backend = "torchvision" if getattr(processor, "backend", "pil") == "torchvision" else "pillow"
    return [
        {"fit": fit, "resize": side, "interpolation": interpolation, "backend": backend, "centre": "floor"}
        for side in sorted(sides)
        for fit in ("crop", "squash")
        if interpolation is not None
    ]
