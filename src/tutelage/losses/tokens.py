"""Losses of tokens from hidden states and heads: the scores of a vocabulary exist for some tokens at a time only.

The scores of 8,192 tokens over a vocabulary of 128,256 are 4 GB in float32, and a loss on them keeps several such
tensors until the backward pass. Here a chunk's scores are made, compared, turned into gradients and dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tutelage.losses.chunked import chunked_losses
from tutelage.losses.common import Reduction, check_choice
from tutelage.losses.terms import (
    CrossVocabularyTargets,
    HardTargets,
    HeadLike,
    SoftTargets,
    TeacherDistribution,
    problem_of,
)


def linear_divergence(
    student_hidden: Tensor,
    student_head: HeadLike,
    teacher: TeacherDistribution,
    *,
    divergence: str = "kl",
    temperature: float = 1.0,
    beta: float | None = None,
    alpha: float | None = None,
    reverse: bool | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    vocabulary: int | None = None,
    chunk: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""A divergence of the scores that heads make, without the scores: :math:`T^2\,D(p^T, p^S) + w\,\mathrm{CE}`.

    Value and gradients are those of :func:`kd`, :func:`reverse_kl`, :func:`js`, :func:`skew_kl` or :func:`tvd` on all
    scores at once. Memory grows with tokens by the hidden size alone: gradients of the hidden states and of the head
    are summed chunk by chunk in the forward pass, and only scaled in the backward pass. Tokens that do not count are
    left out before anything is projected. Without a gradient to make (``torch.no_grad``, all frozen) none is made.
    With ``reduction="none"`` gradients wait for the backward pass, which projects once more.

    Args:
        student_hidden: ``[..., D]``, what goes into the head. bf16 and fp16 are projected as they are, under autocast
            in its precision; all else, and every sum over tokens, is float32.
        student_head: weight ``[V, D]``, or a :class:`LinearHead` with bias, scale, soft cap or LoRA.
        teacher: hidden states ``[..., D']`` and a head; or logits ``[..., V]``; or :class:`TopKTargets` or
            :class:`SampledTargets`, for ``kl`` alone, made at this temperature. No gradient reaches it.
        divergence: ``kl``, ``reverse_kl``, ``js``, ``skew_kl`` or ``tvd``.
        temperature: T, above 0.
        beta: of ``js``; default 0.5.
        alpha: of ``skew_kl``; default 0.1.
        reverse: of ``skew_kl``; default false.
        labels: ``[...]``, the token of each position, already shifted; -100 for one without, which the teacher still
            teaches. Pass ``mask=labels != -100`` to leave it out altogether.
        ce_weight: w, of the cross-entropy with the labels, at T = 1 and averaged over those.
        vocabulary: how many rows of the heads, or teacher's logits, are real; what is behind them is padding, of
            which student and teacher may have different amounts. It gets neither probability nor gradient. Default:
            all.
        chunk: tokens at a time; default: what suits device and vocabulary.
        mask: ``[...]``, true where the token counts.
        reduction: ``mean`` over tokens that count, ``sum``, or ``none`` for ``[...]``.

    Returns:
        Nats times T^2, plus w times nats. A zero that is connected to the student where no token counts.

    Raises:
        ValueError: shapes do not fit, vocabularies differ, an option that the divergence does not have or that is out
            of range, or a divergence that a part of the teacher's distribution cannot give.

    Reference: Hsu et al., Liger Kernel (2024), section 3.2, on chunks of the head's output; for the divergences see
    the losses named above.
    """
    if ce_weight and labels is None:
        raise ValueError(f"ce_weight={ce_weight} and no labels: pass the token of each position, or leave it 0")
    if not ce_weight >= 0:
        raise ValueError(f"ce_weight={ce_weight}: must be 0 or more")
    check_choice("reduction", reduction, "none", "mean", "sum")
    terms: list[SoftTargets | HardTargets] = [
        SoftTargets(teacher, divergence, temperature, beta, alpha, reverse, mask)
    ]
    if ce_weight:
        assert labels is not None
        terms.append(HardTargets(labels, mask))
    problem = problem_of(student_hidden, student_head, terms, vocabulary, chunk, each=reduction == "none")
    factors = [1.0, ce_weight][: len(terms)]
    flat = student_hidden.reshape(-1, student_hidden.shape[-1])
    if reduction == "none":
        _, *each = chunked_losses(problem, flat, None)
        total = sum((value * factor for value, factor in zip(each[1:], factors[1:], strict=True)), each[0])
        return total.view(student_hidden.shape[:-1])
    weights: list[float | Tensor] = [*factors]
    if reduction == "mean":
        weights = [w / _count(part.mask, len(flat)) for w, part in zip(factors, problem.parts, strict=True)]
    return chunked_losses(problem, flat, weights)[0]


def linear_sums(
    student_hidden: Tensor,
    student_head: HeadLike,
    terms: Sequence[SoftTargets | HardTargets | CrossVocabularyTargets],
    *,
    weights: Sequence[float | Tensor] | None = None,
    vocabulary: int | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, ...]:
    """Several losses of one student's scores, each a sum over its own tokens, from one projection.

    For a method whose terms are weighted later, by other hands. Whatever weights they get, gradients are right; if
    they are those that ``weights`` promised, up to a common factor, one gradient of the head is made, in the forward
    pass. Else there is none until the backward pass, which projects student and teachers once more.

    Args:
        student_hidden: as in :func:`linear_divergence`, as are ``student_head``, ``vocabulary`` and ``chunk``.
        student_head: the head.
        terms: what to sum; their tokens may differ.
        weights: of each sum in the loss that will be differentiated, scalars above 0.
        vocabulary: how many rows are real.
        chunk: tokens at a time.

    Returns:
        A scalar for each term, float32 or more, connected to the student also where no token counts.

    Raises:
        ValueError: as :func:`linear_divergence`, and a promise for other terms than there are.
    """
    if weights is not None and len(weights) != len(terms):
        raise ValueError(f"{len(weights)} weights for {len(terms)} terms: give one for each, or none at all")
    problem = problem_of(student_hidden, student_head, terms, vocabulary, chunk, each=False)
    return chunked_losses(problem, student_hidden.reshape(-1, student_hidden.shape[-1]), weights)[1:]


def linear_cross_entropy(
    student_hidden: Tensor,
    student_head: HeadLike,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    vocabulary: int | None = None,
    chunk: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of the scores that a head makes, without the scores: :math:`-w_t \log p^S(y_t)`.

    Args:
        student_hidden: ``[..., D]``, as in :func:`linear_divergence`, as are ``student_head``, ``vocabulary``,
            ``chunk`` and ``mask``.
        student_head: the head.
        labels: ``[...]``, already shifted; -100 for one without.
        token_weights: ``[...]``, w; default 1. The mean divides by tokens that count, whatever these are.
        vocabulary: how many rows are real.
        chunk: tokens at a time.
        mask: true where the token counts.
        reduction: ``mean`` over tokens that count and have a label, ``sum``, or ``none`` for ``[...]``, 0 elsewhere.

    Returns:
        Nats.

    Raises:
        ValueError: as :func:`linear_divergence`.
    """
    check_choice("reduction", reduction, "none", "mean", "sum")
    terms = [HardTargets(labels, mask, token_weights)]
    problem = problem_of(student_hidden, student_head, terms, vocabulary, chunk, each=reduction == "none")
    flat = student_hidden.reshape(-1, student_hidden.shape[-1])
    if reduction == "none":
        return chunked_losses(problem, flat, None)[1].view(student_hidden.shape[:-1])
    weight = 1.0 if reduction == "sum" else 1.0 / _count(problem.parts[0].mask, len(flat))
    return chunked_losses(problem, flat, [weight])[0]


def _count(mask: Tensor | None, count: int) -> int:
    return max(count if mask is None else int(mask.sum()), 1)
