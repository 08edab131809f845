"""Losses of tokens from hidden states and heads: the scores of a vocabulary exist for some tokens at a time only.

The scores of 8,192 tokens over a vocabulary of 128,256 are 4 GB in float32, and a loss on them keeps several such
tensors until the backward pass. Here a chunk's scores are made, compared, turned into gradients and dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage.objectives.chunked import Few, Part, Problem, Rows, losses
from tutelage.objectives.common import (
    Reduction,
    check_choice,
    check_mask,
    check_temperature,
)
from tutelage.objectives.crossed import Comparison, Rest, over_shared, sorted_distance
from tutelage.objectives.heads import LinearHead, Scores, as_head
from tutelage.objectives.kernels import kernel_for
from tutelage.objectives.logits import IGNORE
from tutelage.objectives.slopes import DIVERGENCES, Divergence, Sloped, labelled, sampled, topk


@dataclass(frozen=True)
class TopK:
    """A teacher's k largest classes; all others are one outcome with the rest of the mass (``topk_kd``).

    Attributes:
        index: ``[..., k]``, each once.
        log_probs: ``[..., k]``, at the temperature of the loss, natural logarithm.
    """

    index: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Sampled:
    """Draws from a teacher's distribution (``sampled_kd``).

    Attributes:
        index: ``[..., k]``; one may come several times.
        weights: ``[..., k]``, whose expectation is the distribution at the temperature of the loss.
    """

    index: Tensor
    weights: Tensor


Head = Tensor | LinearHead
Teaching = tuple[Tensor, Head] | Tensor | TopK | Sampled
"""What a teacher says: (hidden states ``[..., D']``, head), logits ``[..., V]``, or part of a distribution."""


@dataclass(frozen=True)
class Soft:
    """A term of :func:`linear_sums`: T^2 times a divergence from the teacher.

    Attributes:
        teacher: as in :func:`linear_divergence`, as are ``divergence``, ``temperature``, ``beta``, ``alpha`` and
            ``reverse``.
        mask: ``[...]``, true where the token counts.
        token_weights: as of :class:`Hard`.
    """

    teacher: Teaching
    divergence: str = "kl"
    temperature: float = 1.0
    beta: float | None = None
    alpha: float | None = None
    reverse: bool | None = None
    mask: Tensor | None = None
    token_weights: Tensor | None = None


@dataclass(frozen=True)
class Crossed:
    """A term of :func:`linear_sums`: T^2 times the distance from a teacher with another vocabulary.

    Attributes:
        teacher: hidden states ``[..., D']`` and a head, or logits ``[..., V']``, at the student's positions.
        shared: the ids of the entries that both have, ``[S]`` of the student and ``[S]`` of the teacher. All others
            are one outcome. ``None``: sorted probabilities are compared (:func:`uld`), whatever ``divergence`` is.
        rest: of ``shared``; with ``uld``, sorted probabilities of the others are compared besides.
        divergence: of ``shared``, as in :func:`linear_divergence`, as are ``temperature``, ``beta``, ``alpha`` and
            ``reverse``.
        mask: ``[...]``, true where the token counts.
    """

    teacher: tuple[Tensor, Head] | Tensor
    shared: tuple[Tensor, Tensor] | None = None
    rest: Rest = "bucket"
    divergence: str = "kl"
    temperature: float = 1.0
    beta: float | None = None
    alpha: float | None = None
    reverse: bool | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Hard:
    """A term of :func:`linear_sums`: cross-entropy at T = 1.

    Attributes:
        labels: ``[...]``, the token of each position, or -100; they are not shifted here.
        mask: ``[...]``, true where the token counts.
        token_weights: ``[...]``, by what each token's loss is multiplied, of any sign. No gradient reaches them.
    """

    labels: Tensor
    mask: Tensor | None = None
    token_weights: Tensor | None = None


def linear_divergence(
    student_hidden: Tensor,
    student_head: Head,
    teacher: Teaching,
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
        teacher: hidden states ``[..., D']`` and a head; or logits ``[..., V]``; or :class:`TopK` or :class:`Sampled`,
            for ``kl`` alone, made at this temperature. No gradient reaches it.
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
    the objectives named above.
    """
    if ce_weight and labels is None:
        raise ValueError(f"ce_weight={ce_weight} and no labels: pass the token of each position, or leave it 0")
    if not ce_weight >= 0:
        raise ValueError(f"ce_weight={ce_weight}: must be 0 or more")
    check_choice("reduction", reduction, "none", "mean", "sum")
    terms: list[Soft | Hard] = [Soft(teacher, divergence, temperature, beta, alpha, reverse, mask)]
    if ce_weight:
        assert labels is not None
        terms.append(Hard(labels, mask))
    problem = _problem(student_hidden, student_head, terms, vocabulary, chunk, each=reduction == "none")
    factors = [1.0, ce_weight][: len(terms)]
    flat = student_hidden.reshape(-1, student_hidden.shape[-1])
    if reduction == "none":
        _, *each = losses(problem, flat, None)
        total = sum((value * factor for value, factor in zip(each[1:], factors[1:], strict=True)), each[0])
        return total.view(student_hidden.shape[:-1])
    weights: list[float | Tensor] = [*factors]
    if reduction == "mean":
        weights = [w / _count(part.mask, len(flat)) for w, part in zip(factors, problem.parts, strict=True)]
    return losses(problem, flat, weights)[0]


def linear_sums(
    student_hidden: Tensor,
    student_head: Head,
    terms: Sequence[Soft | Hard | Crossed],
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
    problem = _problem(student_hidden, student_head, terms, vocabulary, chunk, each=False)
    return losses(problem, student_hidden.reshape(-1, student_hidden.shape[-1]), weights)[1:]


def linear_cross_entropy(
    student_hidden: Tensor,
    student_head: Head,
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
    terms = [Hard(labels, mask, token_weights)]
    problem = _problem(student_hidden, student_head, terms, vocabulary, chunk, each=reduction == "none")
    flat = student_hidden.reshape(-1, student_hidden.shape[-1])
    if reduction == "none":
        return losses(problem, flat, None)[1].view(student_hidden.shape[:-1])
    weight = 1.0 if reduction == "sum" else 1.0 / _count(problem.parts[0].mask, len(flat))
    return losses(problem, flat, [weight])[0]


# ------------------------------------------------------------------ parts


def _count(mask: Tensor | None, count: int) -> int:
    return max(count if mask is None else int(mask.sum()), 1)


def _problem(
    hidden: Tensor,
    head: Head,
    terms: Sequence[Soft | Hard | Crossed],
    vocabulary: int | None,
    chunk: int | None,
    *,
    each: bool,
) -> Problem:
    """Everything checked, and flattened to one dimension of tokens."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"student_hidden must be a tensor, not {type(hidden).__name__}")
    head = as_head(head)
    _check_width("student's hidden states", hidden, head)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: must be 1 token or more, or None")
    size = _real("the student", head.rows, vocabulary)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if torch.float64 in (hidden.dtype, head.weight.dtype):
        dtype = None  # which autocast leaves alone
    shape = hidden.shape[:-1]
    parts = [_PARTS[type(term)](term, shape, size, vocabulary, dtype) for term in terms]
    return Problem(head, parts, size, dtype, chunk, each)


def _hard(term: Hard, shape: torch.Size, *_: object) -> Part:
    if term.labels.shape != shape:
        raise ValueError(f"labels {tuple(term.labels.shape)} must be one token for each of {tuple(shape)} positions")
    mask = term.labels != IGNORE
    if term.mask is not None:
        mask = mask & check_mask(term.mask, shape)

    def compare(scores: Tensor, own: tuple[Tensor, ...], learns: bool) -> Sloped:
        return labelled(scores.log_softmax(-1), own[0], learns)

    def few(log_q: Tensor, own: tuple[Tensor, ...]) -> Few:
        index = own[0].unsqueeze(-1)
        return Few(labelled(log_q, own[0], False).value, index, log_q.new_ones(index.shape))

    part = Part(mask.reshape(-1), _given(term.labels.reshape(-1)), compare, few)
    return _weighted(part, term.token_weights, shape)


def _weighted(part: Part, weights: Tensor | None, shape: torch.Size) -> Part:
    """``part`` with each token's loss multiplied."""
    if weights is None:
        return part
    if weights.shape != shape:
        raise ValueError(f"token_weights {tuple(weights.shape)} must be one for each of {tuple(shape)} positions")
    flat = weights.detach().reshape(-1)

    def opened() -> Callable[[Rows], tuple[Tensor, ...]]:
        take = part.open()
        return lambda rows: (*take(rows), flat[rows])

    def compare(scores: Tensor, own: tuple[Tensor, ...], learns: bool) -> Sloped:
        value, slope = part.compare(scores, own[:-1], learns)
        by = own[-1].to(value.dtype)
        return Sloped(value * by, None if slope is None else slope.mul_(by.to(slope.dtype).unsqueeze(-1)))

    return part._replace(open=opened, compare=compare, few=None)


def _soft(term: Soft, shape: torch.Size, size: int, vocabulary: int | None, dtype: torch.dtype | None) -> Part:
    check_temperature(term.temperature)
    mask = None if term.mask is None else check_mask(term.mask, shape).reshape(-1)
    divergence = _divergence(term.divergence, beta=term.beta, alpha=term.alpha, reverse=term.reverse)
    teacher = term.teacher
    if isinstance(teacher, TopK | Sampled):
        said, against = _sparse(term, teacher, shape)
    elif isinstance(teacher, Tensor):
        said, against = _logits(teacher, shape, size, vocabulary), _dense(term, divergence, None)
    else:
        head = as_head(teacher[1])
        said = _projected(teacher[0], head, shape, size, vocabulary, dtype)
        against = _dense(term, divergence, head)
    few = _drawn if isinstance(teacher, Sampled) and term.temperature == 1.0 else None
    return _weighted(Part(mask, said, against, few), term.token_weights, shape)


def _drawn(log_q: Tensor, own: tuple[Tensor, ...]) -> Few:
    """Of :class:`Sampled` at T = 1."""
    index, weights = own[0], own[1].to(log_q.dtype)
    even = (1.0 - weights.sum(-1, keepdim=True)) / log_q.shape[-1]
    return Few(sampled(log_q, index, weights, False).value, index, weights, even)


def _crossed(term: Crossed, shape: torch.Size, size: int, vocabulary: int | None, dtype: torch.dtype | None) -> Part:
    t = check_temperature(term.temperature)
    mask = None if term.mask is None else check_mask(term.mask, shape).reshape(-1)
    divergence = _divergence(term.divergence, beta=term.beta, alpha=term.alpha, reverse=term.reverse)
    head: LinearHead | None = None
    if isinstance(term.teacher, Tensor):
        theirs = term.teacher.shape[-1]
        said = _logits(term.teacher, shape, theirs, None)
    else:
        head = as_head(term.teacher[1])
        theirs = head.rows
        said = _projected(term.teacher[0], head, shape, theirs, None, dtype)
    against: Comparison = sorted_distance()
    if term.shared is not None:
        _check_shared(term.shared, size, theirs)
        against = over_shared(divergence, *term.shared, term.rest)

    def compare(scores: Tensor, own: tuple[Tensor, ...], learns: bool) -> Sloped:
        raw = (own[0] if head is None else head.finished(own[0])).to(scores.dtype)
        value, slope = against(scores if t == 1.0 else scores / t, raw if t == 1.0 else raw / t, learns)
        return Sloped(value.mul_(t**2), None if slope is None else slope.mul_(t))

    return Part(mask, said, compare)


def _check_shared(shared: tuple[Tensor, Tensor], student: int, teacher: int) -> None:
    own, theirs = shared
    fits = own.ndim == 1 and own.shape == theirs.shape and len(own)
    if not fits or int(own.max()) >= student or int(theirs.max()) >= teacher:
        raise ValueError(
            f"shared entries {tuple(own.shape)} and {tuple(theirs.shape)} must be lists of one length, of ids below "
            f"{student} (the student's vocabulary) and {teacher} (the teacher's)"
        )


_PARTS: dict[type, Callable[..., Part]] = {Crossed: _crossed, Hard: _hard, Soft: _soft}

Open = Callable[[], Callable[[Rows], tuple[Tensor, ...]]]
Against = Callable[[Tensor, tuple[Tensor, ...], bool], Sloped]


def check_divergence(
    name: str, beta: float | None = None, alpha: float | None = None, reverse: bool | None = None
) -> None:
    """Raise ``ValueError`` for an unknown divergence, or an option that it does not have or that is out of range.

    Args:
        name: of the divergence, as ``linear_divergence`` takes it.
        beta: of ``js``.
        alpha: of ``skew_kl``.
        reverse: of ``skew_kl``.
    """
    _divergence(name, beta=beta, alpha=alpha, reverse=reverse)


def _divergence(divergence: str, **given: Any) -> Divergence:
    check_choice("divergence", divergence, *DIVERGENCES)
    make = DIVERGENCES[divergence]
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if name not in inspect.signature(make).parameters:
            owners = [k for k, f in DIVERGENCES.items() if name in inspect.signature(f).parameters]
            raise ValueError(f"{name} is an option of {' and '.join(owners)}, not of {divergence}: leave it out")
    return make(**options)


def _given(*tensors: Tensor) -> Open:
    return lambda: lambda rows: tuple(x[rows] for x in tensors)


def _softened(scores: Tensor, t: float) -> Tensor:
    return (scores if t == 1.0 else scores / t).log_softmax(-1)


def _scaled(found: Sloped, t: float) -> Sloped:
    """By T^2, with the gradient by scores that are not softened."""
    return Sloped(found.value.mul_(t**2), None if found.slope is None else found.slope.mul_(t))


def _dense(term: Soft, divergence: Divergence, head: LinearHead | None) -> Against:
    """Against the teacher's raw scores."""
    t = term.temperature

    def against(scores: Tensor, own: tuple[Tensor, ...], learns: bool) -> Sloped:
        said = (own[0] if head is None else head.finished(own[0])).to(scores.dtype)
        kernel = kernel_for(term.divergence, scores)
        if kernel is not None:
            return kernel(scores, said, t, learns)
        return _scaled(divergence(_softened(scores, t), _softened(said, t), learns), t)

    return against


def _logits(logits: Tensor, shape: torch.Size, size: int, vocabulary: int | None) -> Open:
    _check_positions("teacher's logits", logits, shape)
    _check_vocabularies(size, logits.shape[-1], vocabulary)
    return _given(logits.detach().reshape(-1, logits.shape[-1])[:, :size])


def _projected(
    hidden: Tensor, head: LinearHead, shape: torch.Size, size: int, vocabulary: int | None, dtype: torch.dtype | None
) -> Open:
    _check_positions("teacher's hidden states", hidden, shape)
    _check_width("teacher's hidden states", hidden, head)
    _check_vocabularies(size, head.rows, vocabulary)
    flat = hidden.detach().reshape(-1, hidden.shape[-1])

    def opened() -> Callable[[Rows], tuple[Tensor, ...]]:
        with torch.no_grad():
            scores = Scores(head, head.tensors(), flat, size, dtype)
        return lambda rows: (scores.of(rows),)

    return opened


def _sparse(term: Soft, teacher: TopK | Sampled, shape: torch.Size) -> tuple[Open, Against]:
    if term.divergence != "kl":
        raise ValueError(
            f"divergence={term.divergence!r} of {type(teacher).__name__}: a part of the teacher's distribution gives "
            "kl alone, for the others ask what the student says beyond it, and truncated are least where it leaves "
            "the support; give the teacher's logits, or its hidden states and head"
        )
    loss = topk if isinstance(teacher, TopK) else sampled
    index, values = teacher.index, teacher.log_probs if isinstance(teacher, TopK) else teacher.weights
    if index.shape != values.shape or index.shape[:-1] != shape or index.ndim != len(shape) + 1:
        raise ValueError(
            f"index {tuple(index.shape)} and its values {tuple(values.shape)} must be of one shape, [..., k] for "
            f"positions {tuple(shape)}: a few classes for each"
        )

    def against(scores: Tensor, own: tuple[Tensor, ...], learns: bool) -> Sloped:
        found = loss(_softened(scores, term.temperature), own[0], own[1].to(scores.dtype), learns)
        return _scaled(found, term.temperature)

    return _given(index.reshape(-1, index.shape[-1]), values.detach().reshape(-1, index.shape[-1])), against


# ----------------------------------------------------------------- checks


def positions(shape: torch.Size) -> str:
    """``shape`` and one dimension more, for a message."""
    return f"({', '.join([*map(str, shape), '...'])})"


def _check_positions(name: str, given: Tensor, shape: torch.Size) -> None:
    if given.ndim != len(shape) + 1 or given.shape[:-1] != shape:
        raise ValueError(
            f"the {name}, {tuple(given.shape)}, must be {positions(shape)}, as the student's are: pass both for the "
            "same tokens"
        )


def _check_width(name: str, hidden: Tensor, head: LinearHead) -> None:
    if not hidden.ndim or hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"the {name}, {tuple(hidden.shape)}, and head, {tuple(head.weight.shape)}, must be [..., D] and [V, D]"
        )


def _check_vocabularies(student: int, teacher: int, vocabulary: int | None) -> None:
    if _real("the teacher", teacher, vocabulary) != student:
        raise ValueError(
            f"the student scores {student} tokens, the teacher {teacher}: where they share a vocabulary and only its "
            "padding differs, pass vocabulary=, how many are real"
        )


def _real(name: str, rows: int, vocabulary: int | None) -> int:
    if vocabulary is None:
        return rows
    if not 0 < vocabulary <= rows:
        raise ValueError(
            f"vocabulary={vocabulary}: must be above 0 and at most {rows}, the tokens that {name} scores"
        )
    return vocabulary
