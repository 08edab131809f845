"""TinyBERT: embeddings, hidden states and attention of mapped layers first, and then the predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.data.batch import Batch, Task
from tutelage.errors import ConfigError, ModelError
from tutelage.methods.base import Method, Phase, Term
from tutelage.methods.text_terms import (
    Outputs,
    check_same_tokens,
    check_weights,
    freeze_unreached,
    quiet_needs,
    seen_tokens,
    text_positions,
)
from tutelage.methods.transformer_layers import Attention, Stack, attention_scores, check_layers, find_layers, mapped
from tutelage.students import build_projector
from tutelage.taps import Needs, Observation
from tutelage.teachers.signal import Signal

Scores = Literal["scores", "probabilities"]

COMPARED: dict[str, Callable[..., Tensor]] = {
    "probabilities": losses.attention_kl,
    "scores": losses.attention_mse,
}
"""How attention is compared: scores by squares, or what the softmax makes of them by KL."""


class LayersMethod(Method):
    """The first stage of TinyBERT: all but the predictions.

    Args:
        layers: as of :class:`TinybertMethod`.
        weights: of ``embedding``, ``hidden`` and ``attention``, those above 0.
        scores: as of :class:`TinybertMethod`.
        heads: as of :class:`TinybertMethod`.
        task: what labels are.
    """

    def __init__(
        self, layers: str | Sequence[int | None], weights: Mapping[str, float], scores: str, heads: str, task: Task
    ) -> None:
        super().__init__()
        self.layers, self.weights, self.scores, self.heads = layers, dict(weights), scores, heads
        self.task = task
        self.projectors = nn.ModuleDict()
        self.states: dict[str, list[tuple[str, str]]] = {}
        self.attentions: list[tuple[Attention, Attention]] = []
        self.pairs: list[tuple[int, int]] = []

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the layers of both models, and make the projectors.

        Raises:
            ModelError: no layers are found, or attention that cannot be compared.
        """
        assert teacher is not None
        mine, theirs = (
            find_layers("student", student, example),
            find_layers("teacher", teacher, example.for_teacher()),
        )
        self.pairs = mapped(self.layers, mine, theirs)
        self.states = {}
        if "embedding" in self.weights:
            self.states["embedding"] = [(mine.embeddings, theirs.embeddings)]
        if "hidden" in self.weights:
            self.states["hidden"] = [(mine.layers[m - 1].state, theirs.layers[n - 1].state) for m, n in self.pairs]
        shapes = (1, 1, mine.width), (1, 1, theirs.width)
        self.projectors = nn.ModuleDict({name: build_projector(*shapes) for name in self.states})
        self.attentions = _attentions(mine, theirs, self.pairs, self.heads) if "attention" in self.weights else []
        taps: tuple[list[str], list[str]] = ([], [])
        for i, found in enumerate(taps):
            found += [pair[i] for pairs in self.states.values() for pair in pairs]
            found += [part.tap for pair in self.attentions for part in (pair[i].queries, pair[i].keys)]
        self.student_needs = quiet_needs(student, taps[0])
        self.needs = quiet_needs(teacher, taps[1])

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Tokens that count."""
        return dict.fromkeys(self.weights, text_positions(batch).sum())

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The terms ``embedding``, ``hidden`` and ``attention``, as far as they weigh anything.

        Raises:
            CapabilityError: teacher and student do not read the same tokens.
        """
        assert signal is not None
        positions, seen = text_positions(batch), seen_tokens(batch)
        terms, count = dict[str, Term](), positions.sum()
        for name, pairs in self.states.items():
            parts = [self._state(name, student.hidden[a], signal.hidden[b], positions) for a, b in pairs]
            terms[name] = Term(torch.stack(parts).sum(), count)
        if self.attentions:
            visible = positions.unsqueeze(-1) & seen.unsqueeze(-2)
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
        s, t = (
            attention_scores(one.queries.of(hidden), one.keys.of(hidden), one.heads or 1)
            for one, hidden in ((mine, student), (theirs, teacher))
        )
        check_same_tokens(s.transpose(1, 2), t.transpose(1, 2))
        return COMPARED[self.scores](s, t, heads=self.heads, mask=visible, reduction="sum")

    def formula(self) -> str:
        """The loss in one line, and which layers teach which as soon as they are found."""
        shown = {"attention": f"({self.scores})"}
        loss = " + ".join(f"{weight:g} * {name}{shown.get(name, '')}" for name, weight in self.weights.items())
        layers = ", ".join(f"{m}<-{n}" for m, n in self.pairs) or str(self.layers)
        return f"{loss} of layers {layers}" if {"hidden", "attention"} & set(self.weights) else loss


class TinybertMethod(Method):
    r"""TinyBERT: :math:`\mathrm{MSE}(E^S W_e, E^T) + \sum_m \mathrm{MSE}(H^S_m W_h, H^T_{g(m)}) +
    \mathrm{MSE}(A^S_m, A^T_{g(m)})`, and then soft cross-entropy.

    Attention is that before the softmax and before any mask, QK/sqrt(d), computed from queries and keys, whatever
    computes the model's own. A query counts where its token does, and sees all keys that are no padding. Without
    predictions this is TinyBERT's general distillation.

    Args:
        layers: the teacher's layer for each of the student's: ``uniform``, m * N / M, rounded; ``last``, the last M;
            or a list counted from 1, where null leaves a layer out.
        embedding: weight of what goes into the first layer.
        hidden: weight of what layers give, summed over them. Where widths differ the student's go through a linear
            layer that all layers share, as in the paper; embeddings through another.
        attention: weight of the attention, summed over layers.
        prediction: weight of the soft labels: cross-entropy of classes, each for itself of several labels, squares
            of numbers.
        temperature: T of the soft labels.
        stage1_fraction: share of the steps in which the layers alone are learned, and after which they are
            dropped; 0: both together. Default 0.87, the paper's 20 epochs of 23.
        scores: ``scores``: attention before the softmax, by squares, the paper's; ``probabilities``: after it, by KL.
        heads: ``each``, head by head; ``mean``, which may differ in number.
        task: what labels are.

    Raises:
        ConfigError: a value out of range, or no term left.

    Reference: Jiao et al., TinyBERT (EMNLP Findings 2020), equations 5 to 11.
    """

    def __init__(
        self,
        layers: str | Sequence[int | None] = "uniform",
        *,
        embedding: float = 1.0,
        hidden: float = 1.0,
        attention: float = 1.0,
        prediction: float = 1.0,
        temperature: float = 1.0,
        stage1_fraction: float | None = None,
        scores: Scores = "scores",
        heads: Literal["each", "mean"] = "each",
        task: Task = "classes",
    ) -> None:
        super().__init__()
        self.task = task
        weights = check_weights(embedding=embedding, hidden=hidden, attention=attention, prediction=prediction)
        check_layers(layers, ("uniform", "last"))
        of_layers = {name: weight for name, weight in weights.items() if name != "prediction"}
        both = bool(of_layers) and bool(prediction)
        for name, value, right, remedy in (
            ("temperature", temperature, temperature > 0, "must be above 0; TinyBERT has 1"),
            (
                "stage1_fraction",
                stage1_fraction,
                stage1_fraction is None or 0 <= stage1_fraction < 1,
                "a share of all steps, from 0 to below 1",
            ),
            (
                "stage1_fraction",
                stage1_fraction,
                not stage1_fraction or both,
                "there is one stage only where a side weighs nothing; leave it out",
            ),
            ("scores", scores, scores in COMPARED, f"allowed: {', '.join(COMPARED)}"),
            ("heads", heads, heads in ("each", "mean"), "allowed: each, mean"),
        ):
            if not right:
                raise ConfigError(f"{name}={value!r}", remedy=remedy)
        self.stage1_fraction = (0.87 if stage1_fraction is None else stage1_fraction) if both else 0.0
        self.hidden = LayersMethod(layers, of_layers, scores, heads, task) if of_layers else None
        self.outputs = Outputs(task, prediction, 0.0, temperature, "soft_cross_entropy", "prediction")
        self.together = self.hidden is not None and not self.stage1_fraction
        self.weights = {**(of_layers if self.together else {}), **self.outputs.weights}
        self.needs = self.student_needs = Needs(logits=bool(prediction))

    def adapt_student(self, student: nn.Module, teacher: nn.Module | None, example: Batch) -> nn.Module:
        """The student; without predictions, with what is behind the compared layers frozen."""
        self.build(student, teacher, example)
        if self.outputs.weights:
            return student
        assert self.student_needs is not None
        return freeze_unreached(student, example, self.student_needs)

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the layers of both models, and make the projectors.

        Raises:
            ModelError: no layers are found, or attention that cannot be compared.
        """
        if self.hidden is None:
            return
        self.hidden.build(student, teacher, example, ids)
        if self.stage1_fraction:
            self.hidden.requires_grad_(False)
            return
        assert self.hidden.needs is not None
        assert self.hidden.student_needs is not None
        self.needs, self.student_needs = self.hidden.needs, self.hidden.student_needs
        if self.outputs.weights:
            self.needs = Needs(hidden=self.needs.hidden)
            self.student_needs = Needs(hidden=self.student_needs.hidden)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """``prediction``: outputs that count; unless they came first, of the layers tokens that count."""
        layers = self.hidden.counts(batch) if self.hidden is not None and self.together else {}
        return {**layers, **self.outputs.counts(batch)}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The term ``prediction`` and, unless they came first, those of the layers."""
        assert signal is not None
        layers = self.hidden(student, batch, signal) if self.hidden is not None and self.together else {}
        return {**layers, **self.outputs(student.logits, signal, batch)}

    def phases(self) -> Sequence[Phase]:
        """The layers, where they come first."""
        return (
            [Phase("layers", self.stage1_fraction, self.hidden)]
            if self.stage1_fraction and self.hidden is not None
            else []
        )

    def formula(self) -> str:
        """The loss in one line."""
        parts = [self.hidden.formula() if self.hidden is not None else "", self.outputs.formula()]
        link = f" for {self.stage1_fraction:.0%} of the steps, then " if self.stage1_fraction else " + "
        return link.join(part for part in parts if part)


def _attentions(
    mine: Stack, theirs: Stack, pairs: Sequence[tuple[int, int]], heads: str
) -> list[tuple[Attention, Attention]]:
    """The attention of pairs of layers, once it is known that it can be compared."""
    found = list(zip(mine.attentions([m for m, _ in pairs]), theirs.attentions([n for _, n in pairs]), strict=True))
    for (m, n), (s, t) in zip(pairs, found, strict=True):
        check_plain(mine, m, s, "attention: 0")
        check_plain(theirs, n, t, "attention: 0")
        if heads == "each" and s.heads != t.heads:
            raise ModelError(
                f"the student's layer {m} has {s.heads} heads of attention, the teacher's layer {n} has {t.heads}, "
                "and head by head there is no pairing",
                where="method.heads", remedy="set heads: mean, or attention: 0",
            )  # fmt: skip
    return found


def check_plain(stack: Stack, number: int, attention: Attention, without: str) -> None:
    """Raise :class:`ModelError` where a layer's attention is more than a product of queries and keys."""
    if not attention.plain:
        raise ModelError(
            f"attention in layer {number} of the {stack.who}, {type(stack.model).__name__}, is not "
            "softmax(QK/sqrt(d)) of its queries and keys alone: it has rotary or relative positions, or a window",
            where="method", remedy=f"set {without}",
        )  # fmt: skip
