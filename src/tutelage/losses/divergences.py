"""Divergences between the student's and the teacher's distributions, other than Hinton's.

Student and teacher are logits ``[..., C]``; p is the teacher's ``softmax(z / T)`` and q the student's. Each
divergence is multiplied by T^2 once, as in :func:`tutelage.losses.kd`, so that one can replace another without
retuning weights.
"""

import math

import torch
from torch import Tensor

from tutelage.losses.common import Mask, Reduction, float_rows, reduce, without_autocast
from tutelage.losses.logits import divergence, soften


@without_autocast
def reverse_kl(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, mask: Mask = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Mode-seeking loss: :math:`T^2\,\mathrm{KL}(q \| p)`, an expectation under the student.

    Args:
        student: logits ``[..., C]``.
        teacher: logits of the same shape; receives no gradient.
        temperature: T, above 0.

    Returns:
        Nats times T^2; zero, with zero gradient, when student equals teacher.

    Reference: Gu et al., MiniLLM (ICLR 2024), equation 1, per token.
    """
    student, teacher = float_rows(student, teacher, mask)
    value = divergence(soften(student, temperature), soften(teacher, temperature))
    return reduce(value * temperature**2, mask, reduction)


@without_autocast
def js(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence: :math:`\beta\,KL(p\|m) + (1-\beta)\,KL(q\|m)`.

    With :math:`m = \beta p + (1-\beta) q`, times T^2. It lies between forward and reverse KL, and is bounded.

    It shrinks towards both ends: near :math:`\beta = 0` it is :math:`\beta\,KL(p\|q)`, near 1 it is
    :math:`(1-\beta)\,KL(q\|p)`. Divide by beta (or 1 - beta) to compare it with those. At exactly 0 and 1, where
    value and gradient would vanish, this function returns the limits of the quotient instead: forward KL at 0,
    reverse KL at 1.

    Args:
        student: logits ``[..., C]``.
        teacher: logits of the same shape; receives no gradient.
        beta: weight of the teacher in the mixture, in [0, 1].
        temperature: T, above 0.

    Returns:
        Nats times T^2, at most ln 2 times T^2 for beta 0.5; zero, with zero gradient, when student equals teacher.

    Reference: Agarwal et al., On-Policy Distillation of Language Models (GKD, ICLR 2024), equation 1.
    """
    check_beta(beta)
    student, teacher = float_rows(student, teacher, mask)
    log_q, log_p = soften(student, temperature), soften(teacher, temperature)
    if beta == 0.0:
        value = divergence(log_p, log_q)
    elif beta == 1.0:
        value = divergence(log_q, log_p)
    else:
        log_m = mix(log_p, log_q, beta)
        value = beta * divergence(log_p, log_m) + (1.0 - beta) * divergence(log_q, log_m)
    return reduce(value * temperature**2, mask, reduction)


def check_beta(beta: float) -> None:
    """Raise ``ValueError`` unless ``js`` can have this beta."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta}: must lie in [0, 1]; it is the teacher's share of the mixture")


def mix(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Log of ``share * p + (1 - share) * q``, for a share strictly between 0 and 1."""
    least = torch.finfo(log_p.dtype).min / 2  # where both are impossible, logaddexp has no gradient
    return torch.logaddexp(log_p.clamp(min=least) + math.log(share), log_q.clamp(min=least) + math.log1p(-share))


@without_autocast
def skew_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.1,
    reverse: bool = False,
    temperature: float = 1.0,
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KL against a mixture: :math:`KL(p \| \alpha p + (1-\alpha) q)`, times T^2.

    The mixture bounds the ratio of the two distributions, and with it the gradient. ``reverse`` gives
    :math:`KL(q \| \alpha q + (1-\alpha) p)`.

    Args:
        student: logits ``[..., C]``.
        teacher: logits of the same shape; receives no gradient.
        alpha: share of the first distribution in the mixture, in [0, 1). 0 is plain KL.
        reverse: skew the reverse KL instead of the forward one.
        temperature: T, above 0.

    Returns:
        Nats times T^2; zero, with zero gradient, when student equals teacher.

    Reference: Ko et al., DistiLLM (ICML 2024), section 3.1: SKL, and SRKL with ``reverse``.
    """
    check_alpha(alpha)
    student, teacher = float_rows(student, teacher, mask)
    log_q, log_p = soften(student, temperature), soften(teacher, temperature)
    first, second = (log_q, log_p) if reverse else (log_p, log_q)
    value = divergence(first, mix(first, second, alpha) if alpha else second)
    return reduce(value * temperature**2, mask, reduction)


def check_alpha(alpha: float) -> None:
    """Raise ``ValueError`` unless ``skew_kl`` can have this alpha."""
    if not 0.0 <= alpha < 1.0:
        raise ValueError(
            f"alpha={alpha}: must lie in [0, 1); at 1 both sides are the same distribution and nothing is learned"
        )


@without_autocast
def tvd(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, mask: Mask = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Total variation distance: :math:`\tfrac12 \sum_i |p_i - q_i|`, times T^2. Symmetric, in [0, 1].

    Args:
        student: logits ``[..., C]``.
        teacher: logits of the same shape; receives no gradient.
        temperature: T, above 0.

    Returns:
        A probability times T^2; zero, with zero gradient, when student equals teacher.

    Reference: Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation (ACL 2023), the TVD
    loss, per token.
    """
    student, teacher = float_rows(student, teacher, mask)
    q, p = soften(student, temperature).exp(), soften(teacher, temperature).exp()
    return reduce(0.5 * (q - p).abs().sum(-1) * temperature**2, mask, reduction)
