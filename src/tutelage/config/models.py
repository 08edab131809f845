"""The section that names a model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from tutelage.config.base import Section, suggest

MODELS = ("convnet", "mlp", "resnet", "timm:NAME", "torchvision:NAME", "hf:ID", "package.module:callable")
"""What ``model`` can be."""


def known_model(name: str) -> str:
    """``name``; raises ``ValueError`` where no model can be called so."""
    kind, _, rest = name.partition(":")
    if name not in MODELS[:3] and not (kind and rest):
        raise ValueError(f"unknown model {name!r}{suggest(name, MODELS)}; allowed: {', '.join(MODELS)}")
    return name


ModelName = Annotated[str, AfterValidator(known_model)]
"""The name of a model."""


class ModelConfig(Section):
    """A model by name."""

    model: ModelName
    """``mlp``, ``convnet``, ``resnet``, ``timm:NAME``, ``torchvision:NAME``, ``hf:ID`` or ``pkg.module:callable``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the model's constructor."""
    checkpoint: str | None = None
    """Weights: a safetensors file, a torch file readable with ``weights_only``, or a folder that a run exported."""
