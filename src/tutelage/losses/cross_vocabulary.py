"""Losses between distributions over different vocabularies: over shared entries, or over sorted probabilities."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.losses.closed_form_grads import Divergence, LossAndGrad, through_softmax
from tutelage.losses.common import Mask, Reduction, check_temperature, float_pair, reduce, without_autocast

Rest = Literal["bucket", "uld"]
"""How to treat the entries that only one vocabulary has: ``bucket``, as one outcome; ``uld``, as one outcome, and
their sorted probabilities are compared too."""


def coarse(logits: Tensor, classes: Tensor) -> Tensor:
    """Logits ``[..., S + 1]`` of some classes, and of all others as one outcome, which is last.

    Their softmax is the distribution of ``logits`` with the probabilities of the others summed. Divide by T before.

    Args:
        logits: ``[..., C]``.
        classes: ``[S]``, distinct classes. If these are all C, there is no last outcome.
    """
    some = logits[..., classes]
    if len(classes) == logits.shape[-1]:
        return some
    return torch.cat([some, logits.index_fill(-1, classes, -torch.inf).logsumexp(-1, keepdim=True)], -1)


@without_autocast
def uld(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, mask: Mask = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Distance of sorted probabilities: :math:`T^2 \sum_i |q_{(i)} - p_{(i)}|`, for any two vocabularies.

    Both lists of probabilities are sorted, largest first, and the shorter one is padded with zeros. This is the
    Wasserstein distance if all tokens are equally far from each other, under the best matching of tokens. It compares
    how certain the models are, not what they predict.

    Args:
        student: logits ``[..., C]``.
        teacher: logits ``[..., C']``; receives no gradient.
        temperature: T, above 0.

    Returns:
        At most 2 T^2; zero if one list is a permutation of the other.

    Reference: Boizard et al., Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs
    (TMLR 2025), equation 5.
    """
    t = check_temperature(temperature)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same rows")
    q, p = ((x / t).softmax(-1).sort(-1, descending=True).values for x in float_pair(student, teacher, mask))
    width = max(q.shape[-1], p.shape[-1])
    q, p = (F.pad(x, (0, width - x.shape[-1])) for x in (q, p))
    return reduce((q - p).abs().sum(-1) * t**2, mask, reduction)


Distance = Callable[[Tensor, Tensor, bool], LossAndGrad]
"""(the student's logits over T ``[n, C]``, the teacher's ``[n, C']``, whether the gradient is required); changes
neither."""


def sorted_distance() -> Distance:
    """:func:`uld` over T^2."""

    def compute(student: Tensor, teacher: Tensor, needs_grad: bool) -> LossAndGrad:
        q, p = student.softmax(-1), teacher.softmax(-1)
        value, by_q = _sorted_gap(q, p, needs_grad)
        return LossAndGrad(value, None if by_q is None else through_softmax(q, by_q))

    return compute


def over_shared(divergence: Divergence, own: Tensor, theirs: Tensor, rest: Rest = "bucket") -> Distance:
    """A divergence over the shared entries, whose ids are ``own`` and ``theirs`` ``[S]``, and all others as one."""

    def compute(student: Tensor, teacher: Tensor, needs_grad: bool) -> LossAndGrad:
        mine, others = own.to(student.device), theirs.to(student.device)
        if len(mine) == student.shape[-1]:  # the student has no other entries
            value, grad = divergence(student[:, mine].log_softmax(-1), teacher[:, others].log_softmax(-1), needs_grad)
            return LossAndGrad(value, None if grad is None else torch.empty_like(student).index_copy_(-1, mine, grad))
        left, right = student.index_fill(-1, mine, -torch.inf), teacher.index_fill(-1, others, -torch.inf)
        log_q, log_p = _log_coarse(student[:, mine], left), _log_coarse(teacher[:, others], right)
        bucket = log_q[:, -1:].clone()
        value, grad = divergence(log_q, log_p, needs_grad)
        out: Tensor | None = None
        if grad is not None:
            out = left.softmax(-1).mul_(grad[:, -1:])  # each entry's share of the bucket
            out[:, mine] = grad[:, :-1]
        if rest == "uld":
            q = left.sub(left.logsumexp(-1, keepdim=True)).add_(bucket).exp_()
            p = right.sub(teacher.logsumexp(-1, keepdim=True)).exp_()
            gap, by_q = _sorted_gap(q, p, needs_grad)
            value = value + gap
            if out is not None and by_q is not None:  # q is part of a softmax over all logits
                by_q.mul_(q)
                out.add_(by_q).sub_(student.softmax(-1).mul_(by_q.sum(-1, keepdim=True)))
        return LossAndGrad(value, out)

    return compute


NEVER = -30.0
"""Log-odds of the bucket of a teacher that has no other entries: negligible, and finite."""


def _log_coarse(some: Tensor, rest: Tensor) -> Tensor:
    bucket = rest.logsumexp(-1, keepdim=True)
    bucket = torch.where(bucket.isneginf(), some.logsumexp(-1, keepdim=True) + NEVER, bucket)
    return torch.cat([some, bucket], -1).log_softmax(-1)


def _sorted_gap(q: Tensor, p: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """``sum_i |q_(i) - p_(i)|`` of each row, and its gradient by ``q``."""
    gap, place = q.sort(-1, descending=True)
    common = min(q.shape[-1], p.shape[-1])
    theirs = p.sort(-1, descending=True).values
    gap[:, :common] -= theirs[:, :common]
    value = gap.abs().sum(-1) + theirs[:, common:].sum(-1)
    if not needs_grad:
        return value, None
    return value, torch.empty_like(gap).scatter_(-1, place, gap.sign_())
