"""Language models with a teacher of another tokenizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.config.methods.language import CrossTokenizerOptions
from tutelage.data.alignment import NOWHERE, find_shared_tokens
from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError
from tutelage.methods.base import Term
from tutelage.methods.text_terms import head_terms, linear_head
from tutelage.methods.token import TokenMethod
from tutelage.taps import Head, Observation
from tutelage.teachers.signal import Signal


class CrossTokenizerMethod(TokenMethod):
    r"""A language model with a teacher of another tokenizer:
    :math:`\alpha\,\mathrm{soft} + (1-\alpha)\,\mathrm{CE}`.

    Tokens of both are aligned in spans of the same bytes (:mod:`tutelage.data.alignment`), and each span that counts
    counts once.

    With ``compare="spans"``: if a span is one token for both, and an entry of both vocabularies, the next-token
    distributions are compared over the shared entries, all others as one outcome, as :math:`T^2 D`. The probability
    of any other span is the product of those of its tokens; D compares two outcomes, the span and anything else, at T
    = 1. With equal tokenizers this is :class:`TokenMethod`. With ``compare="uld"``: the sorted next-token
    probabilities before each span are compared.

    Args:
        options: see :class:`tutelage.config.methods.language.CrossTokenizerOptions`.
        tokenizers: of student and teacher. Default: ``tokenizer`` of either model.
        **keywords: the fields of ``options``, and ``task``.

    Reference: Boizard et al., the Universal Logit Distillation Loss (TMLR 2025); merged chains of tokens and shared
    entries: Patiño et al., Unlocking On-Policy Distillation for Any Model Family (GOLD, 2025), here with byte spans
    and two outcomes instead of scaled distributions.
    """

    Options = CrossTokenizerOptions
    options: CrossTokenizerOptions
    takes_sparse = False

    def __init__(
        self,
        options: CrossTokenizerOptions | None = None,
        /,
        *,
        tokenizers: tuple[Any, Any] | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(options, **keywords)
        self.tokenizers = tokenizers
        self.shared: tuple[Tensor, Tensor] | None = None

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """As :class:`TokenMethod`, and find the shared entries of the vocabularies."""
        super().build(student, teacher, example, ids)
        self.shared = None
        if self.options.compare == "uld" or example.spans is None:
            return
        mine, theirs = self.tokenizers or (getattr(m, "tokenizer", None) for m in (student, teacher))
        if mine is None or theirs is None:
            raise CapabilityError(
                "the tokenizers of student and teacher are unknown, and entries are matched by their bytes",
                where="method",
                remedy="pass tokenizers=(the student's, the teacher's), or set compare: uld",
            )
        own, other = find_shared_tokens(mine, theirs)
        if len(own) < 2:
            raise CapabilityError(
                f"the vocabularies share {len(own)} entries, so next tokens cannot be compared",
                where="method.compare",
                remedy="set compare: uld",
            )
        self.shared = own, other

    def _spans(self, batch: Batch, counted: Tensor) -> _Spans | None:
        """The spans whose tokens all count; ``None`` if teacher and student read the same tokens."""
        if batch.spans is None:
            if batch.teacher_inputs is not None:
                raise CapabilityError(
                    "teacher and student have different tokens, and the batch has no alignment between them",
                    remedy="set Batch.spans and teacher_labels, by tutelage.data.alignment; recipes set them",
                )
            return None
        assert batch.teacher_labels is not None
        mine = batch.spans["student"].masked_fill(~counted, NOWHERE).flatten()
        theirs = batch.spans["teacher"].flatten()
        at = (mine != NOWHERE).nonzero().squeeze(1)
        numbers, span = torch.unique(mine[at], return_inverse=True)
        at_theirs = torch.isin(theirs, numbers).nonzero().squeeze(1)
        return _Spans(at, span, at_theirs, torch.searchsorted(numbers, theirs[at_theirs]), len(numbers))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """``soft``: spans that count; ``ce``: tokens with a label."""
        masks = self._masks(batch)
        counts = {name: mask.sum() for name, mask in masks.items()}
        spans = self._spans(batch, masks["soft"])
        return counts if spans is None else counts | {"soft": counts["soft"].new_tensor(spans.count)}

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """The terms ``soft`` and ``ce``."""
        masks = self._masks(batch)
        spans = self._spans(batch, masks["soft"])
        if spans is None and self.options.compare == "spans":
            return self._terms(student, batch, signal, masks)
        if signal.head is None:
            raise CapabilityError(
                "tokens of another tokenizer are compared through the teacher's output head, and it provides none",
                remedy="use a live teacher",
            )
        assert student.head is not None
        theirs = signal.head
        if spans is None:
            at = masks["soft"].flatten().nonzero().squeeze(1)  # every token is a span
            number = torch.arange(len(at), device=at.device)
            spans, labels = _Spans(at, number, at, number, len(at)), batch.labels.flatten()
        else:
            assert batch.teacher_labels is not None
            labels = batch.teacher_labels.flatten()
        (mine, other), chains = self._split(spans, batch.labels.flatten(), labels)
        inputs = theirs.inputs.flatten(0, -2)
        teacher = inputs.new_zeros(masks["soft"].numel(), inputs.shape[-1])
        mask = torch.zeros_like(masks["soft"])
        teacher[mine] = inputs[other]
        mask.view(-1)[mine] = True
        targets: dict[str, losses.CrossVocabularyTargets | losses.HardTargets] = {
            "soft": losses.CrossVocabularyTargets(
                (teacher.view(*mask.shape, -1), linear_head(theirs)), self.shared, self.options.rest, mask=mask,
                **self._divergence,
            )
        }  # fmt: skip
        if "ce" in masks:
            targets["ce"] = losses.HardTargets(batch.labels, masks["ce"])
        counts = {name: each.sum() for name, each in masks.items()}
        counts["soft"] = counts["soft"].new_tensor(spans.count)
        terms = head_terms(self, student.head, targets, counts)
        if chains is not None:
            products = self._products(chains, student.head, theirs, batch.labels, labels)
            terms["soft"] = Term(terms["soft"].sum + products, counts["soft"])
        return terms

    def _split(self, spans: _Spans, labels: Tensor, theirs: Tensor) -> tuple[tuple[Tensor, Tensor], _Spans | None]:
        """With ``spans``: the positions at which both predict one token, the same entry, and all other spans; with
        ``uld``: the positions before each span, and ``None``."""
        mine = _first(spans.mine, spans.of, spans.count)
        other = _first(spans.theirs, spans.of_theirs, spans.count)
        if self.options.compare == "uld":
            return (mine, other), None
        assert self.shared is not None
        sizes = [torch.bincount(of, minlength=spans.count) for of in (spans.of, spans.of_theirs)]
        single = (sizes[0] == 1) & (sizes[1] == 1)
        single &= _counterpart(self.shared, labels[mine]) == theirs[other]
        rest = ~single
        if not bool(rest.any()):
            return (mine, other), None
        numbers = rest.cumsum(0) - 1
        in_rest, in_rest_theirs = rest[spans.of], rest[spans.of_theirs]
        chains = _Spans(
            spans.mine[in_rest], numbers[spans.of[in_rest]],
            spans.theirs[in_rest_theirs], numbers[spans.of_theirs[in_rest_theirs]], int(rest.sum()),
        )  # fmt: skip
        return (mine[single], other[single]), chains

    def _products(self, chains: _Spans, mine: Head, theirs: Head, labels: Tensor, teacher_labels: Tensor) -> Tensor:
        """D of the probabilities of spans of several tokens or of different entries."""
        own = _product(mine, chains.mine, labels.flatten(), chains.of, chains.count)
        with torch.no_grad():
            other = _product(theirs, chains.theirs, teacher_labels, chains.of_theirs, chains.count)
        options = {k: v for k, v in self._divergence.items() if v is not None and k in ("beta", "alpha", "reverse")}
        return DIVERGENCES[self.options.divergence](own, other, temperature=1.0, reduction="sum", **options)

    def formula(self) -> str:
        """The loss in one line."""
        text = super().formula()
        if self.options.compare == "uld":
            return text.replace(f"{self.options.divergence}(", "uld(", 1)
        shared = "" if self.shared is None else f" over {len(self.shared[0]):,} shared entries"
        return text.replace(")", f"){shared}", 1)


DIVERGENCES: dict[str, Any] = {
    "kl": losses.kd, "reverse_kl": losses.reverse_kl, "js": losses.js, "skew_kl": losses.skew_kl,
    "tvd": losses.tvd,
}  # fmt: skip
"""Divergences of two outcomes."""


class _Spans(NamedTuple):
    """Spans of a batch: flat positions at which a model predicts a token of a span, and the number of its span."""

    mine: Tensor
    of: Tensor
    theirs: Tensor
    of_theirs: Tensor
    count: int  # type: ignore[assignment]


def _first(at: Tensor, of: Tensor, count: int) -> Tensor:
    """The first position of each span."""
    out = at.new_full((count,), torch.iinfo(at.dtype).max)
    return out.scatter_reduce_(0, of, at, "amin")


def _counterpart(shared: tuple[Tensor, Tensor], ids: Tensor) -> Tensor:
    """The teacher's id of each of the student's tokens; -1 for an entry that is not shared."""
    own, theirs = (x.to(ids.device) for x in shared)
    at = torch.searchsorted(own, ids).clamp(max=len(own) - 1)
    return torch.where(own[at] == ids, theirs[at], NOWHERE)


def _product(head: Head, at: Tensor, labels: Tensor, of: Tensor, count: int) -> Tensor:
    """``[count, 2]`` logits whose softmax is the probability of each span, and of anything else."""
    hidden = head.inputs.flatten(0, -2)[at]
    per_token = losses.linear_cross_entropy(hidden, linear_head(head), labels[at], reduction="none")
    log = per_token.new_zeros(count).index_add(0, of, -per_token).clamp(max=-torch.finfo(per_token.dtype).eps)
    return torch.stack([log, torch.log(-torch.expm1(log))], -1)
