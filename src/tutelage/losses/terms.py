"""The terms of a token loss, and how each compares chunks of logits."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tutelage.losses.chunked import ChunkedProblem, Rows, SparseTargetLoss, TokenLoss
from tutelage.losses.closed_form_grads import DIVERGENCES, Divergence, LossAndGrad, labelled, sampled, topk
from tutelage.losses.common import Mask, check_choice, check_mask, check_temperature
from tutelage.losses.cross_vocabulary import Rest, over_shared, sorted_distance
from tutelage.losses.heads import HeadProjection, LinearHead, as_head
from tutelage.losses.kernels import kernel_for
from tutelage.losses.logits import IGNORE


@dataclass(frozen=True)
class TopKTargets:
    """A teacher's k largest classes; all others are one outcome with the remaining mass (``topk_kd``).

    Attributes:
        index: ``[..., k]``, distinct classes.
        log_probs: ``[..., k]``, at the temperature of the loss, natural logarithm.
    """

    index: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class SampledTargets:
    """Samples of a teacher's distribution (``sampled_kd``).

    Attributes:
        index: ``[..., k]``; classes may repeat.
        weights: ``[..., k]``, whose expectation is the distribution at the temperature of the loss.
    """

    index: Tensor
    weights: Tensor


HeadLike = Tensor | LinearHead
"""A head, or its weight ``[V, D]``."""
DenseDistribution = tuple[Tensor, HeadLike] | Tensor
"""(Hidden states ``[..., D']``, head), or logits ``[..., V]``."""
TeacherDistribution = DenseDistribution | TopKTargets | SampledTargets
"""A teacher's distribution over the vocabulary: dense, its largest classes, or samples."""


@dataclass(frozen=True)
class SoftTargets:
    """A term of :func:`linear_sums`: T^2 times a divergence from the teacher.

    Attributes:
        teacher: as in :func:`linear_divergence`, as are ``divergence``, ``temperature``, ``beta``, ``alpha`` and
            ``reverse``.
        mask: ``[...]``, true where the token counts.
        token_weights: as in :class:`HardTargets`.
    """

    teacher: TeacherDistribution
    divergence: str = "kl"
    temperature: float = 1.0
    beta: float | None = None
    alpha: float | None = None
    reverse: bool | None = None
    mask: Mask = None
    token_weights: Tensor | None = None


@dataclass(frozen=True)
class CrossVocabularyTargets:
    """A term of :func:`linear_sums`: T^2 times the distance from a teacher with another vocabulary.

    Attributes:
        teacher: hidden states ``[..., D']`` and a head, or logits ``[..., V']``, at the student's positions.
        shared: the ids of the entries that both vocabularies have, ``[S]`` of the student and ``[S]`` of the teacher.
            All others are one outcome. ``None``: sorted probabilities are compared (:func:`uld`) and ``divergence``
            is not used.
        rest: with ``shared``: ``uld`` also compares the sorted probabilities of the other entries.
        divergence: with ``shared``, as in :func:`linear_divergence`, as are ``temperature``, ``beta``, ``alpha`` and
            ``reverse``.
        mask: ``[...]``, true where the token counts.
    """

    teacher: DenseDistribution
    shared: tuple[Tensor, Tensor] | None = None
    rest: Rest = "bucket"
    divergence: str = "kl"
    temperature: float = 1.0
    beta: float | None = None
    alpha: float | None = None
    reverse: bool | None = None
    mask: Mask = None


@dataclass(frozen=True)
class HardTargets:
    """A term of :func:`linear_sums`: cross-entropy at T = 1.

    Attributes:
        labels: ``[...]``, the token of each position, already shifted, or -100.
        mask: ``[...]``, true where the token counts.
        token_weights: ``[...]``, a factor of each token's loss, of any sign. Receives no gradient.
    """

    labels: Tensor
    mask: Mask = None
    token_weights: Tensor | None = None


class _Student(NamedTuple):
    """The student's logits: shape of the positions, vocabulary without padding, and dtype of the projections."""

    shape: torch.Size
    size: int
    vocabulary: int | None
    dtype: torch.dtype | None


Open = Callable[[], Callable[[Rows], tuple[Tensor, ...]]]
Compute = Callable[[Tensor, tuple[Tensor, ...], bool], LossAndGrad]


def build_problem(
    hidden: Tensor,
    head: HeadLike,
    terms: Sequence[SoftTargets | HardTargets | CrossVocabularyTargets],
    vocabulary: int | None,
    chunk: int | None,
    *,
    per_token: bool,
) -> ChunkedProblem:
    """Check all inputs and flatten them to one dimension of tokens."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"student_hidden must be a tensor, not {type(hidden).__name__}")
    head = as_head(head)
    _check_width("student's hidden states", hidden, head)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: must be 1 token or more, or None")
    size = _unpadded("the student", head.size, vocabulary)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if torch.float64 in (hidden.dtype, head.weight.dtype):
        dtype = None  # autocast does not change float64
    student = _Student(hidden.shape[:-1], size, vocabulary, dtype)
    builders: dict[type, Callable[..., TokenLoss]] = {
        CrossVocabularyTargets: _cross_vocabulary, HardTargets: _hard, SoftTargets: _soft
    }  # fmt: skip
    parts = [builders[type(term)](term, student) for term in terms]
    return ChunkedProblem(head, parts, size, dtype, chunk, per_token)


def _hard(term: HardTargets, student: _Student) -> TokenLoss:
    shape = student.shape
    if term.labels.shape != shape:
        raise ValueError(f"labels {tuple(term.labels.shape)} must be one token for each of {tuple(shape)} positions")
    mask = term.labels != IGNORE
    if term.mask is not None:
        mask = mask & check_mask(term.mask, shape)

    def compute(logits: Tensor, targets: tuple[Tensor, ...], needs_grad: bool) -> LossAndGrad:
        return labelled(logits.log_softmax(-1), targets[0], needs_grad)

    def sparse(log_q: Tensor, targets: tuple[Tensor, ...]) -> SparseTargetLoss:
        index = targets[0].unsqueeze(-1)
        return SparseTargetLoss(labelled(log_q, targets[0], False).value, index, log_q.new_ones(index.shape))

    part = TokenLoss(mask.reshape(-1), _stored(term.labels.reshape(-1)), compute, sparse)
    return _with_token_weights(part, term.token_weights, shape)


def _with_token_weights(part: TokenLoss, weights: Tensor | None, shape: torch.Size) -> TokenLoss:
    """``part`` with each token's loss multiplied."""
    if weights is None:
        return part
    if weights.shape != shape:
        raise ValueError(f"token_weights {tuple(weights.shape)} must be one for each of {tuple(shape)} positions")
    flat = weights.detach().reshape(-1)

    def opened() -> Callable[[Rows], tuple[Tensor, ...]]:
        read = part.open()
        return lambda rows: (*read(rows), flat[rows])

    def compute(logits: Tensor, targets: tuple[Tensor, ...], needs_grad: bool) -> LossAndGrad:
        value, grad = part.compute(logits, targets[:-1], needs_grad)
        factor = targets[-1].to(value.dtype)
        return LossAndGrad(value * factor, None if grad is None else grad.mul_(factor.to(grad.dtype).unsqueeze(-1)))

    return part._replace(open=opened, compute=compute, sparse=None)


def _soft(term: SoftTargets, student: _Student) -> TokenLoss:
    t, mask, divergence = _common_options(term, student)
    if isinstance(term.teacher, TopKTargets | SampledTargets):
        part = _sparse(term, term.teacher, student.shape)._replace(mask=mask)
        return _with_token_weights(part, term.token_weights, student.shape)
    opened, finish, size = _dense_teacher(term.teacher, student)
    if _unpadded("the teacher", size, student.vocabulary) != student.size:
        raise ValueError(
            f"the student scores {student.size} tokens, the teacher {size}: if they share a vocabulary and only its "
            "padding differs, pass vocabulary=, the number of tokens without padding, or set model.tokenizer"
        )

    def compute(logits: Tensor, targets: tuple[Tensor, ...], needs_grad: bool) -> LossAndGrad:
        teacher = finish(targets[0]).to(logits.dtype)
        kernel = kernel_for(term.divergence, logits)
        if kernel is not None:
            return kernel(logits, teacher, t, needs_grad)
        return _scaled(divergence(_softened(logits, t), _softened(teacher, t), needs_grad), t)

    return _with_token_weights(TokenLoss(mask, opened, compute), term.token_weights, student.shape)


def _sparse(term: SoftTargets, teacher: TopKTargets | SampledTargets, shape: torch.Size) -> TokenLoss:
    if term.divergence != "kl":
        raise ValueError(
            f"{type(teacher).__name__} support divergence 'kl' only, and divergence is {term.divergence!r}: the "
            "others depend on what the student predicts where the teacher's probabilities are unknown, most of all "
            "where it leaves the support; set divergence to kl, or give the teacher's logits or its hidden states "
            "and head"
        )
    t = term.temperature
    loss = topk if isinstance(teacher, TopKTargets) else sampled
    index, values = teacher.index, teacher.log_probs if isinstance(teacher, TopKTargets) else teacher.weights
    if index.shape != values.shape or index.shape[:-1] != shape or index.ndim != len(shape) + 1:
        raise ValueError(
            f"index {tuple(index.shape)} and its values {tuple(values.shape)} must be of one shape, [..., k] for "
            f"positions {tuple(shape)}: a few classes for each"
        )

    def compute(logits: Tensor, targets: tuple[Tensor, ...], needs_grad: bool) -> LossAndGrad:
        return _scaled(loss(_softened(logits, t), targets[0], targets[1].to(logits.dtype), needs_grad), t)

    def sparse(log_q: Tensor, targets: tuple[Tensor, ...]) -> SparseTargetLoss:
        index, weights = targets[0], targets[1].to(log_q.dtype)
        even = (1.0 - weights.sum(-1, keepdim=True)) / log_q.shape[-1]
        return SparseTargetLoss(sampled(log_q, index, weights, False).value, index, weights, even)

    stored = _stored(index.reshape(-1, index.shape[-1]), values.detach().reshape(-1, index.shape[-1]))
    return TokenLoss(None, stored, compute, sparse if loss is sampled and t == 1.0 else None)


def _cross_vocabulary(term: CrossVocabularyTargets, student: _Student) -> TokenLoss:
    t, mask, divergence = _common_options(term, student)
    opened, finish, size = _dense_teacher(term.teacher, student, own_vocabulary=True)
    distance = sorted_distance()
    if term.shared is not None:
        own, theirs = term.shared
        fits = own.ndim == 1 and own.shape == theirs.shape and len(own)
        if not fits or int(own.max()) >= student.size or int(theirs.max()) >= size:
            raise ValueError(
                f"shared entries {tuple(own.shape)} and {tuple(theirs.shape)} must be lists of one length, of ids "
                f"below {student.size} (the student's vocabulary) and {size} (the teacher's)"
            )
        distance = over_shared(divergence, own, theirs, term.rest)

    def compute(logits: Tensor, targets: tuple[Tensor, ...], needs_grad: bool) -> LossAndGrad:
        teacher = finish(targets[0]).to(logits.dtype)
        return _scaled(distance(_over(logits, t), _over(teacher, t), needs_grad), t)

    return TokenLoss(mask, opened, compute)


def _common_options(
    term: SoftTargets | CrossVocabularyTargets, student: _Student
) -> tuple[float, Tensor | None, Divergence]:
    """Temperature, flat mask and divergence of a term."""
    t = check_temperature(term.temperature)
    mask = None if term.mask is None else check_mask(term.mask, student.shape).reshape(-1)
    return t, mask, _divergence(term.divergence, beta=term.beta, alpha=term.alpha, reverse=term.reverse)


def _divergence(divergence: str, **options: Any) -> Divergence:
    check_choice("divergence", divergence, *DIVERGENCES)
    factory = DIVERGENCES[divergence]
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in inspect.signature(factory).parameters:
            owners = [k for k, f in DIVERGENCES.items() if name in inspect.signature(f).parameters]
            raise ValueError(f"{name} is an option of {' and '.join(owners)}, not of {divergence}: leave it out")
    return factory(**options)


def _stored(*tensors: Tensor) -> Open:
    return lambda: lambda rows: tuple(x[rows] for x in tensors)


def _over(logits: Tensor, t: float) -> Tensor:
    return logits if t == 1.0 else logits / t


def _softened(logits: Tensor, t: float) -> Tensor:
    log_p = _over(logits, t).log_softmax(-1)
    return log_p.clamp_(min=torch.finfo(log_p.dtype).min / 2)  # an impossible token adds 0 * log 0 = 0, not NaN


def _scaled(loss: LossAndGrad, t: float) -> LossAndGrad:
    """Times T^2, with the gradient by logits instead of logits over T."""
    return LossAndGrad(loss.value.mul_(t**2), None if loss.grad is None else loss.grad.mul_(t))


def _dense_teacher(
    teacher: DenseDistribution, student: _Student, own_vocabulary: bool = False
) -> tuple[Open, Callable[[Tensor], Tensor], int]:
    """How to read a teacher's raw logits, how to finish them, and the size of its vocabulary."""
    shape = student.shape
    if isinstance(teacher, Tensor):
        _check_positions("teacher's logits", teacher, shape)
        width = teacher.shape[-1]
        logits = teacher.detach().reshape(-1, width)[:, : None if own_vocabulary else student.size]
        return _stored(logits), lambda raw: raw, width
    hidden, head = teacher[0], as_head(teacher[1])
    _check_positions("teacher's hidden states", hidden, shape)
    _check_width("teacher's hidden states", hidden, head)
    flat, size = hidden.detach().reshape(-1, hidden.shape[-1]), head.size if own_vocabulary else student.size

    def opened() -> Callable[[Rows], tuple[Tensor, ...]]:
        with torch.no_grad():
            projection = HeadProjection(head, head.tensors(), flat, size, student.dtype)
        return lambda rows: (projection.project(rows),)

    return opened, head.finish, head.size


def _check_positions(name: str, x: Tensor, shape: torch.Size) -> None:
    if x.ndim != len(shape) + 1 or x.shape[:-1] != shape:
        raise ValueError(
            f"the {name}, {tuple(x.shape)}, must be ({', '.join([*map(str, shape), '...'])}), like the student's: "
            "pass both for the same tokens"
        )


def _check_width(name: str, hidden: Tensor, head: LinearHead) -> None:
    if not hidden.ndim or hidden.shape[-1] != (head.weight.shape[1] or len(head.weight)):
        raise ValueError(
            f"the {name}, {tuple(hidden.shape)}, and head, {tuple(head.weight.shape)}, must be [..., D] and [V, D]"
        )


def _unpadded(name: str, rows: int, vocabulary: int | None) -> int:
    if vocabulary is None:
        return rows
    if not 0 < vocabulary <= rows:
        raise ValueError(
            f"vocabulary={vocabulary}: must be above 0 and at most {rows}, the tokens that {name} scores"
        )
    return vocabulary
