"""Losses on the attention of transformers.

Attention scores are ``[B, H, L, L]``: query by key, before the softmax and before any mask is added. An example is a
query token, so a loss is averaged over all tokens of the batch that count. ``mask`` is ``[B, L]``, true at tokens and
false at padding, which counts neither as query nor as key; or ``[B, L, L]``, true where a query may attend to a key,
for causal attention. ``reduction="none"`` gives ``[B, L]``. float32 inside (float64 for float64 inputs), no gradient
to the teacher.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.losses.common import (
    Mask,
    Reduction,
    as_booleans,
    as_float,
    check_choice,
    check_same_batch,
    check_temperature,
    reduce,
    without_autocast,
)
from tutelage.losses.logits import divergence

Heads = Literal["each", "mean"]

HIDDEN = -1e30
"""Score of a masked key. Finite, because minus infinity on both sides gives NaN."""


@without_autocast
def attention_mse(
    student: Tensor, teacher: Tensor, *, heads: Heads = "each", mask: Mask = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""TinyBERT's attention loss: :math:`\tfrac1H \sum_h \mathrm{MSE}(A^S_h, A^T_h)` of the scores.

    Args:
        student: scores ``[B, H, L, L]``.
        teacher: scores ``[B, H, L, L]``; receives no gradient.
        heads: ``each`` compares head by head; ``mean`` compares the scores averaged over heads, whose numbers may
            differ.

    Returns:
        Mean square over heads and keys; zero, with zero gradient, when student equals teacher.

    Reference: Jiao et al., TinyBERT (EMNLP Findings 2020), equation 7: unnormalised scores.
    """
    student, teacher = _scores(student, teacher, heads)
    pairs, tokens = _visible(mask, student)
    if pairs is None:
        return reduce((student - teacher).square().mean((1, -1)), None, reduction)
    hidden = ~pairs.unsqueeze(1)
    gap = student.masked_fill(hidden, 0.0) - teacher.masked_fill(hidden, 0.0)
    value = gap.square().mean(1).sum(-1) / pairs.sum(-1).clamp(min=1)
    return reduce(value, tokens, reduction)


@without_autocast
def attention_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    heads: Heads = "each",
    inputs: Literal["scores", "probabilities"] = "scores",
    temperature: float = 1.0,
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""MiniLM's attention transfer: :math:`\tfrac1H \sum_h T^2\,\mathrm{KL}(A^T_h \| A^S_h)` of each query.

    Args:
        student: scores ``[B, H, L, L]``, divided by the root of the head width.
        teacher: scores ``[B, H, L, L]``; receives no gradient.
        heads: ``each`` compares head by head; ``mean`` compares the distributions averaged over heads, whose numbers
            may differ.
        inputs: ``probabilities`` for attention after the softmax, such as ``attentions`` of a Hugging Face model.
        temperature: T of the softmax, above 0.

    Returns:
        Nats times T^2; zero, with zero gradient, when student equals teacher.

    Reference: Wang et al., MiniLM (NeurIPS 2020), self-attention distribution transfer, with T = 1.
    """
    check_choice("inputs", inputs, "scores", "probabilities")
    check_temperature(temperature)
    student, teacher = _scores(student, teacher, heads, average=False)
    pairs, tokens = _visible(mask, student)
    if pairs is not None:
        hidden = ~pairs.unsqueeze(1)
        student, teacher = student.masked_fill(hidden, 1.0), teacher.masked_fill(hidden, 1.0)
    if inputs == "probabilities":
        student, teacher = (x.clamp(min=torch.finfo(x.dtype).tiny).log() for x in (student, teacher))
    value = _relation_kl(student, teacher, pairs, temperature, average=heads == "mean")
    return reduce(value, tokens, reduction)


@without_autocast
def value_relation(
    student: Tensor,
    teacher: Tensor,
    *,
    heads: int = 12,
    temperature: float = 1.0,
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""MiniLM's relation loss: KL between :math:`\mathrm{softmax}(V V^\top/\sqrt{d})` of teacher and student.

    For values (v1), and also for queries and keys (v2). The vectors of all heads are joined and split again into
    ``heads`` relation heads, so widths and numbers of attention heads may differ: a relation is always ``[L, L]``.

    Args:
        student: values ``[B, L, D]`` of a layer, heads joined.
        teacher: values ``[B, L, D']``; receives no gradient.
        heads: relation heads; must divide D and D'. v1: the number of attention heads, equal in both. v2: the
            published numbers use 48 (base) and 64 (large teachers).
        temperature: T of the softmax, above 0.

    Returns:
        Nats times T^2, averaged over relation heads; zero, with zero gradient, when student equals teacher.

    Reference: Wang et al., MiniLM (NeurIPS 2020), value-relation transfer; MiniLMv2 (ACL Findings 2021).
    """
    check_temperature(temperature)
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be values [B, L, D] of "
            "the same tokens, heads joined: join [B, H, L, d] with transpose(1, 2).flatten(2)"
        )
    for name, x in (("student", student), ("teacher", teacher)):
        if heads < 1 or x.shape[-1] % heads:
            raise ValueError(
                f"heads={heads} does not divide the {name}'s width {x.shape[-1]}: vectors would be cut "
                "unevenly; choose a common divisor of both widths"
            )
    student, teacher = as_float(student), as_float(teacher).detach()
    pairs, tokens = _visible(mask, student.unsqueeze(1))
    if tokens is not None:
        # NaN in a padded token would reach the others through the products
        present = tokens if mask is None or mask.ndim == 2 else tokens | as_booleans(mask).any(-2)
        hidden = ~present.unsqueeze(-1)
        student, teacher = student.masked_fill(hidden, 0.0), teacher.masked_fill(hidden, 0.0)
    value = _relation_kl(_products(student, heads), _products(teacher, heads), pairs, temperature)
    return reduce(value, tokens, reduction)


def _products(x: Tensor, heads: int) -> Tensor:
    """``[B, heads, L, L]`` scaled inner products of tokens."""
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return x @ x.mT / x.shape[-1] ** 0.5


def _relation_kl(
    student: Tensor, teacher: Tensor, pairs: Tensor | None, temperature: float, average: bool = False
) -> Tensor:
    """``[B, L]`` T^2 times the KL of each query's distribution over its visible keys, mean over heads."""

    def log_attention(scores: Tensor) -> Tensor:
        if pairs is not None:
            scores = scores.masked_fill(~pairs.unsqueeze(1), HIDDEN)
        log_p = F.log_softmax(scores.clamp(min=HIDDEN) / temperature, dim=-1)
        if average:
            log_p = log_p.logsumexp(1, keepdim=True) - math.log(scores.shape[1])
        return log_p

    return divergence(log_attention(teacher), log_attention(student)).mean(1) * temperature**2


def _scores(student: Tensor, teacher: Tensor, heads: Heads, average: bool = True) -> tuple[Tensor, Tensor]:
    """Scores in working precision; with one head, their mean, if ``average`` and ``heads`` is ``mean``."""
    check_choice("heads", heads, "each", "mean")
    check_same_batch(student, teacher)
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be attention "
            "[B, H, L, L] over the same tokens: use one tokenizer for both"
        )
    if heads == "each" and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student has {student.shape[1]} heads and teacher {teacher.shape[1]}, which cannot be compared "
            'head by head; use heads="mean", or value_relation'
        )
    student, teacher = as_float(student), as_float(teacher).detach()
    if average and heads == "mean":
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    return student, teacher


def _visible(mask: Mask, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The visible keys of each query, ``[B, L, L]``, and the queries that count, ``[B, L]``."""
    if mask is None:
        return None, None
    batch, length = x.shape[0], x.shape[-2]
    if mask.shape == (batch, length):
        tokens = as_booleans(mask)
        return tokens.unsqueeze(-1) & tokens.unsqueeze(-2), tokens
    if mask.shape == (batch, length, length):
        return as_booleans(mask), as_booleans(mask).any(-1)
    raise ValueError(
        f"mask {tuple(mask.shape)} must be [B, L], true at tokens, or [B, L, L], true where a query attends to "
        f"a key, here with B = {batch} and L = {length}"
    )
