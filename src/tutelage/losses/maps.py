"""Losses on feature maps ``[B, C, H, W]``.

Every function works in float32 (float64 for float64 inputs) and sends no gradient to the teacher.
"""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from tutelage.losses.common import (
    Mask,
    Reduction,
    check_choice,
    check_same_batch,
    check_same_shape,
    float_pair,
    per_example,
    reduce,
    unit,
    without_autocast,
)


@without_autocast
def attention_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    variant: Literal["normalised", "authors"] = "normalised",
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Attention transfer: :math:`\|A^S/\|A^S\|_2 - A^T/\|A^T\|_2\|_2^2`, :math:`A = \sum_c |F_c|^2`.

    Args:
        student: feature map ``[B, C, H, W]``.
        teacher: feature map ``[B, C', H', W']``; receives no gradient. If the spatial sizes differ, the larger map is
            average-pooled to the smaller before squaring.
        variant: ``normalised`` sums the squares over positions. ``authors``, the code of the published weight, 1000,
            averages over them: H W times smaller.

    Returns:
        In [0, 2], over H W for ``authors``; zero, with zero gradient, when student equals teacher.
        A zero map has zero attention, and gets no gradient.

    Reference: Zagoruyko and Komodakis, Paying More Attention to Attention (ICLR 2017), equation 2, squared.
    """
    check_choice("variant", variant, "normalised", "authors")
    student, teacher = _maps(student, teacher, mask)
    squares = (_attention(student) - _attention(teacher)).square()
    return reduce(squares.sum(-1) if variant == "normalised" else squares.mean(-1), mask, reduction)


def _attention(features: Tensor) -> Tensor:
    """``[B, H * W]`` normalised attention map."""
    return unit(features.square().sum(1).flatten(1))


@without_autocast
def nst(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: Literal["polynomial", "linear"] = "polynomial",
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Neuron selectivity transfer: squared MMD between the sets of channels, as maps over positions.

    With :math:`x_i` and :math:`y_j` the L2-normalised maps of the channels of teacher and student, the mean of
    :math:`k(x_i, x_{i'})`, plus that of :math:`k(y_j, y_{j'})`, less twice that of :math:`k(x_i, y_j)`.

    Args:
        student: feature map ``[B, C, H, W]``.
        teacher: feature map ``[B, C', H', W']``; receives no gradient. If the spatial sizes differ, the larger map is
            average-pooled to the smaller.
        kernel: ``polynomial`` :math:`(x \cdot y)^2`, the paper's choice; or ``linear``.

    Returns:
        Zero, with zero gradient, when student equals teacher, in any order of channels.

    Reference: Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer (2017), the
    squared MMD with d = 2, c = 0.
    """
    check_choice("kernel", kernel, "polynomial", "linear")
    student, teacher = _maps(student, teacher, mask)
    y, x = unit(student.flatten(2)), unit(teacher.flatten(2))
    if kernel == "linear":
        value = (x.mean(1) - y.mean(1)).square().sum(-1)
    elif x.shape[2] <= max(x.shape[1], y.shape[1]):
        # sum_ij (x_i . y_j)^2 = <X'X, Y'Y>: the MMD is a squared distance of position matrices
        value = (x.mT @ x / x.shape[1] - y.mT @ y / y.shape[1]).square().sum((1, 2))
    else:
        xx, yy, xy = ((a @ b.mT).square().mean((1, 2)) for a, b in ((x, x), (y, y), (x, y)))
        value = xx + yy - 2 * xy
    return reduce(value, mask, reduction)


@without_autocast
def review(
    student: Tensor,
    teacher: Tensor,
    *,
    levels: tuple[int, ...] = (4, 2, 1),
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""ReviewKD's hierarchical context loss (HCL): mean squares over a pyramid of resolutions.

    :math:`\sum_k 2^{-k} \mathrm{MSE}_k / \sum_k 2^{-k}`, where level 0 is the full maps and the others are
    average-pooled to 4x4, 2x2 and 1x1. Levels that are not smaller than the map are skipped. For one stage; the
    method sums over stages.

    Args:
        student: fused feature map ``[B, C, H, W]``.
        teacher: the same shape; receives no gradient.
        levels: side lengths of the pyramid, decreasing.

    Returns:
        Zero, with zero gradient, when student equals teacher.

    Reference: Chen et al., Distilling Knowledge via Knowledge Review (CVPR 2021), the HCL; the weights are those of
    the authors' code.
    """
    check_same_shape(student, teacher)
    student, teacher = _maps(student, teacher, mask)
    gap = student - teacher
    value, weight, total = per_example(gap.square()).mean(-1), 1.0, 1.0
    for side in levels:
        if side >= min(gap.shape[2:]):
            continue
        weight /= 2
        # pooling is linear: the gap of the pooled maps is the pooled gap
        value = value + weight * per_example(F.adaptive_avg_pool2d(gap, side).square()).mean(-1)
        total += weight
    return reduce(value / total, mask, reduction)


def _maps(student: Tensor, teacher: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Two feature maps over the same positions, ``[B, C, H, W]`` with any channel counts."""
    check_same_batch(student, teacher)
    if student.ndim != 4 or teacher.ndim != 4:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be feature maps "
            "[B, C, H, W], because this loss compares positions; "
            "reshape tokens [B, H * W, C] to a map, or use hint for vectors"
        )
    student, teacher = float_pair(student, teacher, mask, 1)
    if student.shape[2:] != teacher.shape[2:]:
        size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        student, teacher = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
    return student, teacher
