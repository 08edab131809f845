"""Language models taught by one that cuts texts into other tokens."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.data.alignment import NOWHERE, find_shared_tokens
from tutelage.data.batch import Batch, Task
from tutelage.errors import CapabilityError, ConfigError
from tutelage.methods.base import Term
from tutelage.methods.text_terms import head_terms, linear_head
from tutelage.methods.token import Divergence, TokenMethod
from tutelage.taps import Head, Observation
from tutelage.teachers.signal import Signal


class CrossTokenizerMethod(TokenMethod):
    r"""A language model taught by one with another tokenizer:
    :math:`\alpha\,\mathrm{soft} + (1-\alpha)\,\mathrm{CE}`.

    Tokens of both are aligned in spans that stand for the same bytes (:mod:`tutelage.data.alignment`). Each span that
    counts counts once. With ``compare="spans"``: where a span is one token to both, and the same entry of both
    vocabularies, the next-token distributions are compared over the entries that both have, all others as one
    outcome, as :math:`T^2 D`. Any other span is an outcome of which each model knows the probability, the product of
    those of its tokens, and these are compared as D of two outcomes, at T = 1, where products of probabilities are
    those of a text. With equal tokenizers it is :class:`TokenMethod`. With ``compare="uld"``: the sorted next-token
    probabilities before each span, whatever tokens they are of.

    Args:
        compare: ``spans`` or ``uld``.
        divergence: D, of ``spans``, as in :class:`TokenMethod`, as are ``temperature``, ``alpha``, ``hard``,
            ``beta``, ``skew``, ``reverse`` and ``task``.
        temperature: T.
        alpha: weight of the soft labels.
        hard: weight of the next tokens of the data. Default: 1 - alpha.
        rest: of ``spans``, what entries are that only one vocabulary has: ``bucket``, one outcome; ``uld``, besides,
            their sorted probabilities are compared.
        beta: of ``js``.
        skew: of ``skew_kl``.
        reverse: of ``skew_kl``.
        tokenizers: of student and teacher. Default: ``tokenizer`` of either model.
        task: what labels are.

    Raises:
        ConfigError: a value out of range.

    Reference: Boizard et al., the Universal Logit Distillation Loss (TMLR 2025); chains of tokens and entries that
    both have, merged: Patiño et al., Unlocking On-Policy Distillation for Any Model Family (GOLD, 2025), with byte
    spans and two outcomes in the place of scaled distributions.
    """

    takes_sparse = False

    def __init__(
        self,
        compare: Literal["spans", "uld"] = "spans",
        divergence: Divergence = "kl",
        temperature: float = 1.0,
        alpha: float = 0.9,
        hard: float | None = None,
        *,
        rest: Literal["bucket", "uld"] = "bucket",
        beta: float | None = None,
        skew: float | None = None,
        reverse: bool | None = None,
        tokenizers: tuple[Any, Any] | None = None,
        task: Task = "classes",
    ) -> None:
        super().__init__(divergence, temperature, alpha, hard, beta=beta, skew=skew, reverse=reverse, task=task)
        if "soft" not in self.weights:
            raise ConfigError(f"alpha={alpha}", remedy="must be above 0: use kind: sequence to learn the data alone")
        for name, value, allowed in (("compare", compare, ("spans", "uld")), ("rest", rest, ("bucket", "uld"))):
            if value not in allowed:
                raise ConfigError(f"{name}={value!r}", remedy=f"allowed: {', '.join(allowed)}")
        self.compare, self.rest, self.tokenizers = compare, rest, tokenizers
        self.shared: tuple[Tensor, Tensor] | None = None

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """As :class:`TokenMethod`, and find what the vocabularies share.

        Raises:
            CapabilityError: they share hardly anything, or nobody knows their tokenizers.
        """
        super().build(student, teacher, example, ids)
        self.shared = None
        if self.compare == "uld" or example.spans is None:
            return
        mine, theirs = self.tokenizers or (getattr(m, "tokenizer", None) for m in (student, teacher))
        if mine is None or theirs is None:
            raise CapabilityError(
                "the tokenizers of student and teacher are not known, and entries are matched by what they stand for",
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
        """The spans whose tokens all count; ``None`` where teacher and student read the same tokens."""
        if batch.spans is None:
            if batch.teacher_inputs is not None:
                raise CapabilityError(
                    "the teacher reads other tokens than the student, and nobody says which belong together",
                    remedy="give Batch.spans and teacher_labels, by tutelage.data.alignment; recipes give them",
                )
            return None
        assert batch.teacher_labels is not None
        mine = batch.spans["student"].masked_fill(~counted, NOWHERE).flatten()
        theirs = batch.spans["teacher"].flatten()
        at = (mine != NOWHERE).nonzero().squeeze(1)
        numbers, of = torch.unique(mine[at], return_inverse=True)
        there = torch.isin(theirs, numbers).nonzero().squeeze(1)
        of_there = torch.searchsorted(numbers, theirs[there])
        return _Spans(at, of, there, of_there, len(numbers))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """``soft``: spans that count; ``ce``: tokens with a label."""
        masks = self._masks(batch)
        counts = {name: mask.sum() for name, mask in masks.items()}
        spans = self._spans(batch, masks["soft"])
        return counts if spans is None else counts | {"soft": counts["soft"].new_tensor(spans.count)}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The terms ``soft`` and ``ce``.

        Raises:
            CapabilityError: the teacher gives no output head.
        """
        masks = self._masks(batch)
        spans = self._spans(batch, masks["soft"])
        if spans is None and self.compare == "spans":
            return self._terms(student, batch, signal, masks)
        if signal is None or signal.head is None:
            raise CapabilityError(
                "tokens of another tokenizer are compared through the teacher's output head, and it gives none",
                remedy="use a live teacher",
            )
        assert student.head is not None
        theirs = signal.head
        if spans is None:
            spans, labels = _same(masks["soft"]), batch.labels.flatten()
        else:
            assert batch.teacher_labels is not None
            labels = batch.teacher_labels.flatten()
        single, chains = self._sorted(spans, batch.labels.flatten(), labels)
        inputs = theirs.inputs.flatten(0, -2)
        said = inputs.new_zeros(masks["soft"].numel(), inputs.shape[-1])
        mask = torch.zeros_like(masks["soft"])
        said[single.mine] = inputs[single.theirs]
        mask.view(-1)[single.mine] = True
        asked: dict[str, losses.CrossVocabularyTargets | losses.HardTargets] = {
            "soft": losses.CrossVocabularyTargets(
                (said.view(*mask.shape, -1), linear_head(theirs)), self.shared, self.rest, self.divergence,
                self.temperature, mask=mask, **self.divergence_options,
            )
        }  # fmt: skip
        if "ce" in masks:
            asked["ce"] = losses.HardTargets(batch.labels, masks["ce"])
        counts = {name: each.sum() for name, each in masks.items()}
        counts["soft"] = counts["soft"].new_tensor(spans.count)
        terms = head_terms(self, student.head, asked, counts)
        if chains is not None:
            more = self._products(chains, student.head, theirs, batch.labels, labels)
            terms["soft"] = Term(terms["soft"].sum + more, counts["soft"])
        return terms

    def _sorted(self, spans: _Spans, labels: Tensor, theirs: Tensor) -> tuple[_Pairs, _Spans | None]:
        """Where both predict one token, the same entry, and the spans that are something else; of ``uld`` where both
        are before a span, and none."""
        mine = _first(spans.mine, spans.of, spans.count)
        there = _first(spans.theirs, spans.of_theirs, spans.count)
        if self.compare == "uld":
            return _Pairs(mine, there), None
        assert self.shared is not None
        sizes = [torch.bincount(of, minlength=spans.count) for of in (spans.of, spans.of_theirs)]
        single = (sizes[0] == 1) & (sizes[1] == 1)
        single &= _counterpart(self.shared, labels[mine]) == theirs[there]
        rest = ~single
        if not bool(rest.any()):
            return _Pairs(mine, there), None
        renumbered = rest.cumsum(0) - 1
        kept = rest[spans.of], rest[spans.of_theirs]
        chains = _Spans(
            spans.mine[kept[0]], renumbered[spans.of[kept[0]]],
            spans.theirs[kept[1]], renumbered[spans.of_theirs[kept[1]]], int(rest.sum()),
        )  # fmt: skip
        return _Pairs(mine[single], there[single]), chains

    def _products(self, chains: _Spans, mine: Head, theirs: Head, labels: Tensor, told: Tensor) -> Tensor:
        """Of spans of several tokens, or of different entries: D of the products of their probabilities."""
        own = _product(mine, chains.mine, labels.flatten(), chains.of, chains.count)
        with torch.no_grad():
            other = _product(theirs, chains.theirs, told, chains.of_theirs, chains.count)
        return COMPARED[self.divergence](
            own, other, temperature=1.0, reduction="sum", **_named(self.divergence_options)
        )

    def formula(self) -> str:
        """The loss in one line."""
        text = super().formula()
        if self.compare == "uld":
            return text.replace(f"{self.divergence}(", "uld(", 1)
        shared = "" if self.shared is None else f" over {len(self.shared[0]):,} shared entries"
        return text.replace(")", f"){shared}", 1)


COMPARED: dict[str, Any] = {
    "kl": losses.kd, "reverse_kl": losses.reverse_kl, "js": losses.js, "skew_kl": losses.skew_kl,
    "tvd": losses.tvd,
}  # fmt: skip
"""Divergences of two outcomes."""


class _Spans(NamedTuple):
    """Spans of a batch.

    Attributes:
        mine: flat positions of the student that predict a token of one.
        of: the number of its span, of each.
        theirs: flat positions of the teacher.
        of_theirs: the number of the span of each.
        count: how many there are.
    """

    mine: Tensor
    of: Tensor
    theirs: Tensor
    of_theirs: Tensor
    count: int  # type: ignore[assignment]


class _Pairs(NamedTuple):
    """Flat positions of student and teacher that go together."""

    mine: Tensor
    theirs: Tensor


def _same(counted: Tensor) -> _Spans:
    """Every token is a span, where both read the same."""
    at = counted.flatten().nonzero().squeeze(1)
    of = torch.arange(len(at), device=at.device)
    return _Spans(at, of, at, of, len(at))


def _first(at: Tensor, of: Tensor, count: int) -> Tensor:
    """The first position of each span; each has one."""
    out = at.new_full((count,), torch.iinfo(at.dtype).max)
    return out.scatter_reduce_(0, of, at, "amin")


def _counterpart(shared: tuple[Tensor, Tensor], ids: Tensor) -> Tensor:
    """The teacher's id of each of the student's tokens; -1 where it has none."""
    own, theirs = (x.to(ids.device) for x in shared)
    at = torch.searchsorted(own, ids).clamp(max=len(own) - 1)
    return torch.where(own[at] == ids, theirs[at], NOWHERE)


def _product(head: Head, at: Tensor, labels: Tensor, of: Tensor, count: int) -> Tensor:
    """``[count, 2]`` logits whose softmax is the probability of each span, and of anything else."""
    hidden = head.inputs.flatten(0, -2)[at]
    per_token = losses.linear_cross_entropy(hidden, linear_head(head), labels[at], reduction="none")
    log = per_token.new_zeros(count).index_add(0, of, -per_token).clamp(max=-torch.finfo(per_token.dtype).eps)
    return torch.stack([log, torch.log(-torch.expm1(log))], -1)


def _named(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
