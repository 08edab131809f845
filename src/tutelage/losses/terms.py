"""The terms of a loss of tokens, and each of them as what chunks of scores are compared by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage.losses.chunked import ChunkedProblem, FewClasses, Rows, TokenLoss
from tutelage.losses.closed_form_grads import DIVERGENCES, Divergence, LossAndGrad, labelled, sampled, topk
from tutelage.losses.common import check_choice, check_mask, check_temperature
from tutelage.losses.cross_vocabulary import Comparison, Rest, over_shared, sorted_distance
from tutelage.losses.heads import HeadProjection, LinearHead, as_head
from tutelage.losses.kernels import kernel_for
from tutelage.losses.logits import IGNORE


@dataclass(frozen=True)
class TopKTargets:
    """A teacher's k largest classes; all others are one outcome with the rest of the mass (``topk_kd``).

    Attributes:
        index: ``[..., k]``, each once.
        log_probs: ``[..., k]``, at the temperature of the loss, natural logarithm.
    """

    index: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class SampledTargets:
    """Draws from a teacher's distribution (``sampled_kd``).

    Attributes:
        index: ``[..., k]``; one may come several times.
        weights: ``[..., k]``, whose expectation is the distribution at the temperature of the loss.
    """

    index: Tensor
    weights: Tensor


HeadLike = Tensor | LinearHead
TeacherDistribution = tuple[Tensor, HeadLike] | Tensor | TopKTargets | SampledTargets
"""What a teacher says: (hidden states ``[..., D']``, head), logits ``[..., V]``, or part of a distribution."""


@dataclass(frozen=True)
class SoftTargets:
    """A term of :func:`linear_sums`: T^2 times a divergence from the teacher.

    Attributes:
        teacher: as in :func:`linear_divergence`, as are ``divergence``, ``temperature``, ``beta``, ``alpha`` and
            ``reverse``.
        mask: ``[...]``, true where the token counts.
        token_weights: as of :class:`HardTargets`.
    """

    teacher: TeacherDistribution
    divergence: str = "kl"
    temperature: float = 1.0
    beta: float | None = None
    alpha: float | None = None
    reverse: bool | None = None
    mask: Tensor | None = None
    token_weights: Tensor | None = None


@dataclass(frozen=True)
class CrossVocabularyTargets:
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

    teacher: tuple[Tensor, HeadLike] | Tensor
    shared: tuple[Tensor, Tensor] | None = None
    rest: Rest = "bucket"
    divergence: str = "kl"
    temperature: float = 1.0
    beta: float | None = None
    alpha: float | None = None
    reverse: bool | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class HardTargets:
    """A term of :func:`linear_sums`: cross-entropy at T = 1.

    Attributes:
        labels: ``[...]``, the token of each position, or -100; they are not shifted here.
        mask: ``[...]``, true where the token counts.
        token_weights: ``[...]``, by what each token's loss is multiplied, of any sign. No gradient reaches them.
    """

    labels: Tensor
    mask: Tensor | None = None
    token_weights: Tensor | None = None


def problem_of(
    hidden: Tensor,
    head: HeadLike,
    terms: Sequence[SoftTargets | HardTargets | CrossVocabularyTargets],
    vocabulary: int | None,
    chunk: int | None,
    *,
    each: bool,
) -> ChunkedProblem:
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
    return ChunkedProblem(head, parts, size, dtype, chunk, each)


def _hard(term: HardTargets, shape: torch.Size, *_: object) -> TokenLoss:
    if term.labels.shape != shape:
        raise ValueError(f"labels {tuple(term.labels.shape)} must be one token for each of {tuple(shape)} positions")
    mask = term.labels != IGNORE
    if term.mask is not None:
        mask = mask & check_mask(term.mask, shape)

    def compare(scores: Tensor, own: tuple[Tensor, ...], learns: bool) -> LossAndGrad:
        return labelled(scores.log_softmax(-1), own[0], learns)

    def few(log_q: Tensor, own: tuple[Tensor, ...]) -> FewClasses:
        index = own[0].unsqueeze(-1)
        return FewClasses(labelled(log_q, own[0], False).value, index, log_q.new_ones(index.shape))

    part = TokenLoss(mask.reshape(-1), _given(term.labels.reshape(-1)), compare, few)
    return _weighted(part, term.token_weights, shape)


def _weighted(part: TokenLoss, weights: Tensor | None, shape: torch.Size) -> TokenLoss:
    """``part`` with each token's loss multiplied."""
    if weights is None:
        return part
    if weights.shape != shape:
        raise ValueError(f"token_weights {tuple(weights.shape)} must be one for each of {tuple(shape)} positions")
    flat = weights.detach().reshape(-1)

    def opened() -> Callable[[Rows], tuple[Tensor, ...]]:
        take = part.open()
        return lambda rows: (*take(rows), flat[rows])

    def compare(scores: Tensor, own: tuple[Tensor, ...], learns: bool) -> LossAndGrad:
        value, slope = part.compare(scores, own[:-1], learns)
        by = own[-1].to(value.dtype)
        return LossAndGrad(value * by, None if slope is None else slope.mul_(by.to(slope.dtype).unsqueeze(-1)))

    return part._replace(open=opened, compare=compare, few=None)


def _soft(
    term: SoftTargets, shape: torch.Size, size: int, vocabulary: int | None, dtype: torch.dtype | None
) -> TokenLoss:
    check_temperature(term.temperature)
    mask = None if term.mask is None else check_mask(term.mask, shape).reshape(-1)
    divergence = _divergence(term.divergence, beta=term.beta, alpha=term.alpha, reverse=term.reverse)
    teacher = term.teacher
    if isinstance(teacher, TopKTargets | SampledTargets):
        said, against = _sparse(term, teacher, shape)
    elif isinstance(teacher, Tensor):
        said, against = _logits(teacher, shape, size, vocabulary), _dense(term, divergence, None)
    else:
        head = as_head(teacher[1])
        said = _projected(teacher[0], head, shape, size, vocabulary, dtype)
        against = _dense(term, divergence, head)
    few = _drawn if isinstance(teacher, SampledTargets) and term.temperature == 1.0 else None
    return _weighted(TokenLoss(mask, said, against, few), term.token_weights, shape)


def _drawn(log_q: Tensor, own: tuple[Tensor, ...]) -> FewClasses:
    """Of :class:`SampledTargets` at T = 1."""
    index, weights = own[0], own[1].to(log_q.dtype)
    even = (1.0 - weights.sum(-1, keepdim=True)) / log_q.shape[-1]
    return FewClasses(sampled(log_q, index, weights, False).value, index, weights, even)


def _crossed(
    term: CrossVocabularyTargets, shape: torch.Size, size: int, vocabulary: int | None, dtype: torch.dtype | None
) -> TokenLoss:
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

    def compare(scores: Tensor, own: tuple[Tensor, ...], learns: bool) -> LossAndGrad:
        raw = (own[0] if head is None else head.finished(own[0])).to(scores.dtype)
        return _scaled(against(scores if t == 1.0 else scores / t, raw if t == 1.0 else raw / t, learns), t)

    return TokenLoss(mask, said, compare)


def _check_shared(shared: tuple[Tensor, Tensor], student: int, teacher: int) -> None:
    own, theirs = shared
    fits = own.ndim == 1 and own.shape == theirs.shape and len(own)
    if not fits or int(own.max()) >= student or int(theirs.max()) >= teacher:
        raise ValueError(
            f"shared entries {tuple(own.shape)} and {tuple(theirs.shape)} must be lists of one length, of ids below "
            f"{student} (the student's vocabulary) and {teacher} (the teacher's)"
        )


_PARTS: dict[type, Callable[..., TokenLoss]] = {
    CrossVocabularyTargets: _crossed,
    HardTargets: _hard,
    SoftTargets: _soft,
}

Open = Callable[[], Callable[[Rows], tuple[Tensor, ...]]]
Against = Callable[[Tensor, tuple[Tensor, ...], bool], LossAndGrad]


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


def _scaled(found: LossAndGrad, t: float) -> LossAndGrad:
    """By T^2, with the gradient by scores that are not softened."""
    return LossAndGrad(found.value.mul_(t**2), None if found.slope is None else found.slope.mul_(t))


def _dense(term: SoftTargets, divergence: Divergence, head: LinearHead | None) -> Against:
    """Against the teacher's raw scores."""
    t = term.temperature

    def against(scores: Tensor, own: tuple[Tensor, ...], learns: bool) -> LossAndGrad:
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
            scores = HeadProjection(head, head.tensors(), flat, size, dtype)
        return lambda rows: (scores.project(rows),)

    return opened


def _sparse(term: SoftTargets, teacher: TopKTargets | SampledTargets, shape: torch.Size) -> tuple[Open, Against]:
    if term.divergence != "kl":
        raise ValueError(
            f"divergence={term.divergence!r} of {type(teacher).__name__}: a part of the teacher's distribution gives "
            "kl alone, for the others ask what the student says beyond it, and truncated are least where it leaves "
            "the support; give the teacher's logits, or its hidden states and head"
        )
    loss = topk if isinstance(teacher, TopKTargets) else sampled
    index, values = teacher.index, teacher.log_probs if isinstance(teacher, TopKTargets) else teacher.weights
    if index.shape != values.shape or index.shape[:-1] != shape or index.ndim != len(shape) + 1:
        raise ValueError(
            f"index {tuple(index.shape)} and its values {tuple(values.shape)} must be of one shape, [..., k] for "
            f"positions {tuple(shape)}: a few classes for each"
        )

    def against(scores: Tensor, own: tuple[Tensor, ...], learns: bool) -> LossAndGrad:
        found = loss(_softened(scores, term.temperature), own[0], own[1].to(scores.dtype), learns)
        return _scaled(found, term.temperature)

    return _given(index.reshape(-1, index.shape[-1]), values.detach().reshape(-1, index.shape[-1])), against


def _check_positions(name: str, given: Tensor, shape: torch.Size) -> None:
    if given.ndim != len(shape) + 1 or given.shape[:-1] != shape:
        raise ValueError(
            f"the {name}, {tuple(given.shape)}, must be ({', '.join([*map(str, shape), '...'])}), as the student's "
            "are: pass both for the same tokens"
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
