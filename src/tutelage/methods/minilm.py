"""MiniLM: the attention and the relations of one layer, for any widths."""

from typing import Any

from torch import Tensor, nn

from tutelage import losses
from tutelage.config.methods.encoders import MinilmOptions
from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.methods.base import Method, Term
from tutelage.methods.text_terms import (
    check_same_tokens,
    counted_tokens,
    freeze_unused,
    non_padding,
    nonzero_weights,
    taps_only,
)
from tutelage.methods.transformer_layers import Attention, check_plain_attention, find_both_layers
from tutelage.taps import Needs, Observation
from tutelage.teachers.signal import Signal

VERSIONS: dict[int, tuple[str, ...]] = {1: ("attention", "values"), 2: ("queries", "keys", "values")}
"""The terms of each paper."""

PUBLISHED_HEADS = 48
"""Relation heads of the second paper for teachers of base size."""
MAX_HEADS = 64


class MinilmMethod(Method):
    r"""MiniLM: :math:`\mathrm{KL}` of the attention, and of relations :math:`\mathrm{softmax}(VV^\top/\sqrt{d})`.

    Labels are not used. The student's last layer is compared, so its depth and width are free; everything after that
    layer, such as a head, is not trained. A query counts if its token does, and attends to all keys that are not
    padding. Queries, keys and values are the outputs of linear layers, before any rotation.

    Raises:
        ConfigError: all weights are 0.

    Reference: Wang et al., MiniLM (NeurIPS 2020); Wang et al., MiniLMv2 (ACL Findings 2021).
    """

    Options = MinilmOptions
    compares_tokens = True
    options: MinilmOptions

    def __init__(self, options: MinilmOptions | None = None, /, **keywords: Any) -> None:
        super().__init__(options, **keywords)
        weights = {name: getattr(self.options, name) for name in VERSIONS[self.options.version]}
        self.weights = nonzero_weights(**{name: 1.0 if w is None else w for name, w in weights.items()})
        self.relation_heads = self.options.relation_heads
        self.attentions: tuple[Attention, Attention] | None = None
        self.needs = self.student_needs = Needs(logits=False)

    def adapt_student(self, student: nn.Module, teacher: nn.Module | None, example: Batch) -> nn.Module:
        """The student, with everything after the compared queries, keys and values frozen."""
        self.build(student, teacher, example)
        return freeze_unused(student, example, self.student_needs)

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find queries, keys and values in both models."""
        assert teacher is not None
        mine, theirs = find_both_layers(student, teacher, example)
        last, layer = len(mine.layers), self.options.layer or len(theirs.layers)
        if layer > len(theirs.layers):
            raise ModelError(
                f"layer {layer} of a teacher with {len(theirs.layers)}",
                where="method.layer", remedy=f"give 1 to {len(theirs.layers)}, or leave it out for the last",
            )  # fmt: skip
        (s,), (t,) = mine.attentions([last]), theirs.attentions([layer])
        if "attention" in self.weights:
            check_plain_attention(mine, last, s, "version: 2, or attention: 0")
            check_plain_attention(theirs, layer, t, "version: 2, or attention: 0")
            if self.options.heads == "each" and s.heads != t.heads:
                raise ModelError(
                    f"the student has {s.heads} heads of attention, the teacher {t.heads}, which cannot be "
                    "compared head by head",
                    where="method.heads", remedy="set heads: mean, or version: 2, for which the numbers may differ",
                )  # fmt: skip
        self.attentions = s, t
        self.relation_heads = self._relation_heads(s, t)
        parts = [p for n in self.weights for p in (("queries", "keys") if n == "attention" else (n,))]
        taps = [[getattr(one, part).tap for part in parts] for one in (s, t)]
        self.student_needs, self.needs = taps_only(student, taps[0]), taps_only(teacher, taps[1])

    def _relation_heads(self, s: Attention, t: Attention) -> int | None:
        """The option, if it divides all widths; without it the published number, or the largest divisor."""
        relations = [name for name in self.weights if name != "attention"]
        if not relations:
            return None
        widths = sorted({getattr(one, name).width for one in (s, t) for name in relations})

        def divisors(limit: int) -> list[int]:
            return [h for h in range(1, limit + 1) if all(w % h == 0 for w in widths)]

        default = PUBLISHED_HEADS if self.options.version == 2 else t.heads or 1
        heads = self.options.relation_heads or default
        if all(w % heads == 0 for w in widths):
            return heads
        if self.options.relation_heads is None:
            return divisors(MAX_HEADS if self.options.version == 2 else default)[-1]
        raise ModelError(
            f"relation_heads: {heads} does not divide the widths {' and '.join(map(str, widths))}",
            where="method.relation_heads", remedy=f"give one of {', '.join(map(str, divisors(MAX_HEADS)))}",
        )  # fmt: skip

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Tokens that count."""
        return dict.fromkeys(self.weights, counted_tokens(batch).sum())

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """A term for each distribution."""
        assert self.attentions is not None
        mine, theirs = self.attentions
        positions, t = counted_tokens(batch), self.options.temperature
        visible, count = positions.unsqueeze(-1) & non_padding(batch).unsqueeze(-2), positions.sum()
        terms: dict[str, Term] = {}
        for name in self.weights:
            if name == "attention":
                x, y = mine.scores(student.hidden), theirs.scores(signal.hidden)
                check_same_tokens(x.transpose(1, 2), y.transpose(1, 2))
                heads = self.options.heads
                loss = losses.attention_kl(x, y, heads=heads, temperature=t, mask=visible, reduction="sum")
            else:
                x, y = getattr(mine, name).of(student.hidden), getattr(theirs, name).of(signal.hidden)
                check_same_tokens(x, y)
                relation_heads = self.relation_heads or 1
                loss = losses.value_relation(x, y, heads=relation_heads, temperature=t, mask=visible, reduction="sum")
            terms[name] = Term(loss, count)
        return terms

    def _formula_names(self) -> dict[str, str]:
        heads = f"({self.relation_heads} heads)" if self.relation_heads else ""
        return {name: f"{name}{heads}" for name in self.weights if name != "attention"}
