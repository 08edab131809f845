"""Learning from labels, and from a teacher's logits."""

from __future__ import annotations

from torch import Tensor

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError, ConfigError
from tutelage.methods.base import Method, Term
from tutelage.objectives import cross_entropy, kd
from tutelage.taps import Observation
from tutelage.teachers.signal import Signal


class SupervisedMethod(Method):
    """Cross-entropy with the labels: how a teacher is trained, and a student alone."""

    needs = None

    def __init__(self) -> None:
        super().__init__()
        self.weights = {"ce": 1.0}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """``ce``: positions with a label."""
        return {"ce": batch.labelled().sum()}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The term ``ce``."""
        assert student.logits is not None
        ce = cross_entropy(student.logits, batch.labels, mask=batch.mask, reduction="sum")
        return {"ce": Term(ce, batch.labelled().sum())}


class LogitMethod(Method):
    r"""Soft and hard labels: :math:`\alpha T^2 \mathrm{KL}(p^T\|p^S) + (1-\alpha)\,\mathrm{CE}(y, p^S)`.

    The soft term is averaged over all positions that count, the hard one over those with a label,
    so images without labels are learned from the teacher alone.

    Args:
        temperature: T, above 0. Default 4.
        alpha: weight of the soft term, in [0, 1]. Default 0.9.

    Raises:
        ConfigError: a value out of range.

    Reference: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network (2015), section 2.
    """

    def __init__(self, temperature: float = 4.0, alpha: float = 0.9) -> None:
        super().__init__()
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature}", remedy="must be above 0; 4 is a good start")
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha={alpha}", remedy="must lie in [0, 1]: the weight of the teacher's soft labels")
        self.temperature, self.alpha = temperature, alpha
        self.weights = {"kd": alpha, "ce": 1.0 - alpha}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """``kd``: positions that count; ``ce``: those of them with a label."""
        return {"kd": batch.counted().sum(), "ce": batch.labelled().sum()}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The terms ``kd`` and ``ce``.

        Raises:
            CapabilityError: teacher and student have different numbers of classes.
        """
        assert student.logits is not None
        assert signal is not None
        teacher = signal.dense()
        if teacher.shape != student.logits.shape:
            raise CapabilityError(
                f"the student's logits are {tuple(student.logits.shape)}, the teacher's {tuple(teacher.shape)}",
                remedy="both must score the same classes in the same order",
            )
        counts = self.counts(batch)
        soft = kd(student.logits, teacher, temperature=self.temperature, mask=batch.mask, reduction="sum")
        hard = cross_entropy(student.logits, batch.labels, mask=batch.mask, reduction="sum")
        return {"kd": Term(soft, counts["kd"]), "ce": Term(hard, counts["ce"])}

    def formula(self) -> str:
        """The loss in one line."""
        return f"{self.alpha:g} * kd(T={self.temperature:g}) + {1 - self.alpha:g} * ce"
