"""Layers that are computed once more in the backward pass, in place of keeping what is between them."""

from __future__ import annotations

from typing import Any

from torch import nn

from tutelage.errors import CapabilityError


def enable_gradient_checkpointing(student: nn.Module) -> None:
    """Let a model of transformers compute its layers again in the backward pass.

    Raises:
        CapabilityError: it is of another kind.
    """
    model: Any = getattr(student, "model", student) if hasattr(student, "weights_prefix") else student
    older = getattr(model, "gradient_checkpointing_enable", None)  # transformers has called it both
    enable = getattr(model, "activation_checkpointing_enable", older)
    if not callable(enable) or not getattr(model, "supports_gradient_checkpointing", False):
        raise CapabilityError(
            f"{type(student).__name__} cannot compute its layers again",
            where="train.gradient_checkpointing",
            remedy="leave it out; it is for models of transformers",
        )
    # Not re-entrant: in that one what is tapped inside a layer would get no gradient.
    enable({"use_reentrant": False})
