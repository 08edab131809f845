"""Token losses from hidden states and heads: the logits over a vocabulary exist for some tokens at a time only.

The logits of 8,192 tokens over a vocabulary of 128,256 are 4 GB in float32, and a loss on them keeps several such
tensors until the backward pass. Here a chunk's logits are computed, compared, turned into gradients and dropped.
"""

from collections.abc import Sequence

from torch import Tensor

from tutelage.losses.chunked import Weight, chunked_losses
from tutelage.losses.common import Mask, Reduction, check_choice
from tutelage.losses.terms import (
    CrossVocabularyTargets,
    HardTargets,
    HeadLike,
    SoftTargets,
    TeacherDistribution,
    build_problem,
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
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""A divergence of the logits of two heads, without all logits at once: :math:`T^2\,D(p^T, p^S) +
    w\,\mathrm{CE}`.

    Value and gradients are those of :func:`kd`, :func:`reverse_kl`, :func:`js`, :func:`skew_kl` or :func:`tvd` on all
    logits at once. Memory grows with tokens times hidden size only: gradients of the hidden states and of the head
    are summed chunk by chunk in the forward pass, and only scaled in the backward pass. Tokens that do not count are
    removed before the projection. Without gradients (``torch.no_grad``, everything frozen) none are computed. With
    ``reduction="none"`` gradients are computed in the backward pass, which projects once more.

    Args:
        student_hidden: ``[..., D]``, the head's input. bf16 and fp16 are projected in their precision, under autocast
            in that of autocast; everything else, and every sum over tokens, is float32.
        student_head: weight ``[V, D]``, or a :class:`LinearHead` with bias, scale, soft cap or LoRA.
        teacher: hidden states ``[..., D']`` and a head; or logits ``[..., V]``; or :class:`TopKTargets` or
            :class:`SampledTargets`, for ``kl`` only, at this temperature. Receives no gradient.
        divergence: ``kl``, ``reverse_kl``, ``js``, ``skew_kl`` or ``tvd``.
        temperature: T, above 0.
        beta: of ``js``; default 0.5.
        alpha: of ``skew_kl``; default 0.1.
        reverse: of ``skew_kl``; default false.
        labels: ``[...]``, the token of each position, already shifted; -100 for none: the position is still learned
            from the teacher. Pass ``mask=labels != -100`` to exclude it.
        ce_weight: w, of the cross-entropy with the labels, at T = 1 and averaged over positions with a label.
        vocabulary: how many rows of the heads, or of the teacher's logits, are tokens; the rest is padding, whose
            size may differ. Padding gets neither probability nor gradient. Default: all.
        chunk: tokens at a time; default: a size that suits device and vocabulary.
        mask: ``[...]``, true where the token counts.
        reduction: ``mean`` over tokens that count, ``sum``, or ``none`` for ``[...]``.

    Returns:
        Nats times T^2, plus w times nats. A zero that is connected to the student if no token counts.

    Raises:
        ValueError: shapes do not fit, vocabularies differ, an option that the divergence does not have or that is out
            of range, or a divergence other than ``kl`` with top-k or sampled targets.

    Reference: Hsu et al., Liger Kernel (2024), section 3.2, for chunks of the head's output; for the divergences see
    the losses named above.
    """
    if ce_weight and labels is None:
        raise ValueError(f"ce_weight={ce_weight} and no labels: pass the token of each position, or leave it 0")
    if not ce_weight >= 0:
        raise ValueError(f"ce_weight={ce_weight}: must be 0 or more")
    terms: list[SoftTargets | HardTargets] = [
        SoftTargets(teacher, divergence, temperature, beta, alpha, reverse, mask)
    ]
    if ce_weight and labels is not None:
        terms.append(HardTargets(labels, mask))
    factors = [1.0, ce_weight][: len(terms)]
    return _weighted_sum(student_hidden, student_head, terms, factors, vocabulary, chunk, reduction)


def linear_sums(
    student_hidden: Tensor,
    student_head: HeadLike,
    terms: Sequence[SoftTargets | HardTargets | CrossVocabularyTargets],
    *,
    weights: Sequence[Weight] | None = None,
    vocabulary: int | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, ...]:
    """Several losses of one student's logits, each a sum over its own tokens, from one projection.

    For a method whose terms are weighted later. Gradients are correct with any later weights. If these equal
    ``weights``, up to a common factor, one gradient of the head is computed, in the forward pass. Otherwise it is
    computed in the backward pass, which projects student and teachers once more.

    Args:
        student_hidden: as in :func:`linear_divergence`, as are ``student_head``, ``vocabulary`` and ``chunk``.
        terms: the losses; their tokens may differ.
        weights: of each sum in the loss that will be differentiated, scalars above 0.

    Returns:
        A scalar for each term, float32 or more, connected to the student also if no token counts.

    Raises:
        ValueError: as :func:`linear_divergence`, or the numbers of weights and terms differ.
    """
    if weights is not None and len(weights) != len(terms):
        raise ValueError(f"{len(weights)} weights for {len(terms)} terms: give one for each, or none at all")
    problem = build_problem(student_hidden, student_head, terms, vocabulary, chunk, per_token=False)
    return chunked_losses(problem, student_hidden.reshape(-1, student_hidden.shape[-1]), weights)[1:]


def linear_cross_entropy(
    student_hidden: Tensor,
    student_head: HeadLike,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    vocabulary: int | None = None,
    chunk: int | None = None,
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of a head's logits, without all logits at once: :math:`-w_t \log p^S(y_t)`.

    Args:
        student_hidden: ``[..., D]``, as in :func:`linear_divergence`, as are ``student_head``, ``vocabulary`` and
            ``chunk``.
        labels: ``[...]``, already shifted; -100 for none.
        token_weights: ``[...]``, w; default 1. The mean divides by the number of tokens that count.
        mask: ``[...]``, true where the token counts.
        reduction: ``mean`` over tokens that count and have a label, ``sum``, or ``none`` for ``[...]``, 0 elsewhere.

    Returns:
        Nats.

    Raises:
        ValueError: as :func:`linear_divergence`.
    """
    terms = [HardTargets(labels, mask, token_weights)]
    return _weighted_sum(student_hidden, student_head, terms, [1.0], vocabulary, chunk, reduction)


def _weighted_sum(
    hidden: Tensor,
    head: HeadLike,
    terms: Sequence[SoftTargets | HardTargets],
    factors: Sequence[float],
    vocabulary: int | None,
    chunk: int | None,
    reduction: Reduction,
) -> Tensor:
    """The reduced terms, each times its factor; a mean is over the term's own tokens."""
    check_choice("reduction", reduction, "none", "mean", "sum")
    problem = build_problem(hidden, head, terms, vocabulary, chunk, per_token=reduction == "none")
    flat = hidden.reshape(-1, hidden.shape[-1])
    if reduction == "none":
        _, *values = chunked_losses(problem, flat, None)
        total = sum((value * factor for value, factor in zip(values[1:], factors[1:], strict=True)), values[0])
        return total.view(hidden.shape[:-1])
    weights: list[Weight] = [*factors]
    if reduction == "mean":
        counts = [len(flat) if part.mask is None else int(part.mask.sum()) for part in problem.parts]
        weights = [factor / max(count, 1) for factor, count in zip(factors, counts, strict=True)]
    return chunked_losses(problem, flat, weights)[0]
