"""Losses on vectors ``[..., D]``: hidden states, embeddings of texts, and scores of rankers.

Every function works in float32 (float64 for float64 inputs) and sends no gradient to the teacher.
"""

import torch
from torch import Tensor

from tutelage.losses.common import (
    Mask,
    Reduction,
    Variant,
    batch_rows,
    float_rows,
    over_elements,
    reduce,
    reduce_batch,
    unit,
    without_autocast,
)


@without_autocast
def cosine(student: Tensor, teacher: Tensor, *, mask: Mask = None, reduction: Reduction = "mean") -> Tensor:
    r"""DistilBERT's loss of hidden states: :math:`1 - \cos(h^S, h^T)` of each vector.

    Computed as half the squared distance of the unit vectors, which is the same and exact near 0. The distance
    between a zero vector and any other is 0.5.

    Args:
        student: vectors ``[..., D]``, such as the hidden states ``[B, L, D]`` of tokens.
        teacher: the same shape; receives no gradient.

    Returns:
        Between 0 and 2; zero, with zero gradient, when student equals teacher, in any positive scale.

    Reference: Sanh et al., DistilBERT (2019), section 2, the cosine embedding loss of the last hidden states.
    """
    student, teacher = float_rows(student, teacher, mask)
    return reduce(0.5 * (unit(student) - unit(teacher)).square().sum(-1), mask, reduction)


@without_autocast
def patient(
    student: Tensor, teacher: Tensor, *, variant: Variant = "paper", mask: Mask = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Patient knowledge distillation: :math:`\| h^S/\|h^S\|_2 - h^T/\|h^T\|_2 \|_2^2` of a layer's [CLS] state.

    Args:
        student: states ``[..., D]``, one for each text.
        teacher: the same shape; receives no gradient.
        variant: ``paper`` sums over the elements of a state; ``authors``, the code of the published weights (10 to
            1000), averages over them.

    Returns:
        ``paper``: between 0 and 4, twice :func:`cosine`. Zero, with zero gradient, when student equals teacher.

    Reference: Sun et al., Patient Knowledge Distillation for BERT Model Compression (EMNLP 2019), the loss of the
    patient teacher.
    """
    student, teacher = float_rows(student, teacher, mask)
    return reduce(over_elements((unit(student) - unit(teacher)).square(), variant), mask, reduction)


@without_autocast
def cosine_matrix(student: Tensor, teacher: Tensor, *, mask: Mask = None, reduction: Reduction = "mean") -> Tensor:
    r"""Similarities of embeddings: :math:`\tfrac{1}{B(B-1)} \sum_{i \ne j} (\cos^S_{ij} - \cos^T_{ij})^2`.

    A search by embeddings ranks by these similarities. A text's similarity with itself, always 1, is excluded.

    Args:
        student: embeddings ``[B, D]``.
        teacher: embeddings ``[B, D']`` of the same texts, of any width; receives no gradient.

    Returns:
        Zero, with zero gradient, when student equals teacher, in any rotation. 0 for fewer than two texts.

    Reference: the pairwise similarities of Tung and Mori (ICCV 2019), of unit vectors and without their row norms, as
    sentence embeddings are compared (Reimers and Gurevych, Sentence-BERT, EMNLP 2019).
    """
    student, teacher = batch_rows(student, teacher, mask, reduction)
    count = len(student)
    student, teacher = unit(student), unit(teacher)
    gap = (student @ student.T - teacher @ teacher.T).square()
    others = gap.masked_fill(torch.eye(count, dtype=torch.bool, device=gap.device), 0.0)
    return reduce_batch(others.sum() / max(count * (count - 1), 1), count, reduction)


@without_autocast
def margin_mse(student: Tensor, teacher: Tensor, *, mask: Mask = None, reduction: Reduction = "mean") -> Tensor:
    r"""Margin-MSE: :math:`\tfrac{1}{P-1} \sum_{j>0} ((s^S_0 - s^S_j) - (s^T_0 - s^T_j))^2` of a query's scores.

    For rankers with scores of different scales, such as a bi-encoder student of a cross-encoder: only the differences
    to the relevant passage are compared.

    Args:
        student: scores ``[..., P]`` of a query's passages, P at least 2; the first is the relevant one.
        teacher: the same shape; receives no gradient.

    Returns:
        Zero, with zero gradient, when student equals teacher, up to a constant for each query.

    Reference: Hofstaetter et al., Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
    Distillation (2020), section 3, which has one irrelevant passage.
    """
    if student.ndim < 1 or student.shape[-1] < 2:
        raise ValueError(
            f"scores {tuple(student.shape)} have fewer than two passages for a query, and a margin needs two: "
            "give [..., P], the relevant one first"
        )
    student, teacher = float_rows(student, teacher, mask)
    gap = student - teacher
    return reduce((gap[..., :1] - gap[..., 1:]).square().mean(-1), mask, reduction)
