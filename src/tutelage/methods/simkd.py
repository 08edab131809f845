"""SimKD: the student borrows its teacher's classifier."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from tutelage import losses
from tutelage.data.batch import Batch
from tutelage.errors import ConfigError
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

    Args:
        weight: of the squared distance.
        variant: ``authors``: mean over elements, to which the published numbers and weight 1 belong; ``paper``: sum.
        factor: by how much the projector's middle layer is narrower than the teacher's feature.
        temperature: T of the soft labels, where ``alpha`` is above 0.
        alpha: weight of the soft labels. Default 0, as in the paper.
        hard: weight of the hard labels. Default 0, as in the paper.
        soft: as in :class:`LogitMethod`.
        soft_options: of that.

    Raises:
        ConfigError: a value out of range.

    Reference: Chen et al., Knowledge Distillation with the Reused Teacher Classifier (CVPR 2022).
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        variant: Literal["authors", "paper"] = "authors",
        factor: int = 2,
        temperature: float | None = None,
        alpha: float = 0.0,
        hard: float | None = 0.0,
        soft: str | None = None,
        soft_options: dict[str, object] | None = None,
    ) -> None:
        super().__init__()
        if not weight >= 0:
            raise ConfigError(f"weight={weight}", remedy="must be 0 or more")
        if variant not in ("authors", "paper"):
            raise ConfigError(f"variant={variant!r}", remedy="allowed: authors, paper")
        if factor < 1:
            raise ConfigError(f"factor={factor}", remedy="must be 1 or more")
        self.logit = LogitMethod(temperature, alpha, hard=hard, soft=soft, soft_options=soft_options)
        self.variant, self.factor, self.tap = variant, factor, ""
        self.takes_sparse = self.logit.takes_sparse
        self.labels = bool(self.logit.alpha or self.logit.hard)
        self.weights = {**(self.logit.weights if self.labels else {}), "simkd": weight}

    def adapt_student(self, student: nn.Module, teacher: nn.Module | None, example: Batch) -> ReusedHead:
        """The student with a projector and the teacher's classifier."""
        assert teacher is not None
        reused, self.tap = reuse_head(student, teacher, example, factor=self.factor)
        self.needs, self.student_needs = (
            Needs(logits=self.labels, hidden=(self.tap,), temperature=self.logit.temperature),
            Needs(hidden=("projector",)),
        )
        return reused

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Rows that count, and those of the labels."""
        return {**(self.logit.counts(batch) if self.labels else {}), "simkd": batch.counted().sum()}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """``simkd``, and where they weigh anything the soft term and ``ce``."""
        assert signal is not None
        terms = self.logit(student, batch, signal) if self.labels else {}
        counted, s, t = batch.counted(), student.hidden["projector"], signal.hidden[self.tap]
        if s.ndim == 4 and s.shape[2:] != t.shape[2:]:
            size = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
            s, t = nn.functional.adaptive_avg_pool2d(s, size), nn.functional.adaptive_avg_pool2d(t, size)
        loss = losses.simkd(s, t, variant=self.variant, mask=counted, reduction="sum")
        return {**terms, "simkd": Term(loss, counted.sum())}

    def formula(self) -> str:
        """The loss in one line."""
        feature = f"{self.weights['simkd']:g} * simkd"
        return f"{self.logit.formula()} + {feature}" if self.labels else feature
