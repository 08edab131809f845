"""The engine of token losses: scores of a vocabulary for some tokens at a time, and never for all.

A chunk's scores are made, compared, turned into gradients of the head and of what went into it, and dropped. Nothing
is computed twice, which a gradient checkpoint would have to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tutelage.losses.closed_form_grads import LossAndGrad
from tutelage.losses.heads import GradientSums, HeadProjection, LinearHead

CHUNK = {"cpu": 1 << 24}
"""Most scores that exist at a time, for each of student and teacher, by type of device: so many that the head's
gradient is not read and written too often."""
CHUNK_ELSEWHERE = 1 << 28
FEWEST = 128
"""Tokens of a chunk below which matrix products are slow, however large the vocabulary."""
SLAB = 1 << 17
"""HeadProjection that are compared at a time on a CPU, for each of its threads: they stay in its cache."""
SLAB_ELSEWHERE = 1 << 26
"""The same on other devices: enough to keep them busy, and little beside a chunk, in float32 several times over."""

Rows = slice | Tensor
"""Some of N tokens."""


class FewClasses(NamedTuple):
    """A loss at T = 1 whose gradient by the scores is ``q - even``, less ``weights`` at a few classes.

    Attributes:
        value: ``[n]``.
        index: ``[n, k]``.
        weights: ``[n, k]``.
        even: ``[n, 1]``; ``None`` for 0.
    """

    value: Tensor
    index: Tensor  # type: ignore[assignment]
    weights: Tensor
    even: Tensor | None = None


class TokenLoss(NamedTuple):
    """One loss of tokens.

    Attributes:
        mask: ``[N]``, true where it counts; ``None`` counts all.
        open: makes what gives tensors ``[n, ...]`` of a chunk: the teacher's raw scores, or its draws, or labels.
            They are valid until the next chunk. Called once a pass, so that nothing is kept between passes.
        compare: (the student's scores ``[m, V]``, which it leaves as they are, those tensors for the same tokens, and
            whether a gradient is wanted) -> each token's loss, and the gradient by the scores.
        few: the same from the student's log probabilities, for parts of which several share one softmax.
    """

    mask: Tensor | None
    open: Callable[[], Callable[[Rows], tuple[Tensor, ...]]]
    compare: Callable[[Tensor, tuple[Tensor, ...], bool], LossAndGrad]
    few: Callable[[Tensor, tuple[Tensor, ...]], FewClasses] | None = None


@dataclass(frozen=True)
class ChunkedProblem:
    """What is computed, but for the tensors that learn.

    Attributes:
        head: of the student.
        parts: the losses.
        size: of the vocabulary without padding.
        dtype: of the projections; ``None`` for that of the tensors.
        chunk: tokens at a time, or ``None`` for what suits the device.
        each: whether every token's loss is wanted, and not their sum.
    """

    head: LinearHead
    parts: Sequence[TokenLoss]
    size: int
    dtype: torch.dtype | None
    chunk: int | None
    each: bool = False


def chunked_losses(
    problem: ChunkedProblem, hidden: Tensor, weights: Sequence[float | Tensor] | None
) -> tuple[Tensor, ...]:
    """The weighted total of all parts, and then each part, with their gradients.

    Args:
        problem: what to compute.
        hidden: ``[N, D]``.
        weights: by what the parts' sums will be multiplied, up to a common factor, in what is differentiated. If it
            is so, one gradient is made, in the forward pass. If it turns out not to be so, or without weights, it is
            made in the backward pass, for which everything is projected once more.

    Returns:
        The total, a scalar (zero without weights), and the sum of each part, or its values ``[N]`` with
        ``problem.each``; float32 or more.
    """
    given = None if weights is None or problem.each else tuple(weights)
    found: tuple[Tensor, ...] = _Losses.apply(
        problem, given, torch.is_grad_enabled(), hidden, *problem.head.tensors()
    )
    return found


class _Losses(torch.autograd.Function):
    """Gradients are made in the forward pass, where the scores are, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: ChunkedProblem,
        weights: Sequence[float | Tensor] | None,
        learns: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        wanted = tuple(learns and need for need in ctx.needs_input_grad[3:])
        made = weights is not None and any(wanted)
        values, gradients = _go(problem, tensors, weights if made else None, wanted if made else None)
        found = values if problem.each else [value.sum() for value in values]
        total = found[0].new_zeros(())
        for value, weight in zip(found, weights or (), strict=False):
            total = total + value * weight
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.weights, ctx.wanted, ctx.made = problem, weights, wanted, made
        ctx.save_for_backward(*tensors, *gradients)
        return (total, *found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor | None, *by_parts: Tensor | None) -> tuple[Any, ...]:
        asked = [by for by in (by_total, *by_parts) if by is not None]
        if not asked:
            return (None,) * (3 + len(ctx.wanted))
        problem: ChunkedProblem = ctx.problem
        saved = ctx.saved_tensors
        tensors, gradients = saved[:5], saved[5:]
        scale = _common(by_total, by_parts, ctx.weights) if ctx.made else None
        again = _kept_for_more()
        if scale is None:
            zero = asked[0].new_zeros(())
            weights = [zero if by is None else by for by in by_parts]
            if by_total is not None and ctx.weights is not None:
                weights = [by + by_total * weight for by, weight in zip(weights, ctx.weights, strict=True)]
            _, gradients = _go(problem, tensors, weights, ctx.wanted)
        elif not (scale.is_cpu and scale == 1.0):
            gradients = [None if g is None else g * scale if again else g.mul_(scale) for g in gradients]
        if not again:
            ctx.problem = None  # the teacher's word, which else lives as long as the loss does
        found = (None if g is None else g.to(x.dtype) for g, x in zip(gradients, tensors, strict=True))
        return None, None, None, *found


def _go(
    problem: ChunkedProblem,
    tensors: Sequence[Tensor | None],
    weights: Sequence[float | Tensor] | None,
    wanted: Sequence[bool] | None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Values ``[N]`` of each part, and the gradients of their weighted sum; a weight is a scalar, or ``[N]``."""
    hidden, *of_head = tensors
    assert hidden is not None
    with torch.autocast(hidden.device.type, enabled=False):
        scores = HeadProjection(problem.head, of_head, hidden, problem.size, problem.dtype)
        gradients = None if wanted is None else GradientSums(scores, wanted, tensors)
        precise = torch.promote_types(scores.dtype, torch.float32)
        values = [hidden.new_zeros(len(hidden), dtype=precise) for _ in problem.parts]
        take = [part.open() for part in problem.parts]
        slab = SLAB * torch.get_num_threads() if hidden.is_cpu else SLAB_ELSEWHERE
        slab = max(slab // problem.size, 1)
        for rows, which in _chunks(problem, len(hidden), hidden.device):
            raw = scores.project(rows)
            slopes = raw if gradients is None else gradients.slopes(raw)
            taken = {k: take[k](rows) for k in which}
            for start in range(0, len(raw), slab):
                now = slice(start, min(start + slab, len(raw)))
                at, finished = _pick(rows, now), problem.head.finished(raw[now])
                total: Tensor | None = None
                own_of = {k: tuple(x[now] for x in given) for k, given in taken.items()}
                alike = [k for k in taken if problem.parts[k].few is not None]
                if weights is not None and gradients is not None and len(alike) > 1:
                    given = {k: (own_of.pop(k), _column(weights[k], at)) for k in alike}
                    found, total = _together(problem.parts, given, finished.log_softmax(-1))
                    for k, value in found.items():
                        values[k][at] = value
                for k, own in own_of.items():
                    value, slope = problem.parts[k].compare(finished, own, gradients is not None)
                    values[k][at] = value
                    if slope is not None and weights is not None:
                        slope.mul_(_column(weights[k], at))
                        total = slope if total is None else total.add_(slope)
                if total is not None:
                    slopes[now] = problem.head.unfinished_(total, finished)
            if gradients is not None:
                gradients.add(slopes, rows)
    return values, [None] * len(tensors) if gradients is None else gradients.sums


def _together(
    parts: Sequence[TokenLoss], given: dict[int, tuple[tuple[Tensor, ...], float | Tensor]], log_q: Tensor
) -> tuple[dict[int, Tensor], Tensor]:
    """Values of some parts, and the gradient of their weighted sum by the scores; ``log_q`` is used up.

    Args:
        parts: all of them.
        given: of those that are meant what they compare with, and their weight.
        log_q: ``[n, V]``.
    """
    found: dict[int, tuple[FewClasses, float | Tensor]] = {}
    for k, (own, weight) in given.items():
        few = parts[k].few
        assert few is not None
        found[k] = few(log_q, own), weight
    slope = log_q.exp_().mul_(sum(weight for _, weight in found.values()))
    for one, weight in found.values():
        if one.even is not None:
            slope.sub_((one.even * weight).to(slope.dtype))
        slope.scatter_add_(-1, one.index, (one.weights * -weight).to(slope.dtype))
    return {k: one.value for k, (one, _) in found.items()}, slope


def _column(weight: float | Tensor, at: Rows) -> float | Tensor:
    return weight[at].unsqueeze(-1) if isinstance(weight, Tensor) and weight.ndim else weight


def _pick(rows: Rows, some: slice) -> Rows:
    """Of the tokens ``rows`` those at the places ``some``."""
    if isinstance(rows, Tensor):
        return rows[some]
    return slice(rows.start + some.start, rows.start + some.stop)


def _chunks(problem: ChunkedProblem, count: int, device: torch.device) -> Iterator[tuple[Rows, Sequence[int]]]:
    """Tokens that go together, packed, and the parts for which they count: those of a chunk are the same for all."""
    size = problem.chunk or max(CHUNK.get(device.type, CHUNK_ELSEWHERE) // max(problem.size, 1), FEWEST)
    for rows, which in _groups([part.mask for part in problem.parts], count, device):
        length = count if rows is None else len(rows)
        even = -(-length // max(-(-length // size), 1))
        for start in range(0, length, max(even, 1)):
            now = slice(start, min(start + even, length))
            yield (now if rows is None else rows[now]), which


def _groups(
    masks: Sequence[Tensor | None], count: int, device: torch.device
) -> Iterator[tuple[Tensor | None, Sequence[int]]]:
    """Tokens (``None``: all) by the masks that count them."""
    every = range(len(masks))
    if all(mask is None for mask in masks):
        yield None, every
        return
    code = torch.zeros(count, dtype=torch.long, device=device)
    for k, mask in enumerate(masks):
        code += (1 if mask is None else mask.long()) << k
    for one in range(1, 1 << len(masks)):
        rows = (code == one).nonzero().flatten()
        if len(rows):
            yield (None if len(rows) == count else rows), [k for k in every if one >> k & 1]


def _common(
    by_total: Tensor | None, by_parts: Sequence[Tensor | None], weights: Sequence[float | Tensor]
) -> Tensor | None:
    """By what the gradient of the weighted sum is to be multiplied; ``None`` if the parts are weighted otherwise."""
    if by_total is not None and all(by is None for by in by_parts):
        return by_total
    if any(by is None for by in by_parts):
        return None
    ratios = torch.stack([by / weight for by, weight in zip(by_parts, weights, strict=True) if by is not None])
    common = ratios.mean()
    if len(ratios) > 1 and not (ratios - common).abs().max() <= 8 * torch.finfo(ratios.dtype).eps * common.abs():
        return None
    return common if by_total is None else common + by_total


def _kept_for_more() -> bool:
    """Whether this backward pass keeps its graph, so that another may come and find the gradients as they were."""
    try:
        return bool(torch._C._autograd._get_current_graph_task_keep_graph())
    except AttributeError:  # private to torch, which uses it for the same end
        return True
