"""SimKD: the student uses its teacher's classifier."""

from typing import Any

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.config.methods.feature import SimkdOptions
from tutelage.data.batch import Batch
from tutelage.methods.base import Method, Term
from tutelage.methods.logit import LogitMethod
from tutelage.students import ReusedHead, reuse_head
from tutelage.taps import Needs, Observation
from tutelage.teachers.signal import Signal


class SimkdMethod(Method):
    r"""SimKD: :math:`w\,\|P(F^S) - F^T\|_2^2`, and the teacher's own classifier on the projected feature.

    The student is trained and exported with a projector and the teacher's classifier in place of its own head, so it
    has more parameters than the baseline student: the run says how many. Maps are compared where the teacher's
    classifier works on the mean of its last map, else what goes into the heads.

    Reference: Chen et al., Knowledge Distillation with the Reused Teacher Classifier (CVPR 2022).
    """

    Options = SimkdOptions
    options: SimkdOptions
    tasks = ("classes",)

    def __init__(self, options: SimkdOptions | None = None, /, **keywords: Any) -> None:
        super().__init__(options, **keywords)
        self.logit, self.taps = LogitMethod(self.options.logit_options()), tuple[str, ...]()
        self.takes_sparse = self.logit.takes_sparse
        self.labels = bool(self.options.alpha or self.options.hard_weight)
        self.weights = {**(self.logit.weights if self.labels else {}), "simkd": self.options.weight}

    def adapt_student(self, student: nn.Module, teacher: nn.Module | None, example: Batch) -> ReusedHead:
        """The student with a projector and the teacher's classifier."""
        assert teacher is not None
        reused, self.taps = reuse_head(student, teacher, example, factor=self.options.factor)
        self.needs, self.student_needs = (
            Needs(logits=self.labels, hidden=self.taps, temperature=self.options.temperature),
            Needs(hidden=("projector",)),
        )
        return reused

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Rows that count; for ``ce`` those with a label."""
        return {**(self.logit.counts(batch) if self.labels else {}), "simkd": batch.counted().sum()}

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """``simkd``, and the soft term and ``ce`` unless both weights are 0."""
        terms = self.logit(student, batch, signal) if self.labels else {}
        counted, s = batch.counted(), student.hidden["projector"]
        features = [signal.hidden[tap] for tap in self.taps]
        t = features[0] if len(features) == 1 else torch.cat(features, -1)
        if s.ndim == 4 and s.shape[2:] != t.shape[2:]:
            size = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
            s, t = nn.functional.adaptive_avg_pool2d(s, size), nn.functional.adaptive_avg_pool2d(t, size)
        loss = losses.simkd(s, t, variant=self.options.variant, mask=counted, reduction="sum")
        return {**terms, "simkd": Term(loss, counted.sum())}

    def _formula_names(self) -> dict[str, str]:
        return self.logit._formula_names()
