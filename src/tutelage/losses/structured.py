"""Losses on the structure of predictions: the target against other classes, and classes across a batch.

Student and teacher are logits ``[..., C]``. :func:`dkd` has a value per row. :func:`dist` and :func:`mlkd` compare
the rows of a batch: ``mask`` deletes rows and ``reduction="none"`` is an error.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.losses.common import (
    Mask,
    Reduction,
    batch_rows,
    centre,
    check_mask,
    check_same_shape,
    check_temperature,
    float_rows,
    reduce,
    reduce_batch,
    unit,
    without_autocast,
)
from tutelage.losses.logits import divergence, labelled_rows, soften


@without_autocast
def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Decoupled KD: :math:`T^2 (\alpha\,\mathrm{TCKD} + \beta\,\mathrm{NCKD})`.

    TCKD is the KL between (target, all others) pairs of probabilities, NCKD the KL between the distributions over the
    classes other than the target. KL = TCKD + (1 - p_target) NCKD, so :func:`kd` suppresses NCKD where the teacher is
    confident; here it has its own weight. With two classes NCKD is identically zero, and this is alpha times
    :func:`kd`.

    Args:
        student: logits ``[..., C]``, C at least 2.
        teacher: logits of the same shape; receives no gradient.
        labels: target class ``[...]``; rows with -100 do not count.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T, above 0.

    Returns:
        Nats times T^2; zero, with zero gradient, when student equals teacher.

    Reference: Zhao et al., Decoupled Knowledge Distillation (CVPR 2022), equations 6 and 7. The published CIFAR
    numbers use T = 4 with T^2 on both parts, as here.
    """
    counts = labelled_rows(student, labels, mask)
    if student.shape[-1] < 2:
        raise ValueError(
            f"student {tuple(student.shape)} has {student.shape[-1]} class: DKD needs another class than "
            "the target, or the loss is identically zero; use binary_kd for one logit"
        )
    student, teacher = float_rows(student, teacher, counts)
    target = labels.masked_fill(~counts, 0).unsqueeze(-1)
    target_q, rest_q, others_q = _decouple(student, target, temperature)
    target_p, rest_p, others_p = _decouple(teacher, target, temperature)
    tckd = divergence(torch.cat([target_p, rest_p], -1), torch.cat([target_q, rest_q], -1))
    nckd = divergence(others_p, others_q)
    return reduce((alpha * tckd + beta * nckd) * temperature**2, counts, reduction)


def _decouple(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the target, of all others together, and of each other among the others."""
    log_p = soften(logits, temperature)
    position = torch.arange(logits.shape[-1] - 1, device=logits.device)
    others = log_p.gather(-1, position + (position >= target).long())
    rest = others.logsumexp(-1, keepdim=True)
    return log_p.gather(-1, target), rest, F.log_softmax(others, dim=-1)


@without_autocast
def dist(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""DIST: :math:`T^2(\beta\,L_{inter} + \gamma\,L_{intra})`, with :math:`1 - \rho` as distance.

    :math:`\rho` is Pearson's correlation of the probabilities: of each row across classes (inter), and of each class
    across the rows of the batch (intra).

    A constant vector (a class with the same probability in every row, a batch of one) has no correlation: its
    distance is 0 if the other is constant too, else 1, without gradient.

    Args:
        student: logits ``[..., C]``.
        teacher: logits of the same shape; receives no gradient.
        beta: weight of the inter-class part.
        gamma: weight of the intra-class part.
        temperature: T, above 0.

    Returns:
        In [0, 2 (beta + gamma) T^2]; zero, with zero gradient, when student equals teacher.

    Reference: Huang et al., Knowledge Distillation from A Stronger Teacher (NeurIPS 2022), the inter-class and
    intra-class relations of section 4. Their ImageNet numbers use beta = gamma = T = 1; T^2 is as in their code.
    """
    student, teacher = _class_rows(student, teacher, mask, reduction)
    q, p = soften(student, temperature).exp(), soften(teacher, temperature).exp()
    if not len(q):
        return q.sum()
    inter, intra = _pearson_distance(q, p, -1).mean(), _pearson_distance(q, p, 0).mean()
    return reduce_batch((beta * inter + gamma * intra) * temperature**2, len(q), reduction)


def _class_rows(student: Tensor, teacher: Tensor, mask: Mask, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """``[N, C]`` logits of all rows that count, for a loss over the batch."""
    check_same_shape(student, teacher)
    if mask is not None:
        mask = check_mask(mask, student.shape[:-1]).reshape(-1)
    count = student.shape[:-1].numel()
    shape = (count, student.shape[-1])
    return batch_rows(student.reshape(shape), teacher.reshape(shape), mask, reduction)


def _pearson_distance(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """``1 - rho`` along ``dim``."""
    x, y = unit(centre(x, dim), dim), unit(centre(y, dim), dim)
    # half the squared distance of unit vectors is 1 - x.y, but exactly 0 where they are equal
    value = 0.5 * (x - y).square().sum(dim)
    return value.masked_fill(x.detach().any(dim) != y.any(dim), 1.0)


@without_autocast
def mlkd(
    student: Tensor,
    teacher: Tensor,
    *,
    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    instance: float = 1.0,
    batch: float = 1.0,
    classes: float = 1.0,
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Multi-level logit distillation, summed over several temperatures.

    With P the ``[N, C]`` probabilities at one temperature, for student and teacher:

    - instance: :math:`T^2\,KL` of each row, averaged over rows;
    - batch: :math:`\tfrac1N \|P_S P_S^\top - P_T P_T^\top\|_F^2`;
    - class: :math:`\tfrac1C \|P_S^\top P_S - P_T^\top P_T\|_F^2`.

    T^2 belongs to the divergence only; the two others are squared distances of matrices, which grow with N.

    Args:
        student: logits ``[..., C]``.
        teacher: logits of the same shape; receives no gradient.
        temperatures: the values of T, at least one, each above 0.
        instance: weight of the instance part.
        batch: weight of the batch part.
        classes: weight of the class part.

    Returns:
        Zero, with zero gradient, when student equals teacher.

    Reference: Jin, Wang, Lin, Multi-Level Logit Distillation (CVPR 2023), instance-, batch- and class-level alignment
    with prediction augmentation. The published numbers are of the authors' code, with these five temperatures, which
    also trains on two views and uses only the rows and classes, about a half, with the least certain predictions.
    """
    if not temperatures:
        raise ValueError("temperatures is empty: the loss would be identically zero; give at least one")
    student, teacher = _class_rows(student, teacher, mask, reduction)
    count, width = student.shape
    total = student[:0].sum()
    if not count:
        return total
    for t in temperatures:
        log_q, log_p = soften(student, check_temperature(t)), soften(teacher, t)
        q, p = log_q.exp(), log_p.exp()
        total = total + instance * divergence(log_p, log_q).mean() * t**2
        total = total + batch * (q @ q.T - p @ p.T).square().sum() / count
        total = total + classes * (q.T @ q - p.T @ p).square().sum() / width
    return reduce_batch(total, count, reduction)
