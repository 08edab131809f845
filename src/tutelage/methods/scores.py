"""Sums of objectives on the scores of a large vocabulary, some positions at a time.

Scores ``[N, V]`` of all positions never exist: a part's are made, compared, turned into gradients of the head and of
what went into it, and dropped. Nothing is computed twice, which a gradient checkpoint would have to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tutelage.taps import Head

CHUNK = 1 << 24
"""Most scores of a vocabulary that exist at a time, for each of teacher and student."""


class Asked(NamedTuple):
    """An objective on some of the positions.

    Attributes:
        rows: ``[N]``, true where it counts.
        loss: (scores ``[n, V]``, their places ``[n]`` among the N) -> the sum over them.
    """

    rows: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]


def sums_of_scores(head: Head, asked: Sequence[Asked], *, chunk: int = CHUNK) -> tuple[Tensor, ...]:
    """The sum of each objective over its positions; values and gradients are those of all scores at once.

    Args:
        head: of the student; its inputs are ``[N, D]``.
        asked: the objectives, on the same N positions.
        chunk: most scores at a time.

    Returns:
        A scalar for each, float32 or more. Gradients flow to what is in ``head``, and not twice.
    """
    sums: tuple[Tensor, ...] = _Sums.apply(head.inputs, head.weight, head.bias, asked, chunk, torch.is_grad_enabled())
    return sums


class _Sums(torch.autograd.Function):
    """Gradients are made in the forward pass, where the scores are, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        asked: Sequence[Asked],
        chunk: int,
        learns: bool,
    ) -> tuple[Tensor, ...]:
        values = [_empty(inputs.new_zeros(())) for _ in asked]
        needed = [x if learns and need else None for x, need in zip((inputs, weight, bias), ctx.needs_input_grad[:3],
                                                                    strict=True)]  # fmt: skip
        gradients = [[None if x is None else _empty(x) for x in needed] for _ in asked]
        size = max(chunk // len(weight), 1)
        for start in range(0, len(inputs), size):
            part = inputs[start : start + size]
            scores = F.linear(part, weight, bias)
            for i, one in enumerate(asked):
                places = one.rows[start : start + size].nonzero().flatten()
                if not len(places):
                    continue
                own = scores if len(places) == len(scores) else scores[places]
                with torch.enable_grad():
                    leaf = own.detach().requires_grad_(learns)
                    value = one.loss(leaf, places + start)
                values[i] += value.detach()
                if learns:
                    (slope,) = torch.autograd.grad(value, leaf)
                    _add(gradients[i], slope, part if own is scores else part[places], weight, places + start)
        ctx.gradients = gradients
        ctx.dtypes = [None if x is None else x.dtype for x in (inputs, weight, bias)]
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *scales: Tensor) -> tuple[Any, ...]:
        found: list[Tensor | None] = []
        for k, dtype in enumerate(ctx.dtypes):
            parts = [own[k] * scale for own, scale in zip(ctx.gradients, scales, strict=True) if own[k] is not None]
            found.append(torch.stack(parts).sum(0).to(dtype) if parts else None)
        return (*found, None, None, None)


def _empty(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _add(into: list[Tensor | None], slope: Tensor, inputs: Tensor, weight: Tensor, places: Tensor) -> None:
    """Add the gradients of some positions to those of inputs ``[N, D]``, weight ``[V, D]`` and bias ``[V]``."""
    # float16 has no room for the slopes of a large vocabulary, which no loss scale has made larger yet
    with torch.autocast(slope.device.type, enabled=False):
        dtype = torch.float32 if slope.dtype == torch.float16 else slope.dtype
        slope = slope.to(dtype)
        if into[0] is not None:
            into[0].index_add_(0, places, (slope @ weight.to(dtype)).to(into[0].dtype))
        if into[1] is not None:
            into[1] += slope.mT @ inputs.to(dtype)
        if into[2] is not None:
            into[2] += slope.sum(0)
