"""Patient knowledge distillation: the [CLS] states of mapped layers, soft labels and hard labels."""

from typing import Any

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.config.methods.encoders import PatientOptions
from tutelage.data.batch import Batch
from tutelage.methods.base import Method, Term
from tutelage.methods.text_terms import (
    OutputTerms,
    counted_tokens,
    freeze_unused,
    non_padding,
    nonzero_weights,
    taps_only,
)
from tutelage.methods.transformer_layers import find_both_layers, map_layers
from tutelage.students import Projector, build_projector
from tutelage.taps import Needs, Observation
from tutelage.teachers.signal import Signal


class PatientMethod(Method):
    r"""PKD: :math:`\alpha\,\mathrm{KD} + (1-\alpha)\,\mathrm{CE} + \beta \sum_m \|\hat h^S_m - \hat h^T_{g(m)}\|^2`.

    :math:`\hat h` is the state of a text's first token, divided by its norm. The sum excludes the student's last
    layer, which the soft labels train. If the widths differ, which the paper does not cover, the student's states go
    through one linear layer for all layers.

    Raises:
        ConfigError: all weights are 0.

    Reference: Sun et al., Patient Knowledge Distillation for BERT Model Compression (EMNLP 2019).
    """

    Options = PatientOptions
    options: PatientOptions

    def __init__(self, options: PatientOptions | None = None, /, **keywords: Any) -> None:
        super().__init__(options, **keywords)
        o = self.options
        hard = 1.0 - o.alpha if o.hard is None else o.hard
        nonzero_weights(alpha=o.alpha, hard=hard, beta=o.beta)
        self.outputs = OutputTerms(self.task, o.alpha, hard, o.temperature)
        self.weights = {**self.outputs.weights, **({"patient": o.beta} if o.beta else {})}
        self.layer_map: list[tuple[int, int]] = []
        self.pairs: list[tuple[str, str]] = []
        self.projector: Projector | None = None

    def adapt_student(self, student: nn.Module, teacher: nn.Module | None, example: Batch) -> nn.Module:
        """The student; without soft and hard labels, everything after the compared layers is frozen."""
        self.build(student, teacher, example)
        return student if self.outputs.weights else freeze_unused(student, example, self.student_needs)

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the layers of both models."""
        assert teacher is not None
        self.pairs, self.projector = [], None
        if "patient" in self.weights:
            mine, theirs = find_both_layers(student, teacher, example)
            self.layer_map = map_layers(self.options.layers, mine, theirs, exclude_last=True)
            self.pairs = [(mine.layers[m - 1].output, theirs.layers[n - 1].output) for m, n in self.layer_map]
            if mine.width != theirs.width:
                self.projector = build_projector((1, mine.width), (1, theirs.width), kind="linear")
        taps = [tuple(dict.fromkeys(pair[i] for pair in self.pairs)) for i in range(2)]
        self.student_needs = Needs(hidden=taps[0]) if self.outputs.weights else taps_only(student, taps[0])
        if self.outputs.soft_term in self.outputs.weights:
            self.needs = Needs(hidden=taps[1], temperature=self.outputs.options.temperature)
        else:
            self.needs = taps_only(teacher, taps[1]) if self.pairs else None

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Outputs that count, those with a label, and for ``patient`` texts that count."""
        patient = {"patient": counted_tokens(batch).any(-1).sum()} if "patient" in self.weights else {}
        return {**self.outputs.counts(batch), **patient}

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """The soft term, the hard one, and ``patient``, if they have a weight."""
        terms: dict[str, Term] = self.outputs(student, batch, signal)
        if self.pairs:
            counted, variant = counted_tokens(batch).any(-1), self.options.variant
            first = non_padding(batch).int().argmax(1)
            rows = torch.arange(len(first), device=first.device)
            parts = []
            for mine, theirs in self.pairs:
                s, t = student.hidden[mine][rows, first], signal.hidden[theirs][rows, first]
                s = s if self.projector is None else self.projector(s, t)
                parts.append(losses.patient(s, t, variant=variant, mask=counted, reduction="sum"))
            total = torch.stack(parts)
            terms["patient"] = Term(total.mean() if variant == "authors" else total.sum(), counted.sum())
        return terms

    def _formula_names(self) -> dict[str, str]:
        layers = ", ".join(f"{m}<-{n}" for m, n in self.layer_map) or str(self.options.layers)
        return {**self.outputs._formula_names(), "patient": f"patient of layers {layers}"}
