"""Helpers that all losses share: precision, checks, masking, reduction and safe normalisation."""

import functools
from collections.abc import Callable
from typing import Literal, ParamSpec

import torch
from torch import Tensor

from tutelage.errors import shorten

Mask = Tensor | None
"""Booleans, true where an example (or token) counts; ``None`` counts all."""

Variant = Literal["paper", "authors"]
"""The formula of the paper, or of the authors' code."""

Reduction = Literal["none", "mean", "sum"]
"""``mean`` and ``sum`` are over the examples that count; ``none`` returns one value per example, 0 where masked."""

P = ParamSpec("P")


def without_autocast(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """``loss`` with autocast disabled: its matrix products keep the precision of its inputs."""

    @functools.wraps(loss)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        student = args[0] if args else kwargs.get("student")
        if not isinstance(student, Tensor):
            raise TypeError(f"student must be a tensor, not {type(student).__name__}")
        with torch.autocast(student.device.type, enabled=False):
            return loss(*args, **kwargs)

    return call


def as_float(x: Tensor) -> Tensor:
    """``x`` in the working precision of losses: float64 if it is float64, else float32.

    Raises ``TypeError`` for complex numbers, which would lose their imaginary part.
    """
    if x.is_complex():
        raise TypeError(f"scores are {x.dtype}: a loss takes real numbers; pass x.real or x.abs()")
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Raise ``ValueError`` unless student and teacher have the same shape."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape: "
            "broadcasting would compare every row with every other row. "
            "Select the classes that both have, or project the student first."
        )


def check_same_batch(student: Tensor, teacher: Tensor) -> None:
    """Raise ``ValueError`` unless both have a first dimension of the same size."""
    if not student.ndim or not teacher.ndim or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must hold the same examples, "
            "one per entry of the first dimension: pass both for the same batch"
        )


def as_booleans(mask: Tensor) -> Tensor:
    """``mask`` of booleans or integers as booleans; raises ``ValueError`` for other numbers."""
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"mask is {mask.dtype}, and a mask is booleans, true where a row counts: pass mask > 0.5; "
            "to weigh rows, multiply the values of reduction='none'"
        )
    return mask.bool()


def check_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """``mask`` as booleans; raises ``ValueError`` unless it has ``shape``."""
    if mask.shape != shape:
        raise ValueError(
            f"mask {tuple(mask.shape)} must have the shape of the examples, {tuple(shape)}: one entry for each row"
        )
    return as_booleans(mask)


def check_temperature(temperature: float) -> float:
    """``temperature``; raises ``ValueError`` unless it is above 0."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0 (1 leaves logits unchanged)")
    return temperature


def check_choice(name: str, value: str, *allowed: str) -> str:
    """``value``; raises ``ValueError`` unless it is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={shorten(value)}: allowed are {', '.join(map(repr, allowed))}")
    return value


def zero_masked(x: Tensor, mask: Mask) -> Tensor:
    """``x`` with zeros in the rows that ``mask`` (over its leading dimensions) excludes.

    The values are replaced, not multiplied by 0: a masked row may contain NaN, and 0 * NaN is NaN, in the gradient
    too.
    """
    if mask is None:
        return x
    excluded = ~check_mask(mask, x.shape[: mask.ndim])
    return x.masked_fill(excluded.view(*mask.shape, *[1] * (x.ndim - mask.ndim)), 0.0)


def float_pair(student: Tensor, teacher: Tensor, mask: Mask, examples: int = -1) -> tuple[Tensor, Tensor]:
    """Student and detached teacher in working precision, with zeros in masked rows.

    ``examples`` is the number of leading dimensions, those of ``mask``, that enumerate examples; -1: all but one.
    """
    if mask is not None:
        mask = check_mask(mask, student.shape[:examples])
    return zero_masked(as_float(student), mask), zero_masked(as_float(teacher).detach(), mask)


def float_rows(student: Tensor, teacher: Tensor, mask: Mask, examples: int = -1) -> tuple[Tensor, Tensor]:
    """:func:`float_pair` of two tensors of one shape; raises ``ValueError`` if the shapes differ."""
    check_same_shape(student, teacher)
    return float_pair(student, teacher, mask, examples)


def batch_rows(student: Tensor, teacher: Tensor, mask: Mask, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """``[N, D]`` student and detached teacher, from ``[B, ...]``, for a loss between rows; masked rows are deleted.

    Raises:
        ValueError: batch sizes differ, the mask has another shape, or ``reduction`` is ``none`` or unknown.
    """
    if reduction == "none":
        raise ValueError(
            "reduction='none': this loss compares relations between the rows of a batch, "
            "so that no row has a value of its own; use 'mean' or 'sum'"
        )
    check_choice("reduction", reduction, "mean", "sum")
    check_same_batch(student, teacher)
    student, teacher = as_float(student), as_float(teacher).detach()
    if mask is not None:
        mask = check_mask(mask, student.shape[:1])
        student, teacher = student[mask], teacher[mask]
    return per_example(student), per_example(teacher)


def per_example(x: Tensor, leading: int = 1) -> Tensor:
    """``x`` with everything after its ``leading`` dimensions flattened into one."""
    return x.unsqueeze(-1).flatten(leading)


def over_elements(x: Tensor, variant: Variant) -> Tensor:
    """One value per example from its elements ``[..., D]``: their sum for ``paper``, their mean for ``authors``."""
    return x.sum(-1) if check_choice("variant", variant, "paper", "authors") == "paper" else x.mean(-1)


def reduce(value: Tensor, mask: Mask, reduction: Reduction) -> Tensor:
    """Reduce one value per example, ``[...]``, over the examples that count.

    ``mean`` divides by the number of unmasked examples, at least 1: an empty or fully masked batch gives a zero that
    is still connected to the graph.
    """
    check_choice("reduction", reduction, "none", "mean", "sum")
    if mask is not None:
        mask = check_mask(mask, value.shape)
        value = value.masked_fill(~mask, 0.0)
    if reduction == "none":
        return value
    if reduction == "sum":
        return value.sum()
    return value.sum() / (max(value.numel(), 1) if mask is None else mask.sum().clamp(min=1))


def reduce_batch(value: Tensor, count: int, reduction: Reduction) -> Tensor:
    """The ``mean`` of a loss between rows, or its ``sum``: the mean times ``count``, the number of rows.

    (sum, count) then divides to the mean, as for losses with a value per row.
    """
    return value if reduction == "mean" else value * count


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """``x / ||x||_2`` along ``dim``; a zero vector stays zero, with zero gradient.

    The vector is scaled by its largest entry first, so that its squares neither overflow nor underflow.
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

    The mean of equal numbers has a rounding error, which a division by the deviation would amplify to the size of a
    signal.
    """
    if not x.shape[dim]:
        return x
    centred = x - x.mean(dim, keepdim=True)
    noise = 8 * torch.finfo(x.dtype).eps * x.detach().abs().amax(dim, keepdim=True)
    return centred.masked_fill(centred.detach().abs().amax(dim, keepdim=True) <= noise, 0.0)
