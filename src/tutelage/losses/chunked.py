"""The engine of token losses: logits over a vocabulary exist for some tokens at a time, never for all.

A chunk's logits are computed, compared, turned into gradients of the head and of its inputs, and dropped. Nothing is
computed twice, as gradient checkpointing would.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tutelage.losses.closed_form_grads import LossAndGrad
from tutelage.losses.common import Mask
from tutelage.losses.heads import GradientSums, HeadProjection, LinearHead

CHUNK = {"cpu": 1 << 24}
"""Most logits of a chunk, for each of student and teacher, by device type: large enough that the head's gradient is
not read and written too often."""
CHUNK_ELSEWHERE = 1 << 28
MIN_TOKENS = 128
"""Tokens of a chunk below which matrix products are slow, however large the vocabulary."""
SLAB = 1 << 17
"""Logits that a CPU compares at a time, per thread: they fit in its cache."""
SLAB_ELSEWHERE = 1 << 26
"""The same on other devices: enough to keep them busy, and small compared to a chunk."""

Rows = slice | Tensor
"""Some of N tokens."""
Weight = float | Tensor
"""A factor of a loss: a scalar, or ``[N]``."""


class SparseTargetLoss(NamedTuple):
    """A loss at T = 1 whose gradient by the logits is ``q - even``, less ``weights`` at a few classes.

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
        mask: ``[N]``.
        open: creates a function that returns the target tensors ``[n, ...]`` of a chunk: the teacher's raw logits,
            its samples, or labels. They are valid until the next chunk. It is called once per pass, so that nothing
            is kept between passes.
        compute: (the student's logits ``[m, V]``, which it does not change, the targets of the same tokens, and
            whether a gradient is required) -> each token's loss, and the gradient by the logits.
        sparse: the same from the student's log-probabilities, for losses that can share one softmax.
    """

    mask: Mask
    open: Callable[[], Callable[[Rows], tuple[Tensor, ...]]]
    compute: Callable[[Tensor, tuple[Tensor, ...], bool], LossAndGrad]
    sparse: Callable[[Tensor, tuple[Tensor, ...]], SparseTargetLoss] | None = None


@dataclass(frozen=True)
class ChunkedProblem:
    """What to compute, without the tensors that are trained.

    Attributes:
        head: of the student.
        parts: the losses.
        size: of the vocabulary without padding.
        dtype: of the projections; ``None`` for that of the tensors.
        chunk: tokens at a time; ``None`` for a size that suits the device.
        per_token: return every token's loss instead of sums.
    """

    head: LinearHead
    parts: Sequence[TokenLoss]
    size: int
    dtype: torch.dtype | None
    chunk: int | None
    per_token: bool = False


def chunked_losses(problem: ChunkedProblem, hidden: Tensor, weights: Sequence[Weight] | None) -> tuple[Tensor, ...]:
    """The weighted total of all parts, and then each part, with their gradients.

    Args:
        problem: what to compute.
        hidden: ``[N, D]``.
        weights: the factors of the sums in the loss that will be differentiated, up to a common factor. If they are
            right, one gradient is computed, in the forward pass. If they are wrong or missing, it is computed in the
            backward pass, which projects everything once more.

    Returns:
        The total, a scalar (zero without weights), and the sum of each part, or its values ``[N]`` with
        ``problem.per_token``; float32 or more.
    """
    known = None if weights is None or problem.per_token else tuple(weights)
    outputs: tuple[Tensor, ...] = _ChunkedLosses.apply(
        problem, known, torch.is_grad_enabled(), hidden, *problem.head.tensors()
    )
    return outputs


class _ChunkedLosses(torch.autograd.Function):
    """Gradients are computed in the forward pass, where the logits are, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, problem: ChunkedProblem, weights: Sequence[Weight] | None, enabled: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        required = tuple(enabled and need for need in ctx.needs_input_grad[3:])
        early = weights is not None and any(required)
        values, gradients = _run(problem, tensors, weights if early else None, required if early else None)
        outputs = values if problem.per_token else [value.sum() for value in values]
        total = outputs[0].new_zeros(())
        for value, weight in zip(outputs, weights or (), strict=False):
            total = total + value * weight
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.weights, ctx.required, ctx.early = problem, weights, required, early
        ctx.save_for_backward(*tensors, *gradients)
        return (total, *outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor | None, *by_parts: Tensor | None) -> tuple[Any, ...]:
        incoming = [by for by in (by_total, *by_parts) if by is not None]
        if not incoming:
            return (None,) * (3 + len(ctx.required))
        saved = ctx.saved_tensors
        tensors, gradients = saved[:5], saved[5:]
        scale = _common_factor(by_total, by_parts, ctx.weights) if ctx.early else None
        keep_graph = _keeps_graph()
        if scale is None:
            zero = incoming[0].new_zeros(())
            weights = [zero if by is None else by for by in by_parts]
            if by_total is not None and ctx.weights is not None:
                weights = [by + by_total * weight for by, weight in zip(weights, ctx.weights, strict=True)]
            _, gradients = _run(ctx.problem, tensors, weights, ctx.required)
        elif not (scale.is_cpu and scale == 1.0):
            gradients = [None if g is None else g * scale if keep_graph else g.mul_(scale) for g in gradients]
        if not keep_graph:
            ctx.problem = None  # the teacher's tensors, which would live as long as the loss does
        cast = (None if g is None else g.to(x.dtype) for g, x in zip(gradients, tensors, strict=True))
        return None, None, None, *cast


def _run(
    problem: ChunkedProblem,
    tensors: Sequence[Tensor | None],
    weights: Sequence[Weight] | None,
    required: Sequence[bool] | None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Values ``[N]`` of each part, and the gradients of their weighted sum."""
    hidden, *of_head = tensors
    assert hidden is not None
    with torch.autocast(hidden.device.type, enabled=False):
        projection = HeadProjection(problem.head, of_head, hidden, problem.size, problem.dtype)
        gradients = None if required is None else GradientSums(projection, required, tensors)
        without_autocast = torch.promote_types(projection.dtype, torch.float32)
        values = [hidden.new_zeros(len(hidden), dtype=without_autocast) for _ in problem.parts]
        readers = [part.open() for part in problem.parts]
        slab = SLAB * torch.get_num_threads() if hidden.is_cpu else SLAB_ELSEWHERE
        slab = max(slab // problem.size, 1)
        for rows, parts in _chunks(problem, len(hidden), hidden.device):
            raw = projection.project(rows)
            grads = raw if gradients is None else gradients.buffer_for(raw)
            targets = {k: readers[k](rows) for k in parts}
            for start in range(0, len(raw), slab):
                here = slice(start, min(start + slab, len(raw)))
                at = (
                    rows[here] if isinstance(rows, Tensor) else slice(rows.start + here.start, rows.start + here.stop)
                )
                logits = problem.head.finish(raw[here])
                total: Tensor | None = None
                own = {k: tuple(x[here] for x in of_part) for k, of_part in targets.items()}
                shared = [k for k in targets if problem.parts[k].sparse is not None]
                if weights is not None and gradients is not None and len(shared) > 1:
                    weighted = {k: (own.pop(k), _column(weights[k], at)) for k in shared}
                    losses, total = _share_softmax(problem.parts, weighted, logits.log_softmax(-1))
                    for k, value in losses.items():
                        values[k][at] = value
                for k, of_part in own.items():
                    value, grad = problem.parts[k].compute(logits, of_part, gradients is not None)
                    values[k][at] = value
                    if grad is not None and weights is not None:
                        grad.mul_(_column(weights[k], at))
                        total = grad if total is None else total.add_(grad)
                if total is not None:
                    grads[here] = problem.head.finish_backward_(total, logits)
            if gradients is not None:
                gradients.add(grads, rows)
    return values, [None] * len(tensors) if gradients is None else gradients.sums


def _share_softmax(
    parts: Sequence[TokenLoss], weighted: dict[int, tuple[tuple[Tensor, ...], Weight]], log_q: Tensor
) -> tuple[dict[int, Tensor], Tensor]:
    """Values of some parts, with their targets and weights, and the gradient of the weighted sum by the logits;
    overwrites ``log_q`` ``[n, V]``."""
    losses: dict[int, tuple[SparseTargetLoss, Weight]] = {}
    for k, (targets, weight) in weighted.items():
        compute = parts[k].sparse
        assert compute is not None
        losses[k] = compute(log_q, targets), weight
    grad = log_q.exp_().mul_(sum(weight for _, weight in losses.values()))
    for loss, weight in losses.values():
        if loss.even is not None:
            grad.sub_((loss.even * weight).to(grad.dtype))
        grad.scatter_add_(-1, loss.index, (loss.weights * -weight).to(grad.dtype))
    return {k: loss.value for k, (loss, _) in losses.items()}, grad


def _column(weight: Weight, at: Rows) -> Weight:
    return weight[at].unsqueeze(-1) if isinstance(weight, Tensor) and weight.ndim else weight


def _chunks(problem: ChunkedProblem, count: int, device: torch.device) -> Iterator[tuple[Rows, Sequence[int]]]:
    """The packed tokens of each chunk, and the parts for which all of them count."""
    size = problem.chunk or max(CHUNK.get(device.type, CHUNK_ELSEWHERE) // max(problem.size, 1), MIN_TOKENS)
    for rows, parts in _groups([part.mask for part in problem.parts], count, device):
        length = count if rows is None else len(rows)
        even = -(-length // max(-(-length // size), 1))
        for start in range(0, length, max(even, 1)):
            here = slice(start, min(start + even, length))
            yield (here if rows is None else rows[here]), parts


def _groups(masks: Sequence[Mask], count: int, device: torch.device) -> Iterator[tuple[Tensor | None, Sequence[int]]]:
    """Tokens (``None``: all) grouped by the masks in which they count."""
    every = range(len(masks))
    if all(mask is None for mask in masks):
        yield None, every
        return
    code = torch.zeros(count, dtype=torch.long, device=device)
    for k, mask in enumerate(masks):
        code += (1 if mask is None else mask.long()) << k
    for number in range(1, 1 << len(masks)):
        rows = (code == number).nonzero().flatten()
        if len(rows):
            yield (None if len(rows) == count else rows), [k for k in every if number >> k & 1]


def _common_factor(
    by_total: Tensor | None, by_parts: Sequence[Tensor | None], weights: Sequence[Weight]
) -> Tensor | None:
    """The factor of the gradient of the weighted sum; ``None`` if the parts have other weights than expected."""
    if by_total is not None and all(by is None for by in by_parts):
        return by_total
    if any(by is None for by in by_parts):
        return None
    ratios = torch.stack([by / weight for by, weight in zip(by_parts, weights, strict=True) if by is not None])
    common = ratios.mean()
    if len(ratios) > 1 and not (ratios - common).abs().max() <= 8 * torch.finfo(ratios.dtype).eps * common.abs():
        return None
    return common if by_total is None else common + by_total


def _keeps_graph() -> bool:
    """Whether this backward pass keeps its graph: another one may need the unscaled gradients."""
    try:
        return bool(torch._C._autograd._get_current_graph_task_keep_graph())
    except AttributeError:  # private to torch, which uses it for the same purpose
        return True
