"""Losses against part of the teacher's distribution: its largest classes, or a sample.

Both take the temperature at which that part was computed; it cannot be changed afterwards, because the tail at T = 1
does not determine the tail at T = 4. float32 inside (float64 for float64 inputs), no gradient to the teacher.
"""

import torch
from torch import Tensor

from tutelage.losses.common import Mask, Reduction, as_float, check_mask, reduce, without_autocast, zero_masked
from tutelage.losses.logits import divergence, soften


@without_autocast
def topk_kd(
    student: Tensor,
    index: Tensor,
    log_probs: Tensor,
    *,
    temperature: float = 4.0,
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KD against the teacher's k largest classes, all others as one: :math:`T^2\,\mathrm{KL}` of k + 1 outcomes.

    :math:`\sum_{i \in K} p_i \log(p_i / q_i) + p_r \log(p_r / q_r)`, :math:`p_r = 1 - \sum_{i \in K} p_i`. The tail
    keeps its mass: renormalised over K alone, a top-1 loss would be identically zero, and the student would learn
    that all other classes are impossible. It is a lower bound of :func:`kd`, and equal to it at k = C.

    Args:
        student: logits ``[..., C]``.
        index: the teacher's classes ``[..., k]``, all different.
        log_probs: their log-probabilities at T ``[..., k]``, natural logarithm.
        temperature: T, above 0: that of ``log_probs``.

    Returns:
        Nats times T^2; zero if the student gives the k classes the teacher's probabilities.

    Reference: Hinton et al. (2015), section 2, on the partition into k classes and the rest.
    """
    student, index, log_p, mask = _prepared(student, index, log_probs, mask)
    if mask is not None:  # masked rows: the uniform distribution, on both sides
        log_p = torch.where(mask.unsqueeze(-1), log_p, student.new_full((), student.shape[-1]).log().neg())
        index = torch.where(mask.unsqueeze(-1), index, torch.arange(index.shape[-1], device=index.device))
    log_all = soften(student, temperature)
    log_q = log_all.gather(-1, index)
    value = divergence(log_p, log_q)
    if index.shape[-1] < student.shape[-1]:
        rest = torch.ones_like(student, dtype=torch.bool).scatter_(-1, index, False)
        log_rest = log_all.masked_fill(~rest, -torch.inf).logsumexp(-1)
        mass = (1.0 - log_p.exp().sum(-1)).clamp(min=0.0)
        value = value + torch.xlogy(mass, mass) - mass * log_rest
    return reduce(value * temperature**2, mask, reduction)


@without_autocast
def sampled_kd(
    student: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    temperature: float = 4.0,
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KD against a sample of the teacher's distribution: :math:`-T^2 \sum_k w_k \log q_{i_k}`.

    With :math:`E[\sum_k w_k f(i_k)] = \sum_i p_i f(i)` its expectation is :func:`soft_cross_entropy`, and the
    expectation of its gradient is that of :func:`kd`, for any sample size: the noise averages out over rows, unlike
    the error of a truncation. The weights of a row sum to one only on average; the rest is spread evenly over all C
    classes, :math:`-T^2 (1 - \sum_k w_k) \frac1C \sum_i \log q_i`. Its expectation is zero, and it reduces the noise:
    without it the weight of the student's own distribution would vary by chance.

    Args:
        student: logits ``[..., C]``.
        index: classes ``[..., k]``, possibly repeated.
        weights: of each ``[..., k]``, 0 for padding. For n plain draws: the count of the class, over n. Do not divide
            by their sum, which would favour the classes in the sample.
        temperature: T, above 0: that of the sample.

    Returns:
        Nats times T^2. Not zero at equality: its expectation there is T^2 times the teacher's entropy.

    Reference: Anshumann et al., Sparse Logit Sampling (ACL 2025), random sampling KD.
    """
    student, index, w, mask = _prepared(student, index, weights, mask)
    log_q = soften(student, temperature)
    rest = (1.0 - w.sum(-1)) * log_q.mean(-1)
    return reduce(-((w * log_q.gather(-1, index)).sum(-1) + rest) * temperature**2, mask, reduction)


def _prepared(
    student: Tensor, index: Tensor, values: Tensor, mask: Mask
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All arguments in working precision, with zeros in masked rows."""
    if index.shape != values.shape or index.shape[:-1] != student.shape[:-1] or index.ndim != student.ndim:
        raise ValueError(
            f"index {tuple(index.shape)} and its values {tuple(values.shape)} must be of one shape, [..., k] for "
            f"student {tuple(student.shape)}: a few classes for each row"
        )
    if mask is not None:
        mask = check_mask(mask, student.shape[:-1])
    student = zero_masked(as_float(student), mask)
    return student, zero_masked(index, mask), zero_masked(values.detach().to(student.dtype), mask), mask
