"""Learning from labels, and from a teacher's logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tutelage import losses
from tutelage.data.batch import Batch, Task
from tutelage.errors import CapabilityError, ConfigError, suggest
from tutelage.methods.base import Method, Term
from tutelage.methods.label_losses import hard_of
from tutelage.taps import Needs, Observation
from tutelage.teachers.signal import Signal, Sparse


@dataclass(frozen=True)
class LogitLoss:
    """A loss on the logits of teacher and student.

    Attributes:
        function: the function of tensors.
        options: what it takes beside tensors and the temperature.
        temperature: T where none is given; ``None`` for a loss without one.
        labels: whether it needs the target class too, and so counts rows with a label only.
        tasks: what labels may be.
    """

    function: Callable[..., Tensor]
    options: tuple[str, ...] = ()
    temperature: float | None = 4.0
    labels: bool = False
    tasks: tuple[Task, ...] = ("classes",)


LOGIT_LOSSES: dict[str, LogitLoss] = {
    "binary_kd": LogitLoss(losses.binary_kd, tasks=("multi-label",)),
    "dist": LogitLoss(losses.dist, ("beta", "gamma"), temperature=1.0),
    "dkd": LogitLoss(losses.dkd, ("alpha", "beta"), labels=True),
    "js": LogitLoss(losses.js, ("beta",), temperature=1.0),
    "kd": LogitLoss(losses.kd, ("standardize",)),
    "margin_mse": LogitLoss(losses.margin_mse, temperature=None, tasks=("classes", "ranking")),
    "mlkd": LogitLoss(losses.mlkd, ("temperatures", "instance", "batch", "classes"), temperature=None),
    "mse": LogitLoss(losses.mse, temperature=None, tasks=("classes", "multi-label", "regression")),
    "reverse_kl": LogitLoss(losses.reverse_kl, temperature=1.0),
    "skew_kl": LogitLoss(losses.skew_kl, ("alpha", "reverse"), temperature=1.0),
    "soft_cross_entropy": LogitLoss(losses.soft_cross_entropy),
    "tvd": LogitLoss(losses.tvd, temperature=1.0),
}
"""Every loss that a recipe's ``soft`` can name. ``tutelage.config.LOGIT_LOSSES`` has their options."""


class SupervisedMethod(Method):
    """Cross-entropy with the labels: how a teacher is trained, and a baseline student.

    Args:
        label_smoothing: share of the target that is spread evenly over all classes, in [0, 1).
        task: what labels are. Of ``multi-label`` each is a cross-entropy of its own, ``bce``; of ``regression`` the
            loss is ``squared_error``.

    Raises:
        ConfigError: a value out of range.

    Reference: Szegedy et al., Rethinking the Inception Architecture (CVPR 2016), section 7, which has 0.1.
    """

    needs = None
    uses_unlabelled = False

    def __init__(self, label_smoothing: float = 0.0, *, task: Task = "classes") -> None:
        super().__init__()
        self.task, self.labels = task, hard_of(task)
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigError(
                f"label_smoothing={label_smoothing}", remedy="must lie in [0, 1): 0.1 is usual, 0 is plain labels"
            )
        if label_smoothing and task == "regression":
            raise ConfigError(f"label_smoothing={label_smoothing}", remedy="numbers are not smoothed; leave it out")
        self.label_smoothing = label_smoothing
        self.weights = {self.labels.term: 1.0}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Positions with a label."""
        return {self.labels.term: batch.labelled().sum()}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The one term, ``ce``, ``bce`` or ``squared_error``."""
        assert student.logits is not None
        loss = self.labels.loss(student.logits, batch, self.label_smoothing)
        return {self.labels.term: Term(loss, batch.labelled().sum())}

    def formula(self) -> str:
        """The loss in one line."""
        smoothed = f"(label_smoothing={self.label_smoothing:g})" if self.label_smoothing else ""
        return f"1 * {self.labels.term}{smoothed}"


class TeacherFreeMethod(Method):
    r"""Tf-KD: :math:`(1-\alpha)\,\mathrm{CE}(y, p^S) + \alpha\,\mathrm{soft}`, taught by a distribution made by hand.

    What it gains, label smoothing of the same strength may gain too: compare them.

    Args:
        alpha: weight of the virtual teacher's soft labels, in [0, 1].
        temperature: T, above 0.
        correct: the virtual teacher's probability of the label, below 1.
        variant: as in :func:`tutelage.losses.teacher_free`. ``authors`` is what the published numbers belong to.

    Raises:
        ConfigError: a value out of range.

    Reference: Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization (CVPR 2020),
    section 5, Tf-KD_reg. Defaults are those of the authors' code for CIFAR-100.
    """

    needs = None
    uses_unlabelled = False

    def __init__(
        self,
        alpha: float = 0.1,
        temperature: float = 20.0,
        correct: float = 0.99,
        *,
        variant: Literal["authors", "paper"] = "authors",
    ) -> None:
        super().__init__()
        for name, value, right, remedy in (
            ("alpha", alpha, 0.0 <= alpha <= 1.0, "must lie in [0, 1]: the weight of the soft labels"),
            ("temperature", temperature, temperature > 0, "must be above 0; the paper has 20 or more"),
            ("correct", correct, 0.0 < correct < 1.0, "must lie between 1/C and 1; the paper has 0.9 or more"),
            ("variant", variant, variant in ("authors", "paper"), "allowed: authors, paper"),
        ):
            if not right:
                raise ConfigError(f"{name}={value!r}", remedy=remedy)
        self.alpha, self.temperature, self.correct, self.variant = alpha, temperature, correct, variant
        self.weights = {"teacher_free": alpha, "ce": 1.0 - alpha}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Both: positions with a label."""
        return dict.fromkeys(self.weights, batch.labelled().sum())

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The terms ``teacher_free`` and ``ce``.

        Raises:
            ConfigError: the virtual teacher finds the label no likelier than another class.
        """
        assert student.logits is not None
        logits, count = student.logits, batch.labelled().sum()
        if self.correct * logits.shape[-1] <= 1:
            raise ConfigError(
                f"correct={self.correct:g} of {logits.shape[-1]} classes", where="method.correct",
                remedy="must be above 1/C, or the label is not the likeliest class; the paper has 0.9 or more",
            )  # fmt: skip
        soft = losses.teacher_free(
            logits, batch.labels, correct=self.correct, temperature=self.temperature, variant=self.variant,
            mask=batch.mask, reduction="sum",
        )  # fmt: skip
        hard = losses.cross_entropy(logits, batch.labels, mask=batch.mask, reduction="sum")
        return {"teacher_free": Term(soft, count), "ce": Term(hard, count)}

    def formula(self) -> str:
        """The loss in one line."""
        soft = f"teacher_free(T={self.temperature:g}, correct={self.correct:g}, {self.variant})"
        return f"{self.alpha:g} * {soft} + {1 - self.alpha:g} * ce"


class LogitMethod(Method):
    r"""Soft and hard labels: :math:`\alpha\,\mathrm{soft}(z^S, z^T) + h\,\mathrm{CE}(y, z^S)`.

    By default :math:`\alpha T^2 \mathrm{KL}(p^T\|p^S) + (1-\alpha)\,\mathrm{CE}(y, p^S)` of Hinton et al.
    The soft term is averaged over all positions that count, the hard one over those with a label,
    so images without labels are learned from the teacher alone. ``dkd`` needs the label itself, and so learns
    nothing from those; ``dist`` and ``mlkd`` compare the rows of a micro-batch: for them its size matters.

    Args:
        temperature: T, above 0. Default: that of the loss, 4 for ``kd``.
        alpha: weight of the soft term; at most 1 unless ``hard`` is given. Default 0.9.
        hard: weight of the labels. Default 1 - alpha.
        soft: one of :data:`LOGIT_LOSSES`. Default: that of the task, ``kd``, ``binary_kd`` or ``mse``.
        soft_options: of that loss, such as ``{"beta": 8}`` for ``dkd``.
        task: what labels are: one class of several (``classes``), any number of them (``multi-label``), or numbers
            (``regression``).

    Raises:
        ConfigError: a value out of range, an unknown loss or option, or one that is not of the task.

    Reference: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network (2015), section 2; those of
    the losses. Published weights: ``dkd`` and ``dist`` have alpha = hard = 1 (``dist`` with beta = gamma = 2
    on CIFAR).
    """

    def __init__(
        self,
        temperature: float | None = None,
        alpha: float = 0.9,
        *,
        hard: float | None = None,
        soft: str | None = None,
        soft_options: Mapping[str, Any] | None = None,
        task: Task = "classes",
    ) -> None:
        super().__init__()
        self.task, self.labels = task, hard_of(task)
        soft = self.labels.soft if soft is None else soft
        if soft not in LOGIT_LOSSES:
            raise ConfigError(
                f"soft={soft!r}" + suggest(str(soft), list(LOGIT_LOSSES)),
                remedy=f"allowed: {', '.join(LOGIT_LOSSES)}",
            )
        if temperature is not None and not temperature > 0:
            raise ConfigError(f"temperature={temperature}", remedy="must be above 0; 4 is a good start")
        if alpha < 0 or (hard is None and not alpha <= 1):
            raise ConfigError(
                f"alpha={alpha}",
                remedy="must lie in [0, 1]: the weight of the teacher's soft labels; above 1 with hard=... only",
            )
        if hard is not None and not hard >= 0:
            raise ConfigError(f"hard={hard}", remedy="must be 0 or more: the weight of the labels")
        self.soft, self.loss, self.alpha = soft, LOGIT_LOSSES[soft], alpha
        if task not in self.loss.tasks:
            fitting = [name for name, known in LOGIT_LOSSES.items() if task in known.tasks]
            raise ConfigError(
                f"soft={soft!r} is for {' and '.join(self.loss.tasks)}, and the labels are {task}",
                remedy=f"use {' or '.join(fitting)}",
            )
        self.hard = 1.0 - alpha if hard is None else hard
        if self.loss.temperature is None and temperature is not None:
            raise ConfigError(f"{soft} has no temperature, given {temperature}", remedy="leave temperature out")
        self.temperature = self.loss.temperature if temperature is None else temperature
        self.options = {k: v for k, v in (soft_options or {}).items() if v is not None}
        self._check_options()
        self.weights = {soft: self.alpha, self.labels.term: self.hard}
        self.needs = Needs(temperature=self.temperature)
        self.takes_sparse = soft in ("kd", "soft_cross_entropy") and not self.options

    def _check_options(self) -> None:
        for key in self.options:
            if key not in self.loss.options:
                raise ConfigError(
                    f"{self.soft} has no option {key!r}",
                    remedy=f"its options: {', '.join(self.loss.options) or 'none'}",
                )
        probe = torch.zeros(2, 3)
        try:
            self._soft(probe, probe, torch.zeros(2, dtype=torch.long), None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self.soft} with {self.options}: {error}", remedy="see docs/recipes.md") from None

    def _soft(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        tensors = (student, teacher, labels) if self.loss.labels else (student, teacher)
        options = self.options if self.temperature is None else {"temperature": self.temperature, **self.options}
        return self.loss.function(*tensors, mask=mask, reduction="sum", **options)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The soft term: positions that count (for ``dkd``, with a label); the hard one: those with a label."""
        labelled = batch.labelled().sum()
        return {self.soft: labelled if self.loss.labels else batch.counted().sum(), self.labels.term: labelled}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The soft term, by the name of its loss, and the hard one.

        Raises:
            CapabilityError: teacher and student have different numbers of classes.
        """
        assert student.logits is not None
        assert signal is not None
        counts, term = self.counts(batch), self.labels.term
        hard = Term(self.labels.loss(student.logits, batch, 0.0), counts[term])
        if signal.logits is None and signal.sparse is not None:
            soft = self._sparse(student.logits, signal.sparse, batch.mask)
            return {self.soft: Term(soft, counts[self.soft]), term: hard}
        teacher = signal.dense()
        if teacher.shape != student.logits.shape:
            raise CapabilityError(
                f"the student's logits are {tuple(student.logits.shape)}, the teacher's {tuple(teacher.shape)}",
                remedy="both must score the same classes in the same order",
            )
        soft = self._soft(student.logits, teacher, batch.labels, batch.mask)
        return {self.soft: Term(soft, counts[self.soft]), term: hard}

    def _sparse(self, logits: Tensor, part: Sparse, mask: Tensor | None) -> Tensor:
        """The soft term where the teacher says part of its distribution."""
        if not self.takes_sparse:
            raise CapabilityError(
                f"{self.soft} needs all of the teacher's logits, and this teacher gives {part.kind}",
                remedy="use soft: kd without options, or a dense cache",
            )
        if logits.shape[-1] != part.classes:
            raise CapabilityError(
                f"the student scores {logits.shape[-1]} classes, the teacher {part.classes}",
                remedy="both must score the same classes in the same order",
            )
        if part.temperature != self.temperature:
            raise CapabilityError(
                f"the teacher's distribution is at T = {part.temperature:g}, the method's T is {self.temperature}",
                remedy="a part of a distribution cannot be softened afterwards: use one temperature",
            )
        loss = losses.topk_kd if part.kind == "topk" else losses.sampled_kd
        return loss(logits, part.index, part.values, temperature=part.temperature, mask=mask, reduction="sum")

    def formula(self) -> str:
        """The loss in one line."""
        shown = [] if self.temperature is None else [f"T={self.temperature:g}"]
        shown += [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.options.items()]
        soft = f"{self.soft}({', '.join(shown)})" if shown else self.soft
        return f"{self.alpha:g} * {soft} + {self.hard:g} * {self.labels.term}"
