"""TinyBERT: embeddings, hidden states and attention of mapped layers first, then the predictions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.config.methods.encoders import TinybertOptions
from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.methods.base import Method, Phase, Term
from tutelage.methods.text_terms import (
    OutputTerms,
    check_same_tokens,
    counted_tokens,
    freeze_unused,
    non_padding,
    nonzero_weights,
    taps_only,
)
from tutelage.methods.transformer_layers import (
    Attention,
    LayerStack,
    check_plain_attention,
    find_both_layers,
    map_layers,
)
from tutelage.students import build_projector
from tutelage.taps import Needs, Observation
from tutelage.teachers.signal import Signal

ATTENTION_LOSSES: dict[str, Callable[..., Tensor]] = {
    "probabilities": losses.attention_kl,
    "scores": losses.attention_mse,
}
"""The loss of the attention, by the option ``scores``."""


class LayersMethod(Method):
    """The first stage of TinyBERT: all terms except the predictions.

    Args:
        options: of :class:`TinybertMethod`.
        **keywords: the fields of ``options``, and ``task``.
    """

    Options = TinybertOptions
    options: TinybertOptions

    def __init__(self, options: TinybertOptions | None = None, /, **keywords: Any) -> None:
        super().__init__(options, **keywords)
        o = self.options
        self.weights = nonzero_weights(embedding=o.embedding, hidden=o.hidden, attention=o.attention)
        self.projectors = nn.ModuleDict()
        self.states: dict[str, list[tuple[str, str]]] = {}
        self.attentions: list[tuple[Attention, Attention]] = []
        self.layer_map: list[tuple[int, int]] = []

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the layers of both models, and build the projectors."""
        assert teacher is not None
        mine, theirs = find_both_layers(student, teacher, example)
        self.layer_map = map_layers(self.options.layers, mine, theirs)
        self.states = {}
        if "embedding" in self.weights:
            self.states["embedding"] = [(mine.embeddings, theirs.embeddings)]
        if "hidden" in self.weights:
            self.states["hidden"] = [
                (mine.layers[m - 1].output, theirs.layers[n - 1].output) for m, n in self.layer_map
            ]
        shapes = (1, 1, mine.width), (1, 1, theirs.width)
        self.projectors = nn.ModuleDict({name: build_projector(*shapes) for name in self.states})
        self.attentions = []
        if "attention" in self.weights:
            self.attentions = _attentions(mine, theirs, self.layer_map, self.options.heads)
        taps = [
            [pair[i] for pairs in self.states.values() for pair in pairs]
            + [channels.tap for pair in self.attentions for channels in (pair[i].queries, pair[i].keys)]
            for i in range(2)
        ]
        self.student_needs, self.needs = taps_only(student, taps[0]), taps_only(teacher, taps[1])

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Tokens that count."""
        return dict.fromkeys(self.weights, counted_tokens(batch).sum())

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """The terms ``embedding``, ``hidden`` and ``attention``, if they have a weight."""
        positions = counted_tokens(batch)
        terms, count = dict[str, Term](), positions.sum()
        for name, pairs in self.states.items():
            parts = [self._state(name, student.hidden[a], signal.hidden[b], positions) for a, b in pairs]
            terms[name] = Term(torch.stack(parts).sum(), count)
        if self.attentions:
            visible = positions.unsqueeze(-1) & non_padding(batch).unsqueeze(-2)
            parts = [self._attention(*pair, student.hidden, signal.hidden, visible) for pair in self.attentions]
            terms["attention"] = Term(torch.stack(parts).sum(), count)
        return terms

    def _state(self, name: str, student: Tensor, teacher: Tensor, positions: Tensor) -> Tensor:
        check_same_tokens(student, teacher)
        s, t = student[positions], teacher[positions]
        return losses.hint(self.projectors[name](s, t), t, reduction="sum")

    def _attention(
        self, mine: Attention, theirs: Attention, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor],
        visible: Tensor,
    ) -> Tensor:  # fmt: skip
        s, t = mine.scores(student), theirs.scores(teacher)
        check_same_tokens(s.transpose(1, 2), t.transpose(1, 2))
        loss = ATTENTION_LOSSES[self.options.scores]
        return loss(s, t, heads=self.options.heads, mask=visible, reduction="sum")

    def formula(self) -> str:
        """The loss in one line, with the pairs of layers once they are known."""
        loss = super().formula()
        layers = ", ".join(f"{m}<-{n}" for m, n in self.layer_map) or str(self.options.layers)
        return f"{loss} of layers {layers}" if {"hidden", "attention"} & set(self.weights) else loss

    def _formula_names(self) -> dict[str, str]:
        return {"attention": f"attention({self.options.scores})"}


class TinybertMethod(Method):
    r"""TinyBERT: :math:`\mathrm{MSE}(E^S W_e, E^T) + \sum_m \mathrm{MSE}(H^S_m W_h, H^T_{g(m)}) +
    \mathrm{MSE}(A^S_m, A^T_{g(m)})`, and then soft cross-entropy.

    Attention is that before the softmax and before any mask, QK/sqrt(d), computed from queries and keys. A query
    counts if its token does, and attends to all keys that are not padding. If the widths differ, the student's hidden
    states go through one linear layer for all layers, as in the paper, and its embeddings through another. Without
    predictions this is TinyBERT's general distillation.

    The soft labels are cross-entropy for classes, binary cross-entropy for several labels, and squares for numbers.

    Raises:
        ConfigError: all weights are 0.

    Reference: Jiao et al., TinyBERT (EMNLP Findings 2020), equations 5 to 11.
    """

    Options = TinybertOptions
    options: TinybertOptions

    def __init__(self, options: TinybertOptions | None = None, /, **keywords: Any) -> None:
        super().__init__(options, **keywords)
        o = self.options
        nonzero_weights(embedding=o.embedding, hidden=o.hidden, attention=o.attention, prediction=o.prediction)
        self.compares_tokens = has_layers = bool(o.embedding or o.hidden or o.attention)
        self.hidden = LayersMethod(o, task=self.task) if has_layers else None
        self.stage1_fraction = 0.0
        if has_layers and o.prediction:
            self.stage1_fraction = 0.87 if o.stage1_fraction is None else o.stage1_fraction
        self.outputs = OutputTerms(self.task, o.prediction, 0.0, o.temperature, "soft_cross_entropy", "prediction")
        self.weights = {**(self._layers.weights if self._layers else {}), **self.outputs.weights}
        self.needs = self.student_needs = Needs(logits=bool(o.prediction))

    @property
    def _layers(self) -> LayersMethod | None:
        """The terms of the layers that are trained with the predictions, not before them."""
        return None if self.stage1_fraction else self.hidden

    def adapt_student(self, student: nn.Module, teacher: nn.Module | None, example: Batch) -> nn.Module:
        """The student; without predictions, everything after the compared layers is frozen."""
        self.build(student, teacher, example)
        return student if self.outputs.weights else freeze_unused(student, example, self.student_needs)

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the layers of both models, and build the projectors."""
        if self.hidden is None:
            return
        self.hidden.build(student, teacher, example, ids)
        if self.stage1_fraction:
            self.hidden.requires_grad_(False)
            return
        self.needs, self.student_needs = self.hidden.needs, self.hidden.student_needs
        if self.outputs.weights:
            assert self.needs is not None
            assert self.student_needs is not None
            self.needs = Needs(hidden=self.needs.hidden)
            self.student_needs = Needs(hidden=self.student_needs.hidden)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """``prediction``: outputs that count; the terms of the layers without a first stage: tokens that count."""
        return {**(self._layers.counts(batch) if self._layers else {}), **self.outputs.counts(batch)}

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """The term ``prediction`` and, without a first stage, those of the layers."""
        layers = self._layers(student, batch, signal) if self._layers else {}
        return {**layers, **self.outputs(student, batch, signal)}

    def phases(self) -> Sequence[Phase]:
        """The first stage: the layers."""
        return [Phase("layers", self.stage1_fraction, self.hidden)] if self.stage1_fraction and self.hidden else []

    def formula(self) -> str:
        """The loss in one line."""
        parts = [self.hidden.formula() if self.hidden is not None else "", self.outputs.formula()]
        separator = f" for {self.stage1_fraction:.0%} of the steps, then " if self.stage1_fraction else " + "
        return separator.join(part for part in parts if part)


def _attentions(
    mine: LayerStack, theirs: LayerStack, pairs: Sequence[tuple[int, int]], heads: str
) -> list[tuple[Attention, Attention]]:
    """The attention of pairs of layers; raises :class:`ModelError` if it cannot be compared."""
    students, teachers = mine.attentions([m for m, _ in pairs]), theirs.attentions([n for _, n in pairs])
    for (m, n), s, t in zip(pairs, students, teachers, strict=True):
        check_plain_attention(mine, m, s, "attention: 0")
        check_plain_attention(theirs, n, t, "attention: 0")
        if heads == "each" and s.heads != t.heads:
            raise ModelError(
                f"the student's layer {m} has {s.heads} heads of attention, the teacher's layer {n} has {t.heads}, "
                "so they cannot be compared head by head",
                where="method.heads", remedy="set heads: mean, or attention: 0",
            )  # fmt: skip
    return list(zip(students, teachers, strict=True))
