"""Losses on logits: soft targets, hard targets, and both.

Student and teacher are logits ``[..., C]`` of the same shape; a row is an example or a token. Every function works in
float32 (float64 for float64 inputs), sends no gradient to the teacher, and averages over rows, never over classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.losses.common import (
    Mask,
    Reduction,
    Variant,
    as_float,
    centre,
    check_choice,
    check_mask,
    check_same_shape,
    check_temperature,
    float_rows,
    reduce,
    unit,
    without_autocast,
    zero_masked,
)

IGNORE = -100
"""The label of a row without one, as in ``torch.nn.functional.cross_entropy``."""


@without_autocast
def kd(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    standardize: bool = False,
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Soft-target loss of Hinton et al.: :math:`T^2\,\mathrm{KL}(p^T \| p^S)`.

    With :math:`p = \mathrm{softmax}(z / T)`. The gradient by the student's logits is :math:`T (p^S - p^T)`, so its
    size is comparable with that of a hard-label loss at any temperature. :math:`T^2` is applied here and nowhere
    else.

    Args:
        student: logits ``[..., C]``.
        teacher: logits of the same shape; receives no gradient.
        temperature: T, above 0.
        standardize: first scale every row of logits, of both, to mean 0 and deviation 1, so that the student need not
            match the teacher's scale (Sun et al.). A constant row becomes zeros: a uniform distribution, with zero
            gradient.
        mask: ``[...]``, true where the row counts. The result is the same as without the other rows.
        reduction: ``mean`` over rows that count, ``sum``, or ``none`` for ``[...]``.

    Returns:
        Nats times T^2; zero, with zero gradient, when student equals teacher.

    Reference: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network (2015), section 2.
    Sun et al., Logit Standardization in Knowledge Distillation (CVPR 2024), algorithm 1: deviation over C. Their
    code, with the published numbers, divides by the deviation over C - 1: the same as T * sqrt(C / (C - 1)) here,
    times (C - 1) / C.
    """
    student, teacher = float_rows(student, teacher, mask)
    if standardize:
        student, teacher = standard(student), standard(teacher)
    log_q, log_p = soften(student, temperature), soften(teacher, temperature)
    return reduce(divergence(log_p, log_q) * temperature**2, mask, reduction)


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at ``temperature``, which must be above 0."""
    return F.log_softmax(logits / check_temperature(temperature), dim=-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)`` of each row, in nats; an impossible class of p adds 0."""
    return weighted(log_p.exp(), log_p - log_q).sum(-1)


def weighted(p: Tensor, x: Tensor) -> Tensor:
    """``p * x``, and 0 where p is 0 and x infinite, as in the limit of ``p log p``, with a gradient of 0."""
    return p * x.masked_fill(p == 0, 0.0)


def standard(logits: Tensor) -> Tensor:
    """Rows scaled to mean 0 and (population) deviation 1; constant rows become zeros."""
    return float(logits.shape[-1]) ** 0.5 * unit(centre(logits))


@without_autocast
def soft_cross_entropy(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, mask: Mask = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Cross-entropy against the teacher's distribution: :math:`-T^2 \sum_i p^T_i \log p^S_i`.

    Its gradient is that of :func:`kd`, but it is not zero when student equals teacher: its minimum is T^2 times the
    teacher's entropy. Use :func:`kd` if the value matters.

    Args:
        student: logits ``[..., C]``.
        teacher: logits of the same shape, not probabilities; receives no gradient.
        temperature: T of both, above 0.

    Reference: Hinton et al. (2015), section 2.
    """
    student, teacher = float_rows(student, teacher, mask)
    log_q, log_p = soften(student, temperature), soften(teacher, temperature)
    return reduce(-weighted(log_p.exp(), log_q).sum(-1) * temperature**2, mask, reduction)


@without_autocast
def cross_entropy(
    student: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, mask: Mask = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Hard-label loss. Rows whose label is -100 do not count.

    With smoothing :math:`\epsilon` the target is :math:`(1-\epsilon)` on the label plus :math:`\epsilon / C` on every
    class, including the label.

    Args:
        student: logits ``[..., C]``.
        labels: class indices ``[...]``, or -100.
        label_smoothing: epsilon, in [0, 1).

    Reference: Szegedy et al., Rethinking the Inception Architecture (CVPR 2016), section 7.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing={label_smoothing}: must lie in [0, 1); at 1 the labels have no effect")
    counts = labelled_rows(student, labels, mask)
    logits = zero_masked(as_float(student), counts)
    flat = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.masked_fill(~counts, IGNORE).reshape(-1),
        ignore_index=IGNORE,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return reduce(flat.view(labels.shape), counts, reduction)


def labelled_rows(student: Tensor, labels: Tensor, mask: Mask) -> Tensor:
    """``[...]``, true at rows that count and have a label; raises ``ValueError`` for labels of another shape."""
    if labels.shape != student.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} must be one class index for each row, {tuple(student.shape[:-1])}"
        )
    counts = labels != IGNORE
    return counts if mask is None else counts & check_mask(mask, labels.shape)


@without_autocast
def teacher_free(
    student: Tensor,
    labels: Tensor,
    *,
    correct: float = 0.99,
    temperature: float = 20.0,
    variant: Variant = "paper",
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Soft targets of a virtual teacher: :math:`T^2\,\mathrm{KL}(p^d_T \| p^S_T)`.

    The virtual teacher :math:`p^d` has probability ``correct`` for the label and the same for all other classes;
    :math:`p_T` is a distribution softened by T, :math:`p_T \propto p^{1/T}`. Rows whose label is -100 do not count.

    Args:
        student: logits ``[..., C]``, of at least 2 classes.
        labels: class indices ``[...]``, or -100.
        correct: the virtual teacher's probability of the label, above 1/C and below 1; the paper uses 0.9 or more.
        temperature: T, above 0; the paper uses 20 or more.
        variant: ``authors`` is the code of the published numbers:
            :math:`\mathrm{KL}(\mathrm{softmax}(p^d / T) \| p^S_1)`, which softens probabilities as if they were
            logits, does not soften the student and has no :math:`T^2`. At T = 20 its target is almost uniform.

    Returns:
        Nats, for ``paper`` times T^2, which the paper omits and every soft loss here has.

    Reference: Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization (CVPR 2020),
    section 5, Tf-KD_reg.
    """
    check_choice("variant", variant, "paper", "authors")
    t, classes = check_temperature(temperature), student.shape[-1]
    if not 1.0 / max(classes, 1) < correct < 1.0:
        raise ValueError(
            f"correct={correct} of {classes} classes: must lie between 1/C and 1, for the label to be the most likely"
        )
    counts = labelled_rows(student, labels, mask)
    logits = zero_masked(as_float(student), counts)
    virtual = torch.full_like(logits, (1.0 - correct) / (classes - 1))
    virtual = virtual.scatter(-1, labels.masked_fill(~counts, 0).unsqueeze(-1), correct)
    if variant == "authors":
        value = divergence(soften(virtual, t), soften(logits, 1.0))
    else:
        value = divergence(soften(virtual.log(), t), soften(logits, t)) * t**2
    return reduce(value, counts, reduction)


def distillation(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The combined loss :math:`\alpha\,T^2\,\mathrm{KL}(p^T\|p^S) + (1-\alpha)\,\mathrm{CE}(y, p^S)`.

    Each half is averaged over its own rows: the soft one over all that count, the hard one over those that count and
    have a label.

    Args:
        student: logits ``[..., C]``.
        teacher: logits of the same shape; receives no gradient.
        labels: class indices ``[...]``; -100 for a row without a label, which still has the soft half.
        temperature: T of the soft half. The hard half is always at 1.
        alpha: weight of the soft half, in [0, 1].
        mask: ``[...]``, true where the row counts.
        reduction: ``mean``, ``sum``, or ``none`` for ``[...]``.

    Reference: Hinton et al. (2015), section 2, with the weights named as in most later work.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha}: must lie in [0, 1]: the weight of the soft labels")
    soft = kd(student, teacher, temperature=temperature, mask=mask, reduction=reduction)
    hard = cross_entropy(student, labels, mask=mask, reduction=reduction)
    return alpha * soft + (1.0 - alpha) * hard


@without_autocast
def binary_kd(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, mask: Mask = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""KD of independent yes-or-no labels: :math:`T^2 \sum_l \mathrm{KL}(p^T_l \| p^S_l)`.

    With :math:`p_l = \mathrm{sigmoid}(z_l / T)`, a distribution over yes and no. For multi-label tasks, and for
    binary tasks with a single logit (``[..., 1]``).

    Args:
        student: logits ``[..., L]``, one per label.
        teacher: logits of the same shape; receives no gradient.
        temperature: T, above 0.

    Returns:
        Nats times T^2, summed over labels; zero, with zero gradient, when student equals teacher.

    Reference: Yang et al., Multi-Label Knowledge Distillation (ICCV 2023), the one-versus-all logit loss, which has
    T = 1.
    """
    t = check_temperature(temperature)
    student, teacher = float_rows(student, teacher, mask)
    p = (teacher / t).sigmoid()
    yes = F.logsigmoid(teacher / t) - F.logsigmoid(student / t)
    no = F.logsigmoid(-teacher / t) - F.logsigmoid(-student / t)
    return reduce((weighted(p, yes) + weighted((-teacher / t).sigmoid(), no)).sum(-1) * t**2, mask, reduction)


@without_autocast
def binary_cross_entropy(
    student: Tensor, targets: Tensor, *, mask: Mask = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Hard-label loss of independent yes-or-no labels: :math:`-\sum_l y_l \log p_l + (1-y_l) \log(1-p_l)`.

    Args:
        student: logits ``[..., L]``, one per label.
        targets: the same shape, in [0, 1].

    Returns:
        Nats, summed over labels, as :func:`binary_kd` is; transformers' own loss divides by the number of labels.

    Reference: Yang et al., Multi-Label Knowledge Distillation (ICCV 2023), equation 1.
    """
    student, targets = float_rows(student, targets, mask)
    loss = F.binary_cross_entropy_with_logits(student, targets, reduction="none").sum(-1)
    return reduce(loss, mask, reduction)


@without_autocast
def mse(student: Tensor, teacher: Tensor, *, mask: Mask = None, reduction: Reduction = "mean") -> Tensor:
    r"""Squared distance of the outputs: :math:`\|z^S - z^T\|_2^2`, summed over outputs.

    For logits (up to the mean of a row, 2C times the limit of :func:`kd` at T -> infinity), and for the outputs of a
    regression.

    Args:
        student: logits or predicted values ``[..., C]``.
        teacher: the same shape; receives no gradient.

    Reference: Kim et al., Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation
    (IJCAI 2021). Ba and Caruana (2014) minimise half of it. Code that averages over classes computes this over C.
    """
    student, teacher = float_rows(student, teacher, mask)
    return reduce((student - teacher).square().sum(-1), mask, reduction)


@without_autocast
def bounded_regression(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    margin: float = 0.0,
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Teacher-bounded regression: the student's squared error, unless it is below the teacher's.

    :math:`\|s - y\|^2` where :math:`\|s - y\|^2 + m > \|t - y\|^2`, else 0. A teacher's output can point away from
    the truth, so it is a bound and not a target. Add it, times one half in the paper, to the loss against the
    targets.

    Args:
        student: predicted values ``[..., C]``.
        teacher: the same shape; receives no gradient.
        targets: true values, the same shape.
        margin: m, in squared units of the targets: by how much the student must be better for a loss of 0.

    Returns:
        Squared error; with ``margin=0`` zero where the student is no worse than the teacher.

    Reference: Chen et al., Learning Efficient Object Detection Models with Knowledge Distillation (NIPS 2017), the
    teacher-bounded regression loss. Without a bound see :func:`mse`.
    """
    check_same_shape(student, targets)
    student, teacher = float_rows(student, teacher, mask)
    targets = zero_masked(as_float(targets).detach(), mask)
    error = (student - targets).square().sum(-1)
    bound = (teacher - targets).square().sum(-1)
    return reduce(error.masked_fill(error.detach() + margin <= bound, 0.0), mask, reduction)
