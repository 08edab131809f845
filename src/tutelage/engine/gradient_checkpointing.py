"""Gradient checkpointing: activations are recomputed in the backward pass instead of stored."""

from __future__ import annotations

from typing import Any

from torch import nn

from tutelage.errors import CapabilityError


def enable_gradient_checkpointing(student: nn.Module) -> None:
    """Turn on gradient checkpointing in a model of transformers."""
    model: Any = getattr(student, "model", student) if hasattr(student, "weights_prefix") else student
    older = getattr(model, "gradient_checkpointing_enable", None)  # transformers uses both names
    enable = getattr(model, "activation_checkpointing_enable", older)
    if not callable(enable) or not getattr(model, "supports_gradient_checkpointing", False):
        raise CapabilityError(
            f"{type(student).__name__} does not support gradient checkpointing",
            where="train.gradient_checkpointing",
            remedy="leave it out; it works for models of transformers",
        )
    # Not re-entrant: that variant gives no gradient to activations that are tapped inside a layer.
    enable({"use_reentrant": False})
