"""Token losses with their gradient in closed form, for a few rows of logits at a time.

Each takes log-probabilities, which it may overwrite, and returns the loss of each row and, if required, the gradient
by the student's logits over T. :mod:`tutelage.losses.chunked` is built from them; values and gradients are those of
the losses of the same names, without T^2.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

from tutelage.losses.divergences import check_alpha, check_beta, mix


class LossAndGrad(NamedTuple):
    """The loss of each row and its gradient.

    Attributes:
        value: ``[n]``, in nats.
        grad: ``[n, V]``, or ``None`` if it is not required.
    """

    value: Tensor
    grad: Tensor | None


Divergence = Callable[[Tensor, Tensor, bool], LossAndGrad]
"""(student's log-probabilities ``[n, V]``, the teacher's, whether the gradient is required)."""


def through_softmax(q: Tensor, by_log_q: Tensor) -> Tensor:
    """The gradient by logits from g, the gradient by log q over q: ``q (g - <q, g>)``, written in the place of g."""
    return by_log_q.sub_(vecdot(q, by_log_q).unsqueeze(-1)).mul_(q)


def kl() -> Divergence:
    """``KL(p || q)``."""

    def compute(log_q: Tensor, log_p: Tensor, needs_grad: bool) -> LossAndGrad:
        p = log_p.exp()
        value = vecdot(p, log_p.sub_(log_q))
        return LossAndGrad(value, log_q.exp_().sub_(p) if needs_grad else None)

    return compute


def reverse_kl() -> Divergence:
    """``KL(q || p)``."""

    def compute(log_q: Tensor, log_p: Tensor, needs_grad: bool) -> LossAndGrad:
        gap = torch.sub(log_q, log_p, out=log_p)
        q = log_q.exp_()
        value = vecdot(q, gap)
        return LossAndGrad(value, gap.sub_(value.unsqueeze(-1)).mul_(q) if needs_grad else None)

    return compute


def js(beta: float = 0.5) -> Divergence:
    """Generalised Jensen-Shannon, with its limits at 0 and 1; raises ``ValueError`` for beta outside [0, 1]."""
    check_beta(beta)
    if beta in (0.0, 1.0):
        return reverse_kl() if beta else kl()

    def compute(log_q: Tensor, log_p: Tensor, needs_grad: bool) -> LossAndGrad:
        log_m = mix(log_p, log_q, beta)
        p, gap = log_p.exp(), log_q - log_m
        q = log_q.exp_()
        value = beta * vecdot(p, log_p.sub_(log_m)) + (1.0 - beta) * vecdot(q, gap)
        return LossAndGrad(value, through_softmax(q, gap.mul_(1.0 - beta)) if needs_grad else None)

    return compute


def skew_kl(alpha: float = 0.1, reverse: bool = False) -> Divergence:
    """KL against a mixture, forward or reverse; raises ``ValueError`` for alpha outside [0, 1)."""
    check_alpha(alpha)
    if not alpha:
        return reverse_kl() if reverse else kl()

    def forward(log_q: Tensor, log_p: Tensor, needs_grad: bool) -> LossAndGrad:
        gap = log_p - mix(log_p, log_q, alpha)
        value = vecdot(log_p.exp_(), gap)
        if not needs_grad:
            return LossAndGrad(value, None)
        by_logit = gap.add_(log_q).exp_().mul_(alpha - 1.0)  # p q / m: neither p / m nor q is lost where one is 0
        return LossAndGrad(value, by_logit.sub_(log_q.exp_().mul_(by_logit.sum(-1, keepdim=True))))

    def backward(log_q: Tensor, log_p: Tensor, needs_grad: bool) -> LossAndGrad:
        gap = log_q - mix(log_q, log_p, alpha)
        q = log_q.exp_()
        value = vecdot(q, gap)
        return LossAndGrad(value, through_softmax(q, gap.sub_(gap.exp(), alpha=alpha)) if needs_grad else None)

    return backward if reverse else forward


def tvd() -> Divergence:
    """Total variation distance."""

    def compute(log_q: Tensor, log_p: Tensor, needs_grad: bool) -> LossAndGrad:
        q = log_q.exp_()
        gap = torch.sub(q, log_p.exp_(), out=log_p)
        value = 0.5 * gap.abs().sum(-1)
        return LossAndGrad(value, through_softmax(q, gap.sign_().mul_(0.5)) if needs_grad else None)

    return compute


DIVERGENCES: dict[str, Callable[..., Divergence]] = {
    "kl": kl, "reverse_kl": reverse_kl, "js": js, "skew_kl": skew_kl, "tvd": tvd
}  # fmt: skip
"""By name; each factory takes the options of the loss."""


def topk(log_q: Tensor, index: Tensor, log_p: Tensor, needs_grad: bool) -> LossAndGrad:
    """:func:`tutelage.losses.topk_kd` over T^2, for ``index`` and ``log_p`` ``[n, k]``."""
    p = log_p.exp()
    value = vecdot(p, log_p - log_q.gather(-1, index))
    if index.shape[-1] == log_q.shape[-1]:
        share = p.sum(-1, keepdim=True)
        return LossAndGrad(value, (log_q.exp_() * share).scatter_add_(-1, index, -p) if needs_grad else None)
    mass = (1.0 - p.sum(-1, keepdim=True)).clamp(min=0.0)
    rest = log_q.scatter(-1, index, -torch.inf)
    log_rest = rest.logsumexp(-1, keepdim=True)
    value = value + (torch.xlogy(mass, mass) - mass * log_rest).squeeze(-1)
    if not needs_grad:
        return LossAndGrad(value, None)
    grad = log_q.exp_().mul_(p.sum(-1, keepdim=True) + mass).sub_(rest.sub_(log_rest).exp_().mul_(mass))
    return LossAndGrad(value, grad.scatter_add_(-1, index, -p))


def sampled(log_q: Tensor, index: Tensor, weights: Tensor, needs_grad: bool) -> LossAndGrad:
    """:func:`tutelage.losses.sampled_kd` over T^2, for ``index`` and ``weights`` ``[n, k]``."""
    rest = 1.0 - weights.sum(-1)
    value = -vecdot(weights, log_q.gather(-1, index)) - rest * log_q.mean(-1)
    if not needs_grad:
        return LossAndGrad(value, None)
    even = rest.unsqueeze(-1) / log_q.shape[-1]
    return LossAndGrad(value, log_q.exp_().sub_(even).scatter_add_(-1, index, -weights))


def labelled(log_q: Tensor, labels: Tensor, needs_grad: bool) -> LossAndGrad:
    """Cross-entropy with ``labels`` ``[n]``."""
    index = labels.unsqueeze(-1)
    value = -log_q.gather(-1, index).squeeze(-1)
    if not needs_grad:
        return LossAndGrad(value, None)
    return LossAndGrad(value, log_q.exp_().scatter_add_(-1, index, log_q.new_full((), -1.0).expand(index.shape)))
