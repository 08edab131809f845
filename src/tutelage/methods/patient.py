"""Patient knowledge distillation: the [CLS] states of mapped layers, beside soft and hard labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.data.batch import Batch, Task
from tutelage.errors import ConfigError
from tutelage.methods.base import Method, Term
from tutelage.methods.text_terms import (
    Outputs,
    check_weights,
    freeze_unreached,
    quiet_needs,
    seen_tokens,
    text_positions,
)
from tutelage.methods.transformer_layers import check_layers, find_layers, mapped
from tutelage.students import Projector, build_projector
from tutelage.taps import Needs, Observation
from tutelage.teachers.signal import Signal


class PatientMethod(Method):
    r"""PKD: :math:`\alpha\,\mathrm{KD} + (1-\alpha)\,\mathrm{CE} + \beta \sum_m \|\hat h^S_m - \hat h^T_{g(m)}\|^2`.

    :math:`\hat h` is the state of a text's first token, divided by its norm. The student's last layer has no place
    in the sum, for the soft labels are its own.

    Args:
        layers: the teacher's layer for each of the student's but the last: ``skip``, m * N / M; ``last``, the layers
            before the teacher's last; or a list counted from 1, where null leaves a layer out.
        temperature: T of the soft labels. The paper searched 5, 10 and 20.
        alpha: weight of the soft labels; at most 1 unless ``hard`` is given. The paper searched 0.2, 0.5 and 0.7.
        hard: weight of the labels. Default 1 - alpha.
        beta: weight of the states. The paper searched 10, 100, 500 and 1000.
        variant: ``authors``: mean over a state's elements and over layers, the code to which these weights belong;
            ``paper``: sums.
        task: what labels are.

    Raises:
        ConfigError: a value out of range, or no term left.

    Reference: Sun et al., Patient Knowledge Distillation for BERT Model Compression (EMNLP 2019). Where widths
    differ, which the paper does not have, the student's states go through a linear layer that all layers share.
    """

    def __init__(
        self,
        layers: str | Sequence[int | None] = "skip",
        temperature: float = 10.0,
        alpha: float = 0.5,
        *,
        hard: float | None = None,
        beta: float = 100.0,
        variant: Literal["authors", "paper"] = "authors",
        task: Task = "classes",
    ) -> None:
        super().__init__()
        check_layers(layers, ("skip", "last"))
        for name, value, right, remedy in (
            ("temperature", temperature, temperature > 0, "must be above 0; the paper has 5, 10 or 20"),
            ("alpha", alpha, hard is not None or alpha <= 1, "must lie in [0, 1]; above 1 with hard=... only"),
            ("variant", variant, variant in ("authors", "paper"), "allowed: authors, paper"),
        ):
            if not right:
                raise ConfigError(f"{name}={value!r}", remedy=remedy)
        hard = 1.0 - alpha if hard is None else hard
        check_weights(alpha=alpha, hard=hard, beta=beta)
        self.layers, self.variant, self.task = layers, variant, task
        self.outputs = Outputs(task, alpha, hard, temperature)
        self.weights = {**self.outputs.weights, **({"patient": beta} if beta else {})}
        self.pairs: list[tuple[str, str]] = []
        self.mapped: list[tuple[int, int]] = []
        self.projector: Projector | None = None

    def adapt_student(self, student: nn.Module, teacher: nn.Module | None, example: Batch) -> nn.Module:
        """The student; without labels of either kind, with what is behind the compared layers frozen."""
        self.build(student, teacher, example)
        if self.outputs.weights:
            return student
        assert self.student_needs is not None
        return freeze_unreached(student, example, self.student_needs)

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the layers of both models.

        Raises:
            ModelError: no layers are found, or none is left.
        """
        assert teacher is not None
        self.pairs, self.projector = [], None
        if "patient" in self.weights:
            mine, theirs = (
                find_layers("student", student, example), find_layers("teacher", teacher, example.for_teacher()),
            )  # fmt: skip
            self.mapped = mapped(self.layers, mine, theirs, but_last=True)
            self.pairs = [(mine.layers[m - 1].state, theirs.layers[n - 1].state) for m, n in self.mapped]
            if mine.width != theirs.width:
                self.projector = build_projector((1, mine.width), (1, theirs.width), kind="linear")
        taps = [[pair[i] for pair in self.pairs] for i in range(2)]
        taught = self.outputs.name in self.outputs.weights
        if self.outputs.weights:
            self.student_needs = Needs(hidden=tuple(dict.fromkeys(taps[0])))
        else:
            self.student_needs = quiet_needs(student, taps[0])
        if taught:
            self.needs = Needs(hidden=tuple(dict.fromkeys(taps[1])), temperature=self.outputs.temperature)
        else:
            self.needs = quiet_needs(teacher, taps[1]) if self.pairs else None

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Those of the labels, and texts that count."""
        own = {"patient": text_positions(batch).any(-1).sum()} if "patient" in self.weights else {}
        return {**self.outputs.counts(batch), **own}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The soft term, the hard one, and ``patient``, as far as they weigh anything."""
        terms = {} if not self.outputs.weights else self.outputs(student.logits, signal or Signal(), batch)
        if self.pairs:
            assert signal is not None
            counted = text_positions(batch).any(-1)
            first = seen_tokens(batch).int().argmax(1)
            rows = torch.arange(len(first), device=first.device)
            parts = []
            for mine, theirs in self.pairs:
                s, t = student.hidden[mine][rows, first], signal.hidden[theirs][rows, first]
                s = s if self.projector is None else self.projector(s, t)
                parts.append(losses.patient(s, t, variant=self.variant, mask=counted, reduction="sum"))
            total = torch.stack(parts)
            terms["patient"] = Term(total.mean() if self.variant == "authors" else total.sum(), counted.sum())
        return terms

    def formula(self) -> str:
        """The loss in one line, and which layers teach which as soon as they are found."""
        layers = ", ".join(f"{m}<-{n}" for m, n in self.mapped) or str(self.layers)
        parts = [self.outputs.formula()] if self.outputs.weights else []
        if "patient" in self.weights:
            parts.append(f"{self.weights['patient']:g} * patient of layers {layers}")
        return " + ".join(parts)
