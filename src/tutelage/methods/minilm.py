"""MiniLM: the attention and the relations of one layer, whatever the widths."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from tutelage import losses
from tutelage.data.batch import Batch, Task
from tutelage.errors import ConfigError, ModelError
from tutelage.methods.base import Method, Term
from tutelage.methods.text_terms import (
    check_same_tokens,
    check_weights,
    freeze_unreached,
    quiet_needs,
    seen_tokens,
    text_positions,
)
from tutelage.methods.tinybert import check_plain
from tutelage.methods.transformer_layers import Attention, Channels, attention_scores, find_layers
from tutelage.taps import Needs, Observation
from tutelage.teachers.signal import Signal

VERSIONS: dict[int, tuple[str, ...]] = {1: ("attention", "values"), 2: ("queries", "keys", "values")}
"""The terms of each paper."""

PUBLISHED_HEADS = 48
"""Relation heads of the second paper for teachers of base size."""
MOST_HEADS = 64


class MinilmMethod(Method):
    r"""MiniLM: :math:`\mathrm{KL}` of the attention, and of relations :math:`\mathrm{softmax}(VV^\top/\sqrt{d})`.

    No labels are learned from. Only the student's last layer is compared, so the student's depth and width are free;
    what is behind that layer, such as a head, is not trained. A query counts where its token does, and sees all keys
    that are no padding. Queries, keys and values are what linear layers give, before any rotation.

    Args:
        version: 1: attention and values; 2: relations of queries, of keys and of values.
        layer: the teacher's, counted from 1. Default: its last. The second paper has 21 of 24 for BERT-large.
        relation_heads: into which vectors are split. Default: version 1, the teacher's heads of attention; version 2,
            48 as for base teachers; where that does not divide both widths, the most that does, up to as many (64).
        attention: weight; version 1. Default 1.
        queries: weight; version 2. Default 1.
        keys: weight; version 2. Default 1.
        values: weight. Default 1.
        heads: of the attention: ``each``, head by head; ``mean``, which may differ in number.
        temperature: T of all the distributions; 1 in the papers.
        task: what labels are.

    Raises:
        ConfigError: a value out of range, a term of the other version, or no term left.

    Reference: Wang et al., MiniLM (NeurIPS 2020); Wang et al., MiniLMv2 (ACL Findings 2021).
    """

    def __init__(
        self,
        version: Literal[1, 2] = 2,
        *,
        layer: int | None = None,
        relation_heads: int | None = None,
        attention: float | None = None,
        queries: float | None = None,
        keys: float | None = None,
        values: float | None = None,
        heads: Literal["each", "mean"] = "each",
        temperature: float = 1.0,
        task: Task = "classes",
    ) -> None:
        super().__init__()
        if version not in VERSIONS:
            raise ConfigError(f"version={version!r}", remedy="allowed: 1, 2")
        given = {"attention": attention, "queries": queries, "keys": keys, "values": values}
        for name, weight in given.items():
            if weight is not None and name not in VERSIONS[version]:
                raise ConfigError(
                    f"{name}={weight}, and version {version} has no such term",
                    remedy=f"its terms: {', '.join(VERSIONS[version])}",
                )
        weights = {name: given[name] for name in VERSIONS[version]}
        self.weights = check_weights(**{name: 1.0 if w is None else w for name, w in weights.items()})
        for name, value, right, remedy in (
            ("layer", layer, layer is None or layer >= 1, "counted from 1"),
            ("relation_heads", relation_heads, relation_heads is None or relation_heads >= 1, "must be 1 or more"),
            ("heads", heads, heads in ("each", "mean"), "allowed: each, mean"),
            ("temperature", temperature, temperature > 0, "must be above 0; the papers have 1"),
        ):
            if not right:
                raise ConfigError(f"{name}={value!r}", remedy=remedy)
        self.version, self.layer, self.heads, self.temperature = version, layer, heads, temperature
        self.task, self.given_heads = task, relation_heads
        self.relation_heads: int | None = relation_heads
        self.found: tuple[Attention, Attention] | None = None
        self.needs = self.student_needs = Needs(logits=False)

    def adapt_student(self, student: nn.Module, teacher: nn.Module | None, example: Batch) -> nn.Module:
        """The student, with all behind the compared layer's queries, keys and values frozen."""
        self.build(student, teacher, example)
        assert self.student_needs is not None
        return freeze_unreached(student, example, self.student_needs)

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find queries, keys and values in both models.

        Raises:
            ModelError: they are not found, heads do not divide the widths, or attention cannot be compared.
        """
        assert teacher is not None
        mine, theirs = (
            find_layers("student", student, example),
            find_layers("teacher", teacher, example.for_teacher()),
        )
        last, layer = len(mine.layers), self.layer or len(theirs.layers)
        if layer > len(theirs.layers):
            raise ModelError(
                f"layer {layer} of a teacher with {len(theirs.layers)}",
                where="method.layer", remedy=f"give 1 to {len(theirs.layers)}, or leave it out for the last",
            )  # fmt: skip
        (s,), (t,) = mine.attentions([last]), theirs.attentions([layer])
        if "attention" in self.weights:
            for stack, number, one in ((mine, last, s), (theirs, layer, t)):
                check_plain(stack, number, one, "version: 2, or attention: 0")
            if self.heads == "each" and s.heads != t.heads:
                raise ModelError(
                    f"the student has {s.heads} heads of attention, the teacher {t.heads}, and head by head there is "
                    "no pairing",
                    where="method.heads", remedy="set heads: mean, or version: 2, for which the numbers are free",
                )  # fmt: skip
        self.found = s, t
        self.relation_heads = self._relation_heads(s, t)
        taps = [[part.tap for name in self.weights for part in self._parts(name, one)] for one in (s, t)]
        self.student_needs, self.needs = quiet_needs(student, taps[0]), quiet_needs(teacher, taps[1])

    def _parts(self, name: str, attention: Attention) -> tuple[Channels, ...]:
        return (attention.queries, attention.keys) if name == "attention" else (getattr(attention, name),)

    def _relation_heads(self, s: Attention, t: Attention) -> int | None:
        """As given, once they divide both widths; else the published ones, or the most that do."""
        relations = [name for name in self.weights if name != "attention"]
        if not relations:
            return None
        widths = sorted({getattr(one, name).width for one in (s, t) for name in relations})
        usual, most = (PUBLISHED_HEADS, MOST_HEADS) if self.version == 2 else (t.heads or 1, t.heads or 1)
        if self.given_heads is None:
            if all(w % usual == 0 for w in widths):
                return usual
            return max(h for h in range(1, most + 1) if all(w % h == 0 for w in widths))
        if any(w % self.given_heads for w in widths):
            fitting = [h for h in range(1, MOST_HEADS + 1) if all(w % h == 0 for w in widths)]
            raise ModelError(
                f"relation_heads: {self.given_heads} does not divide the widths {' and '.join(map(str, widths))}",
                where="method.relation_heads", remedy=f"give one of {', '.join(map(str, fitting))}",
            )  # fmt: skip
        return self.given_heads

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Tokens that count."""
        return dict.fromkeys(self.weights, text_positions(batch).sum())

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """A term for each distribution.

        Raises:
            CapabilityError: teacher and student do not read the same tokens.
        """
        assert signal is not None
        assert self.found is not None
        positions = text_positions(batch)
        visible, count = positions.unsqueeze(-1) & seen_tokens(batch).unsqueeze(-2), positions.sum()
        terms: dict[str, Term] = {}
        for name in self.weights:
            mine, theirs = self.found
            if name == "attention":
                s = attention_scores(mine.queries.of(student.hidden), mine.keys.of(student.hidden), mine.heads or 1)
                t = attention_scores(
                    theirs.queries.of(signal.hidden), theirs.keys.of(signal.hidden), theirs.heads or 1
                )
                check_same_tokens(s.transpose(1, 2), t.transpose(1, 2))
                loss = losses.attention_kl(
                    s, t, heads=self.heads, temperature=self.temperature, mask=visible, reduction="sum"
                )
            else:
                s, t = getattr(mine, name).of(student.hidden), getattr(theirs, name).of(signal.hidden)
                check_same_tokens(s, t)
                loss = losses.value_relation(
                    s, t, heads=self.relation_heads or 1, temperature=self.temperature, mask=visible, reduction="sum"
                )
            terms[name] = Term(loss, count)
        return terms

    def formula(self) -> str:
        """The loss in one line, with the relation heads as soon as they are known."""
        heads = f"({self.relation_heads} heads)" if self.relation_heads else ""
        parts = [f"{w:g} * {name}{'' if name == 'attention' else heads}" for name, w in self.weights.items()]
        return " + ".join(parts)
