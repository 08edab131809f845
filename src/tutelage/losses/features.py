"""Losses on intermediate features, element by element.

Student and teacher are features ``[B, ...]`` of one shape: project the student first. Every function works in float32
(float64 for float64 inputs) and sends no gradient to the teacher.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.losses.common import (
    Mask,
    Reduction,
    Variant,
    as_float,
    check_same_shape,
    float_rows,
    over_elements,
    per_example,
    reduce,
    unit,
    without_autocast,
)


def _pair(student: Tensor, teacher: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """``[*examples, D]`` of two features of one shape; examples are the mask's dimensions, or B."""
    if not student.ndim:
        raise ValueError("student is a scalar: a feature has at least the dimension of the examples")
    leading = 1 if mask is None else max(mask.ndim, 1)
    student, teacher = float_rows(student, teacher, mask, leading)
    return per_example(student, leading), per_example(teacher, leading)


@without_autocast
def hint(student: Tensor, teacher: Tensor, *, mask: Mask = None, reduction: Reduction = "mean") -> Tensor:
    r"""FitNets' hint: mean over the elements of an example of :math:`(F^S - F^T)^2`.

    Args:
        student: projected features ``[B, ...]``.
        teacher: the same shape; receives no gradient.
        mask: ``[B]``, true where the example counts; or with more leading dimensions, such as ``[B, L]`` for tokens
            ``[B, L, D]``, which are then the examples.
        reduction: ``mean`` over examples that count, ``sum``, or ``none``.

    Reference: Romero et al., FitNets (ICLR 2015), equation 3, which has half the sum over elements: this times half
    their number. The published CIFAR-100 numbers (weight 100) use the mean, as here.
    """
    student, teacher = _pair(student, teacher, mask)
    return reduce((student - teacher).square().mean(-1), mask, reduction)


@without_autocast
def simkd(
    student: Tensor, teacher: Tensor, *, variant: Variant = "paper", mask: Mask = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""SimKD: :math:`\|P(F^S) - F^T\|_2^2` of the features in front of the teacher's classifier.

    The projected student uses the teacher's classifier as its own.

    Args:
        student: projected features ``[B, ...]``.
        teacher: the same shape; receives no gradient.
        variant: ``paper`` sums over elements; ``authors``, the code of the published numbers, averages over them and
            is then the same as :func:`hint`.

    Reference: Chen et al., Knowledge Distillation with the Reused Teacher Classifier (CVPR 2022).
    """
    student, teacher = _pair(student, teacher, mask)
    return reduce(over_elements((student - teacher).square(), variant), mask, reduction)


@without_autocast
def factor_transfer(
    student: Tensor, teacher: Tensor, *, variant: Variant = "paper", mask: Mask = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Factor transfer: :math:`\|F^S/\|F^S\|_2 - F^T/\|F^T\|_2\|_1` of factors.

    Args:
        student: factor ``[B, ...]``, a translator's output for the student's features.
        teacher: factor of the same shape, a pretrained paraphraser's output for the teacher's; receives no gradient.
        variant: ``paper`` sums over elements; ``authors``, the code of the published weights, averages over them.

    Returns:
        Zero, with zero gradient, when student equals teacher.

    Reference: Kim, Park, Kwak, Paraphrasing Complex Network: Network Compression via Factor Transfer (NeurIPS 2018),
    the factor transfer loss with p = 1.
    """
    student, teacher = _pair(student, teacher, mask)
    return reduce(over_elements((unit(student) - unit(teacher)).abs(), variant), mask, reduction)


@without_autocast
def overhaul(
    student: Tensor, teacher: Tensor, margin: Tensor, *, mask: Mask = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Overhaul of feature distillation: partial L2 to the teacher's features before ReLU.

    The teacher's features pass a margin ReLU, :math:`t = \max(F^T, m_c)`. The loss of an element is
    :math:`(t - s)^2`, and 0 where :math:`s \le t \le 0`: there the ReLU sets both to zero.

    Args:
        student: projected features ``[B, C, ...]``, before any ReLU.
        teacher: features of the same shape, before ReLU; receives no gradient.
        margin: ``[C]``, negative, per channel of the teacher: :func:`overhaul_margin`.

    Returns:
        Sum over elements; zero, with zero gradient, when student equals teacher.

    Reference: Heo et al., A Comprehensive Overhaul of Feature Distillation (ICCV 2019), margin ReLU and partial L2
    distance. The published numbers use the weights of their code: 1/1000, halved at every earlier stage.
    """
    margin = _per_channel("margin", margin, student)
    student, teacher = float_rows(student, teacher, mask, 1)
    target = torch.maximum(teacher, margin.detach().to(teacher.dtype))
    off = (student.detach() <= target) & (target <= 0)
    squares = (target - student).square().masked_fill(off, 0.0)
    return reduce(per_example(squares).sum(-1), mask, reduction)


def overhaul_margin(weight: Tensor, bias: Tensor) -> Tensor:
    r"""Margins ``[C]`` for :func:`overhaul` from the teacher's batch norm before the ReLU.

    The mean of the negative part: :math:`E[x \mid x < 0]` with :math:`x \sim \mathcal N(\mathrm{bias},
    \mathrm{weight}^2)`. Just below 0 for a channel that is almost never negative, where the authors' code uses -3
    times its deviation.

    Args:
        weight: ``[C]``, the batch norm's scale.
        bias: ``[C]``, its shift.

    Reference: Heo et al. (2019), the teacher's transform.
    """
    check_same_shape(weight, bias)
    scale, shift = weight.detach().double().abs(), bias.detach().double()
    z = -shift / scale.clamp(min=torch.finfo(scale.dtype).tiny)
    # phi(z) / Phi(z) by logarithms, since both vanish; its limit beyond 30 deviations
    bounded = z.clamp(-30.0, 30.0)
    log_density = -0.5 * bounded.square() - 0.5 * math.log(2 * math.pi)
    hazard = (log_density - torch.special.log_ndtr(bounded)).exp()
    margin = torch.where(z > -30.0, shift - scale * hazard, -scale.square() / shift)
    return margin.to(as_float(weight).dtype)


def _per_channel(name: str, value: Tensor, features: Tensor) -> Tensor:
    """``value`` ``[C]``, shaped to broadcast over ``features`` ``[B, C, ...]``."""
    if features.ndim < 2 or value.shape != features.shape[1:2]:
        raise ValueError(
            f"{name} {tuple(value.shape)} must hold one value for each channel of features "
            f"{tuple(features.shape)}, the second dimension"
        )
    return value.view(-1, *[1] * (features.ndim - 2))


@without_autocast
def vid(
    student: Tensor,
    teacher: Tensor,
    spread: Tensor,
    *,
    epsilon: float = 1e-5,
    variant: Variant = "paper",
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Variational information distillation: :math:`\sum \log\sigma_c + (F^T - \mu(F^S))^2 / 2\sigma_c^2`.

    The negative log-likelihood, without its constant, of the teacher's features under a Gaussian whose mean the
    student predicts and whose variance is learned per channel. It can be negative, and is not zero at equality.

    Args:
        student: predicted mean ``[B, C, ...]``.
        teacher: features of the same shape; receives no gradient.
        spread: ``[C]``, learned: the variance is ``softplus(spread) + epsilon``. Receives a gradient.
        epsilon: least variance.
        variant: ``paper`` sums over elements; ``authors``, the code of the published numbers (weight 1), averages
            over them.

    Reference: Ahn et al., Variational Information Distillation for Knowledge Transfer (CVPR 2019), the Gaussian with
    a variance for each channel.
    """
    variance = F.softplus(as_float(_per_channel("spread", spread, student))) + epsilon
    student, teacher = float_rows(student, teacher, mask, 1)
    nll = per_example(0.5 * variance.log() + (teacher - student).square() / (2 * variance))
    return reduce(over_elements(nll, variant), mask, reduction)
