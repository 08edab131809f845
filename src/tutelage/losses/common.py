"""What every loss shares: precision, masking and reduction, each in one place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, ParamSpec

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]

P = ParamSpec("P")


def precise(objective: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """``objective`` with autocast off: its matrix products stay in the precision they come in."""

    @functools.wraps(objective)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        student = args[0] if args else kwargs.get("student")
        if not isinstance(student, Tensor):
            raise TypeError(f"student must be a tensor, not {type(student).__name__}")
        with torch.autocast(student.device.type, enabled=False):
            return objective(*args, **kwargs)

    return call


def as_float(x: Tensor) -> Tensor:
    """``x`` in the precision that losses work in: float32, or float64 where that came in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


# ------------------------------------------------------------------- checks


def check_pair(student: Tensor, teacher: Tensor) -> None:
    """Raise ``ValueError`` unless student and teacher have the same shape."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape: "
            "a loss that broadcast them would compare every row with every other. "
            "Select the classes they share, or project the student first."
        )


def check_batch(student: Tensor, teacher: Tensor) -> None:
    """Raise ``ValueError`` unless both have a first dimension, and of the same length."""
    if not student.ndim or not teacher.ndim or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must hold the same examples, "
            "one per entry of the first dimension: pass both for the same batch"
        )


def check_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """``mask`` as booleans; raises ``ValueError`` when it is not of ``shape``."""
    if mask.shape != shape:
        raise ValueError(
            f"mask {tuple(mask.shape)} must have the shape of the examples, {tuple(shape)}: one entry for each row"
        )
    return mask.bool()


def check_labels(labels: Tensor, student: Tensor) -> None:
    """Raise ``ValueError`` unless there is one label for each row of ``student``."""
    if labels.shape != student.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} must be one class index for each row of logits, "
            f"{tuple(student.shape[:-1])}"
        )


def check_temperature(temperature: float) -> float:
    """``temperature``; raises ``ValueError`` unless it is above 0."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0 (1 leaves logits as they are)")
    return temperature


def check_choice(name: str, given: str, *allowed: str) -> str:
    """``given``; raises ``ValueError`` unless it is one of ``allowed``."""
    if given not in allowed:
        raise ValueError(f"{name}={given!r}: allowed are {', '.join(map(repr, allowed))}")
    return given


# ------------------------------------------------------------------ masking


def hide(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` with zeros in the rows that ``mask``, over its leading dimensions, leaves out.

    Zeros, and not a multiplication of the result, because a masked row may hold
    anything, NaN included, and 0 * NaN is NaN in the gradient too.
    """
    if mask is None:
        return x
    hidden = ~check_mask(mask, x.shape[: mask.ndim])
    return x.masked_fill(hidden.view(*mask.shape, *[1] * (x.ndim - mask.ndim)), 0.0)


def rows(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Student and detached teacher in working precision, masked rows replaced by zeros.

    Args:
        student: ``[..., C]``.
        teacher: the same shape.
        mask: ``[...]``, true where the row counts; ``None`` counts all.

    Raises:
        ValueError: the shapes differ, or the mask's is not that of the leading dimensions.
    """
    check_pair(student, teacher)
    if mask is not None:
        mask = check_mask(mask, student.shape[:-1])
    return hide(as_float(student), mask), hide(as_float(teacher).detach(), mask)


def batch_rows(student: Tensor, teacher: Tensor, mask: Tensor | None, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """``[N, D]`` student and detached teacher for a relation, masked rows deleted.

    Args:
        student: ``[B, ...]``; all but the first dimension is flattened.
        teacher: ``[B, ...]``, of any other width.
        mask: ``[B]``, true where the row counts.
        reduction: what the caller asked for.

    Raises:
        ValueError: other batch size, mask of another shape, ``reduction="none"`` or unknown.
    """
    check_relation(reduction)
    check_batch(student, teacher)
    student, teacher = as_float(student), as_float(teacher).detach()
    if mask is not None:
        mask = check_mask(mask, student.shape[:1])
        student, teacher = student[mask], teacher[mask]
    return per_example(student), per_example(teacher)


def check_relation(reduction: Reduction) -> None:
    """Raise ``ValueError`` unless ``reduction`` is one that a relation can have."""
    if reduction == "none":
        raise ValueError(
            "reduction='none': this loss compares relations between the rows of a batch, "
            "so that no row has a value of its own; use 'mean' or 'sum'"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: allowed are 'mean' and 'sum'")


def per_example(x: Tensor, leading: int = 1) -> Tensor:
    """``x`` with everything after its ``leading`` dimensions flattened into one."""
    return x.unsqueeze(-1).flatten(leading)


# ---------------------------------------------------------------- reduction


def reduce(value: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduce one value per example, ``[...]``, over the examples that count.

    ``mean`` divides by the number of unmasked examples, at least 1, so that an empty
    or fully masked batch gives a zero that is still connected to the graph.

    Raises:
        ValueError: unknown ``reduction``.
    """
    if mask is not None:
        mask = check_mask(mask, value.shape)
        value = value.masked_fill(~mask, 0.0)
    if reduction == "none":
        return value
    if reduction == "sum":
        return value.sum()
    if reduction == "mean":
        return value.sum() / (max(value.numel(), 1) if mask is None else mask.sum().clamp(min=1))
    raise ValueError(f"reduction={reduction!r}: allowed are 'none', 'mean' and 'sum'")


def reduce_batch(value: Tensor, count: int, reduction: Reduction) -> Tensor:
    """A relation's ``mean``, or its ``sum``: the mean times the ``count`` rows that it is made of.

    So that (sum, count) divides to the mean, as for losses with a value per row.
    """
    return value if reduction == "mean" else value * count


# ------------------------------------------------------- safe normalisations


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """``x / ||x||_2`` along ``dim``; a vector of zeros stays one, with zero gradient.

    Scaled by its largest entry first, so that squares neither overflow nor vanish.
    """
    if not x.shape[dim]:
        return x
    scale = x.detach().abs().amax(dim, keepdim=True)
    # below this, 1 / scale overflows in the gradient
    dead = scale < 16 * torch.finfo(x.dtype).tiny
    x = (x / scale.masked_fill(dead, 1.0)).masked_fill(dead, 0.0)
    return x / x.square().sum(dim, keepdim=True).masked_fill(dead, 1.0).sqrt()


def centre(x: Tensor, dim: int = -1) -> Tensor:
    """``x - mean(x)`` along ``dim``; a constant vector gives zeros, with zero gradient.

    The mean of equal numbers is off by a rounding error, which a division by the
    deviation would blow up to the size of a signal.
    """
    if not x.shape[dim]:
        return x
    centred = x - x.mean(dim, keepdim=True)
    noise = 8 * torch.finfo(x.dtype).eps * x.detach().abs().amax(dim, keepdim=True)
    return centred.masked_fill(centred.detach().abs().amax(dim, keepdim=True) <= noise, 0.0)
