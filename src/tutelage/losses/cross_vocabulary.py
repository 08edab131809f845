"""Losses between distributions over different vocabularies: over what both have, or over sorted probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.losses.closed_form_grads import Divergence, LossAndGrad, through_softmax
from tutelage.losses.common import Reduction, as_float, check_mask, check_temperature, precise, reduce

Rest = Literal["bucket", "uld"]
"""What the entries that only one vocabulary has are: one outcome; or that, and compared by their sorted probabilities
too."""


def coarse(logits: Tensor, kept: Tensor) -> Tensor:
    """Logits ``[..., S + 1]`` of some classes, and of all others as one outcome, which is last.

    Their softmax is the distribution of ``logits`` with the others' probabilities added up. Soften before.

    Args:
        logits: ``[..., C]``.
        kept: ``[S]``, each class once. With all C of them there is no last outcome.
    """
    some = logits[..., kept]
    if len(kept) == logits.shape[-1]:
        return some
    return torch.cat([some, logits.index_fill(-1, kept, -torch.inf).logsumexp(-1, keepdim=True)], -1)


@precise
def uld(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Distance of sorted probabilities: :math:`T^2 \sum_i |q_{(i)} - p_{(i)}|`, of any two vocabularies.

    The probabilities of each are sorted, largest first, and the shorter list is filled up with zeros: it is the
    Wasserstein distance where any token is as far from any other, under the best matching of tokens to tokens. It
    knows how sure the teacher is and not of what.

    Args:
        student: logits ``[..., C]``.
        teacher: logits ``[..., C']``; receives no gradient.
        temperature: T, above 0.
        mask: ``[...]``, true where the row counts.
        reduction: ``mean`` over rows that count, ``sum``, or ``none`` for ``[...]``.

    Returns:
        At most 2 T^2; zero where one list is a permutation of the other.

    Raises:
        ValueError: there are not as many rows of both, or the temperature is not above 0.

    Reference: Boizard et al., Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs
    (TMLR 2025), equation 5.
    """
    t = check_temperature(temperature)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same rows")
    mask = None if mask is None else check_mask(mask, student.shape[:-1])
    sides = [as_float(x) for x in (student, teacher.detach())]
    if mask is not None:
        sides = [torch.where(mask.unsqueeze(-1), x, 0.0) for x in sides]
    q, p = ((x / t).softmax(-1).sort(-1, descending=True).values for x in sides)
    width = max(q.shape[-1], p.shape[-1])
    q, p = (F.pad(x, (0, width - x.shape[-1])) for x in (q, p))
    return reduce((q - p).abs().sum(-1) * t**2, mask, reduction)


# ---------------------------------------------------------------- with slopes

Comparison = Callable[[Tensor, Tensor, bool], LossAndGrad]
"""(the student's softened scores ``[n, C]``, the teacher's ``[n, C']``, whether the gradient is wanted); leaves both
as they are."""


def sorted_distance() -> Comparison:
    """:func:`uld` over T^2."""

    def compare(scores: Tensor, said: Tensor, learns: bool) -> LossAndGrad:
        q, p = scores.softmax(-1), said.softmax(-1)
        value, by_q = _sorted_gap(q, p, learns)
        return LossAndGrad(value, None if by_q is None else through_softmax(q, by_q))

    return compare


def over_shared(divergence: Divergence, own: Tensor, theirs: Tensor, rest: Rest = "bucket") -> Comparison:
    """A divergence of the entries that both have, and of all others as one outcome.

    Args:
        divergence: over those.
        own: ``[S]``, the student's ids of what both have.
        theirs: ``[S]``, the teacher's.
        rest: with ``uld``, the sorted probabilities of the entries that only one has are compared too.
    """

    def compare(scores: Tensor, said: Tensor, learns: bool) -> LossAndGrad:
        mine, others = own.to(scores.device), theirs.to(scores.device)
        if len(mine) == scores.shape[-1]:  # there is no other outcome: the teacher's word on those that there are
            value, slope = divergence(scores[:, mine].log_softmax(-1), said[:, others].log_softmax(-1), learns)
            return LossAndGrad(
                value, None if slope is None else torch.empty_like(scores).index_copy_(-1, mine, slope)
            )
        left, right = scores.index_fill(-1, mine, -torch.inf), said.index_fill(-1, others, -torch.inf)
        log_q, log_p = _log_coarse(scores[:, mine], left), _log_coarse(said[:, others], right)
        bucket = log_q[:, -1:].clone()
        value, slope = divergence(log_q, log_p, learns)
        out: Tensor | None = None
        if slope is not None:
            out = left.softmax(-1).mul_(slope[:, -1:])  # by its entries' shares of it
            out[:, mine] = slope[:, :-1]
        if rest == "uld":
            q = left.sub(left.logsumexp(-1, keepdim=True)).add_(bucket).exp_()
            p = right.sub(said.logsumexp(-1, keepdim=True)).exp_()
            more, by_q = _sorted_gap(q, p, learns)
            value = value + more
            if out is not None and by_q is not None:  # q is a part of a softmax, all of whose scores share in it
                by_q.mul_(q)
                out.add_(by_q).sub_(scores.softmax(-1).mul_(by_q.sum(-1, keepdim=True)))
        return LossAndGrad(value, out)

    return compare


NEVER = -30.0
"""Log-odds of the other entries of a teacher that has none: so unlikely that only their sum matters, and finite."""


def _log_coarse(some: Tensor, rest: Tensor) -> Tensor:
    one = rest.logsumexp(-1, keepdim=True)
    one = torch.where(one.isneginf(), some.logsumexp(-1, keepdim=True) + NEVER, one)
    return torch.cat([some, one], -1).log_softmax(-1)


def _sorted_gap(q: Tensor, p: Tensor, learns: bool) -> tuple[Tensor, Tensor | None]:
    """``sum_i |q_(i) - p_(i)|`` of each row, and its gradient by ``q``."""
    ordered, place = q.sort(-1, descending=True)
    most = min(q.shape[-1], p.shape[-1])
    theirs = p.sort(-1, descending=True).values
    gap = ordered
    gap[:, :most] -= theirs[:, :most]
    value = gap.abs().sum(-1) + theirs[:, most:].sum(-1)
    if not learns:
        return value, None
    return value, torch.empty_like(gap).scatter_(-1, place, gap.sign_())
