"""Losses on the relations between the examples of a batch.

Student and teacher are features ``[B, ...]`` of the same examples, of any two widths; all but the first dimension is
flattened. No example has a value of its own: ``mask`` deletes rows before the comparison, ``reduction="none"`` is an
error, and ``sum`` is the mean times the number of rows that count. The loss depends on how the data is batched.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tutelage.losses.common import (
    Mask,
    Reduction,
    Variant,
    batch_rows,
    check_choice,
    reduce_batch,
    unit,
    without_autocast,
)

CHUNK = 1 << 20
"""Most angles that :func:`rkd_angle` computes at a time."""


@without_autocast
def similarity(student: Tensor, teacher: Tensor, *, mask: Mask = None, reduction: Reduction = "mean") -> Tensor:
    r"""Similarity-preserving loss (SP): :math:`\tfrac1{B^2}\|G_S - G_T\|_F^2`.

    G is the ``[B, B]`` matrix of inner products of the examples, each row divided by its L2 norm.

    Args:
        student: features ``[B, ...]``.
        teacher: features ``[B, ...]`` of any width; receives no gradient.

    Returns:
        Zero, with zero gradient, when student equals teacher. A batch repeated k times is 1/k of it.

    Reference: Tung and Mori, Similarity-Preserving Knowledge Distillation (ICCV 2019), section 3.
    """
    student, teacher = batch_rows(student, teacher, mask, reduction)
    gap = unit(student @ student.T) - unit(teacher @ teacher.T)
    count = len(student)
    return reduce_batch(gap.square().sum() / max(count, 1) ** 2, count, reduction)


@without_autocast
def correlation(
    student: Tensor,
    teacher: Tensor,
    *,
    gamma: float = 0.4,
    order: int = 2,
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Correlation congruence (CC): :math:`\tfrac1{B^2}\|K_S - K_T\|_F^2`.

    K is the Gaussian kernel :math:`e^{-\gamma\|x-y\|^2}` of L2-normalised features, as its Taylor series
    :math:`e^{-2\gamma}\sum_{p=0}^{P} (2\gamma)^p (x \cdot y)^p / p!`.

    Args:
        student: features ``[B, ...]``.
        teacher: features ``[B, ...]`` of any width; receives no gradient.
        gamma: width of the kernel.
        order: P, highest power of the series, at least 1.

    Returns:
        Zero, with zero gradient, when student equals teacher. The same for a batch repeated k times.

    Reference: Peng et al., Correlation Congruence for Knowledge Distillation (ICCV 2019), the generalised kernel with
    the series to P = 2 and gamma = 0.4. "CC" in the CRD benchmark is another loss, on differences of neighbours in
    the batch.
    """
    if order < 1:
        raise ValueError(f"order={order}: must be at least 1; at 0 the kernel is constant and nothing is learned")
    student, teacher = batch_rows(student, teacher, mask, reduction)

    def kernel(x: Tensor) -> Tensor:
        x = unit(x)
        cosine = 2 * gamma * (x @ x.T)
        series = torch.ones_like(cosine)
        for p in range(order, 0, -1):  # Horner
            series = 1 + cosine * series / p
        return math.exp(-2 * gamma) * series

    count = len(student)
    gap = kernel(student) - kernel(teacher)
    return reduce_batch(gap.square().sum() / max(count, 1) ** 2, count, reduction)


@without_autocast
def pkt(
    student: Tensor, teacher: Tensor, *, variant: Variant = "paper", mask: Mask = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Probabilistic knowledge transfer: KL between the rows' distributions over their neighbours.

    :math:`p_{j|i} = K(x_i, x_j) / \sum_{k \ne i} K(x_i, x_k)` with :math:`K = (\cos + 1)/2`, for teacher and
    student; :math:`\tfrac1B \sum_i \sum_{j \ne i} p_{j|i} \log(p_{j|i} / q_{j|i})`.

    Args:
        student: features ``[B, ...]``.
        teacher: features ``[B, ...]`` of any width; receives no gradient.
        variant: ``paper`` excludes an example's similarity with itself. ``authors``, the code of the published
            weight, 30000, includes it, adds 1e-7 inside the logarithms, and averages over all B^2 pairs.
        mask: ``[B]``, true where the example counts; the others are deleted.
        reduction: ``mean`` is the formula above; ``sum`` is B times that, the paper's sum.

    Returns:
        Nats; zero, with zero gradient (``authors``: up to 1e-7), when student equals teacher, and always zero for
        fewer than 3 rows, which have at most one neighbour each.

    Reference: Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer (ECCV 2018),
    the cosine kernel.
    """
    check_choice("variant", variant, "paper", "authors")
    student, teacher = batch_rows(student, teacher, mask, reduction)
    count = len(student)
    if count < 2:
        return student[:0].sum()
    if variant == "authors":
        q, p = (k / k.sum(1, keepdim=True) for k in (_cosine_kernel(student), _cosine_kernel(teacher)))
        value = (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()
    else:
        (q, log_q), (p, log_p) = _neighbours(student), _neighbours(teacher)
        value = (p * (log_p - log_q)).sum() / count
    return reduce_batch(value, count, reduction)


def _cosine_kernel(x: Tensor) -> Tensor:
    """``[B, B]`` cosines, scaled to [0, 1]."""
    x = unit(x)
    return (x @ x.T + 1) / 2


def _neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, B]`` probabilities of each row's neighbours, without itself, and their logarithms."""
    # the kernel of exactly opposite vectors is 0, whose logarithm is infinite
    kernel = _cosine_kernel(x).clamp(min=torch.finfo(x.dtype).eps)
    others = kernel.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)
    total = others.sum(1, keepdim=True)
    return others / total, kernel.log() - total.log()


@without_autocast
def rkd_distance(student: Tensor, teacher: Tensor, *, mask: Mask = None, reduction: Reduction = "mean") -> Tensor:
    r"""Relational KD by distances: :math:`\tfrac1{B^2} \sum_{i,j} \ell(d^S_{ij}/\mu^S - d^T_{ij}/\mu^T)`.

    :math:`\ell` is the Huber loss with threshold 1, d the Euclidean distance, :math:`\mu` the mean of the distances
    above 0. If all features are equal, their distances stay 0.

    Args:
        student: features ``[B, ...]``.
        teacher: features ``[B, ...]`` of any width; receives no gradient.

    Returns:
        Zero, with zero gradient, when student equals teacher, also if scaled or shifted. The same for a batch
        repeated k times.

    Reference: Park et al., Relational Knowledge Distillation (CVPR 2019), section 3.2.1, which has the sum. The
    published weights (25, with 50 for angles) are for the authors' mean over all B^2 pairs, including a row with
    itself, as here.
    """
    student, teacher = batch_rows(student, teacher, mask, reduction)
    gap = F.smooth_l1_loss(_relative(_distances(student)), _relative(_distances(teacher)), reduction="sum")
    count = len(student)
    return reduce_batch(gap / max(count, 1) ** 2, count, reduction)


def _distances(x: Tensor) -> Tensor:
    """``[B, B]`` Euclidean distances, exactly 0 between equal rows, with zero gradient there."""
    # by differences: inner products would give equal rows a distance of a rounding error
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def _relative(distances: Tensor) -> Tensor:
    """Distances over the mean of those above 0."""
    apart = distances > 0
    mean = distances.sum() / apart.sum().clamp(min=1)
    return distances / torch.where(apart.any(), mean, torch.ones_like(mean))


@without_autocast
def rkd_angle(student: Tensor, teacher: Tensor, *, mask: Mask = None, reduction: Reduction = "mean") -> Tensor:
    r"""Relational KD by angles: :math:`\tfrac1{B^3} \sum_{i,j,k} \ell(\cos\angle^S_{ijk} - \cos\angle^T_{ijk})`.

    :math:`\cos\angle_{ijk} = \langle e_{ij}, e_{kj} \rangle` with :math:`e_{ij} = (x_i - x_j)/\|x_i - x_j\|`,
    zero between equal rows; :math:`\ell` is the Huber loss with threshold 1.

    Memory is that of ``[B, B]`` matrices: angles and the gradient are computed vertex by vertex from inner products.
    First derivatives only.

    Args:
        student: features ``[B, ...]``.
        teacher: features ``[B, ...]`` of any width; receives no gradient.

    Returns:
        Zero, with zero gradient, when student equals teacher, also if scaled or shifted. The same for a batch
        repeated k times.

    Reference: Park et al. (2019), section 3.2.2, which has the sum. The published weight, 50, is for the authors'
    mean over all B^3 triples, including degenerate ones, as here.
    """
    student, teacher = batch_rows(student, teacher, mask, reduction)
    count = len(student)
    value: Tensor = _AngleLoss.apply(*_corners(student), *_corners(teacher))
    return reduce_batch(value / max(count, 1) ** 3, count, reduction).to(student.dtype)


def _corners(x: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products and inverse distances, ``[B, B]``, which determine every angle."""
    # float64: an angle between close neighbours is a small difference of large products
    wide = x.dtype if x.device.type == "mps" else torch.float64
    distances = _distances(x)
    equal = distances == 0
    inverse = distances.masked_fill(equal, 1.0).to(wide).reciprocal().masked_fill(equal, 0.0)
    x = x.to(wide)
    centred = x - x.mean(0) if len(x) else x
    return centred @ centred.T, inverse


class _AngleLoss(torch.autograd.Function):
    """Sum over all triples of the Huber loss between two sets of angles.

    The gradient is computed in the forward pass, chunk by chunk: autograd would store B^3 numbers.
    """

    @staticmethod
    def forward(ctx: Any, gram_s: Tensor, inverse_s: Tensor, gram_t: Tensor, inverse_t: Tensor) -> Tensor:
        count = len(gram_s)
        total = gram_s.new_zeros(())
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_gram, d_inverse = torch.zeros_like(gram_s), torch.zeros_like(inverse_s)
        step = max(CHUNK // max(count, 1) ** 2, 1)
        for start in range(0, count, step):
            j = slice(start, start + step)
            angles = _angles(gram_s, inverse_s, j)
            gap = angles - _angles(gram_t, inverse_t, j)
            slope = gap.clamp(-1, 1)
            # Huber: slope * gap - slope^2 / 2, inside the threshold and outside
            total += torch.dot(slope.flatten(), gap.flatten())
            total -= 0.5 * torch.dot(slope.flatten(), slope.flatten())
            if not needs_grad:
                continue
            r = inverse_s[j]
            # angle_ik = r_i r_k n_ik with n_ik = g_ik - g_ij - g_kj + g_jj, symmetric in i and k
            inner = torch.where(r > 0, (slope * angles).sum(-1) / r, 0.0)
            d_inverse[j] += 2 * inner
            row = r * (slope @ r.unsqueeze(-1)).squeeze(-1)
            d_gram[j] -= 2 * row
            d_gram.diagonal()[j] += row.sum(-1)
            d_gram += torch.einsum("jik,ji,jk->ik", slope, r, r)
        ctx.save_for_backward(d_gram, d_inverse)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_gram, d_inverse = ctx.saved_tensors
        return grad * d_gram, grad * d_inverse, None, None


def _angles(gram: Tensor, inverse: Tensor, j: slice) -> Tensor:
    """Cosines ``[J, B, B]`` of the angles at the vertices ``j`` between all pairs of rows."""
    arm = gram[j] - 0.5 * gram.diagonal()[j].unsqueeze(-1)
    angles = gram - arm.unsqueeze(-1) - arm.unsqueeze(-2)
    return angles.mul_(inverse[j].unsqueeze(-1)).mul_(inverse[j].unsqueeze(-2))
