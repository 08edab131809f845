"""Learning from labels, and from a teacher's logits."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tutelage import losses
from tutelage.config import LOGIT_LOSSES, SOFT_OF_TASK, LogitOptions
from tutelage.config.methods.teacherless import SupervisedOptions, TeacherFreeOptions
from tutelage.data.batch import Batch, Task
from tutelage.errors import CapabilityError, ConfigError
from tutelage.methods.base import Method, Term
from tutelage.methods.label_losses import label_loss
from tutelage.taps import Needs, Observation
from tutelage.teachers.signal import Signal, Sparse


def logit_loss(name: str) -> Callable[..., Tensor]:
    """The function of an entry of ``LOGIT_LOSSES``."""
    function: Callable[..., Tensor] = getattr(losses, name)
    return function


class SupervisedMethod(Method):
    """Cross-entropy with the labels: how a teacher and a baseline student are trained.

    For ``multi-label`` data the loss is a binary cross-entropy for each class, ``bce``; for ``regression`` it is
    ``squared_error``.

    Raises:
        ConfigError: label smoothing of ``regression``.

    Reference: Szegedy et al., Rethinking the Inception Architecture (CVPR 2016), section 7: label smoothing 0.1.
    """

    Options = SupervisedOptions
    options: SupervisedOptions
    needs = None
    uses_unlabelled = False

    def __init__(
        self, options: SupervisedOptions | None = None, /, *, task: Task = "classes", **keywords: Any
    ) -> None:
        super().__init__(options, task=task, **keywords)
        self.labels, smoothing = label_loss(task), self.options.label_smoothing
        if smoothing and task == "regression":
            raise ConfigError(f"label_smoothing={smoothing:g}", remedy="numbers are not smoothed; leave it out")
        self.weights = {self.labels.term: 1.0}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Positions with a label."""
        return {self.labels.term: batch.labelled().sum()}

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """The one term, ``ce``, ``bce`` or ``squared_error``."""
        assert student.logits is not None
        loss = self.labels.loss(student.logits, batch, self.options.label_smoothing)
        return {self.labels.term: Term(loss, batch.labelled().sum())}

    def _formula_names(self) -> dict[str, str]:
        term, smoothing = self.labels.term, self.options.label_smoothing
        return {term: f"{term}(label_smoothing={smoothing:g})"} if smoothing else {}


class TeacherFreeMethod(Method):
    r"""Tf-KD: :math:`(1-\alpha)\,\mathrm{CE}(y, p^S) + \alpha\,\mathrm{soft}`, with hand-made soft labels.

    Label smoothing of the same strength may gain as much: compare the two.

    Reference: Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization (CVPR 2020),
    section 5, Tf-KD_reg. Defaults are those of the authors' code for CIFAR-100.
    """

    Options = TeacherFreeOptions
    options: TeacherFreeOptions
    needs = None
    uses_unlabelled = False
    tasks = ("classes",)

    def __init__(self, options: TeacherFreeOptions | None = None, /, **keywords: Any) -> None:
        super().__init__(options, **keywords)
        self.weights = {"teacher_free": self.options.alpha, "ce": 1.0 - self.options.alpha}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Both: positions with a label."""
        return dict.fromkeys(self.weights, batch.labelled().sum())

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """The terms ``teacher_free`` and ``ce``.

        Raises:
            ConfigError: the label is not the most probable class of the soft labels.
        """
        assert student.logits is not None
        o, logits, count = self.options, student.logits, batch.labelled().sum()
        if o.correct * logits.shape[-1] <= 1:
            raise ConfigError(
                f"correct={o.correct:g} of {logits.shape[-1]} classes", where="method.correct",
                remedy="must be above 1/C, or the label is not the most probable class; the paper has 0.9 or more",
            )  # fmt: skip
        soft = losses.teacher_free(
            logits, batch.labels, correct=o.correct, temperature=o.temperature, variant=o.variant, mask=batch.mask,
            reduction="sum",
        )  # fmt: skip
        hard = losses.cross_entropy(logits, batch.labels, mask=batch.mask, reduction="sum")
        return {"teacher_free": Term(soft, count), "ce": Term(hard, count)}

    def _formula_names(self) -> dict[str, str]:
        o = self.options
        return {"teacher_free": f"teacher_free(T={o.temperature:g}, correct={o.correct:g}, {o.variant})"}


class LogitMethod(Method):
    r"""Soft and hard labels: :math:`\alpha\,\mathrm{soft}(z^S, z^T) + h\,\mathrm{CE}(y, z^S)`.

    By default :math:`\alpha T^2 \mathrm{KL}(p^T\|p^S) + (1-\alpha)\,\mathrm{CE}(y, p^S)` of Hinton et al.
    The soft term is averaged over all positions that count, the hard one over those with a label, so that images
    without labels are learned from the teacher alone. ``dkd`` needs the label and learns nothing from those images;
    ``dist`` and ``mlkd`` compare the rows of a micro-batch, so that its size matters.

    The default of ``soft`` depends on ``task``: ``kd``, ``binary_kd``, ``mse`` or ``margin_mse``.

    Raises:
        ConfigError: a loss that is not for the task.

    Reference: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network (2015), section 2; those of
    the losses. Published weights: ``dkd`` and ``dist`` have alpha = hard = 1 (``dist`` with beta = gamma = 2
    on CIFAR).
    """

    Options = LogitOptions
    options: LogitOptions

    def __init__(self, options: LogitOptions | None = None, /, *, task: Task = "classes", **keywords: Any) -> None:
        labels = label_loss(task)
        if options is None:
            keywords.setdefault("soft", SOFT_OF_TASK[task])
        super().__init__(options, task=task, **keywords)
        o, self.labels = self.options, labels
        spec = LOGIT_LOSSES[o.soft]
        if task not in spec.tasks:
            fitting = [name for name, entry in LOGIT_LOSSES.items() if task in entry.tasks]
            raise ConfigError(
                f"soft={o.soft!r} is for {' and '.join(spec.tasks)}, and the labels are {task}",
                remedy=f"use {' or '.join(fitting)}",
            )
        self.function, self.needs_labels = logit_loss(o.soft), spec.needs_labels
        self.arguments = o.loss_options.arguments()
        self.soft_term = o.soft
        self.weights = {self.soft_term: o.alpha, self.labels.term: o.hard_weight}
        self.needs = Needs(temperature=o.temperature)
        self.takes_sparse = o.soft in ("kd", "soft_cross_entropy") and not self.arguments

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The soft term: positions that count (for ``dkd``, with a label); the hard one: those with a label."""
        labelled, mask = batch.labelled().sum(), self._mask(batch)
        counted = batch.counted() if mask is None else mask
        counts = {self.soft_term: labelled if self.needs_labels else counted.sum(), self.labels.term: labelled}
        return {name: counts[name] for name in self.weights}

    def _mask(self, batch: Batch) -> Tensor | None:
        """The positions of the soft term; ``None`` for all."""
        return batch.mask

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """The soft term, by the name of its loss, and the hard one, as far as they have a weight.

        Raises:
            CapabilityError: teacher and student have different numbers of classes.
        """
        sums: dict[str, Tensor] = {}
        for name in self.weights:
            assert student.logits is not None
            if name == self.labels.term:
                sums[name] = self.labels.loss(student.logits, batch, 0.0)
            elif signal.logits is None and signal.sparse is not None:
                sums[name] = self._sparse(student.logits, signal.sparse, self._mask(batch))
            else:
                sums[name] = self._dense(student.logits, signal.dense(), batch)
        counts = self.counts(batch) if sums else {}
        return {name: Term(total, counts[name]) for name, total in sums.items()}

    def _dense(self, logits: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """The soft term, from all of the teacher's logits."""
        if teacher.shape != logits.shape:
            raise CapabilityError(
                f"the student's logits are {tuple(logits.shape)}, the teacher's {tuple(teacher.shape)}",
                remedy="both must score the same classes in the same order",
            )
        temperature = self.options.temperature
        arguments = self.arguments if temperature is None else {"temperature": temperature, **self.arguments}
        labels = (batch.labels,) if self.needs_labels else ()
        return self.function(logits, teacher, *labels, mask=self._mask(batch), reduction="sum", **arguments)

    def _sparse(self, logits: Tensor, part: Sparse, mask: Tensor | None) -> Tensor:
        """The soft term, from a part of the teacher's distribution."""
        if not self.takes_sparse:
            raise CapabilityError(
                f"{self.options.soft} needs all of the teacher's logits, and this teacher gives {part.kind}",
                remedy="use soft: kd without options, or a dense cache",
            )
        if logits.shape[-1] != part.classes:
            raise CapabilityError(
                f"the student scores {logits.shape[-1]} classes, the teacher {part.classes}",
                remedy="both must score the same classes in the same order",
            )
        temperature = self.options.temperature
        if part.temperature != temperature:
            raise CapabilityError(
                f"the teacher's distribution is at T = {part.temperature:g}, the method's T is {temperature}",
                remedy="a part of a distribution cannot be softened afterwards: use one temperature",
            )
        loss = losses.topk_kd if part.kind == "topk" else losses.sampled_kd
        return loss(logits, part.index, part.values, temperature=part.temperature, mask=mask, reduction="sum")

    def _formula_names(self) -> dict[str, str]:
        o = self.options
        options = [] if o.temperature is None else [f"T={o.temperature:g}"]
        options += [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.arguments.items()]
        return {self.soft_term: f"{self.soft_term}({', '.join(options)})"} if options else {}
