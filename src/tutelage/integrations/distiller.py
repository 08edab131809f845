"""Student, method and teacher as one module, with the same losses as our engine."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.data import Batch, as_batch, name_positions
from tutelage.data.loader import current_rank
from tutelage.errors import CapabilityError
from tutelage.methods import (
    DistillationModule,
    LogitMethod,
    Method,
    Term,
    check_capabilities,
    prepare_method,
    prepare_student,
)
from tutelage.methods.step import TermSums, check_terms, count_terms, get_signal, mean_loss, scale_terms
from tutelage.students import prepare_outputs, split_inputs
from tutelage.students.projectors import device_of
from tutelage.taps import Needs, observe
from tutelage.teachers import LiveTeacher, as_model
from tutelage.teachers.signal import Signal, Teacher

EXAMPLE = 2
"""The number of samples of the dry run that sets up a method."""


class Distiller(DistillationModule):
    """Student, method and teacher for a training loop of your own.

    The losses of a step's micro-batches are scaled so that their gradients add up to that of the full step; see
    :mod:`tutelage.methods.step`. ::

        distiller = Distiller(student, teacher, LogitMethod(), example=next(iter(loader)))
        optimizer = torch.optim.AdamW(distiller.parameters())
        distiller.begin(total=len(loader) * epochs)
        for raw in loader:
            for loss in distiller.losses(raw):  # several micro-batches: distiller.losses(first, second)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            distiller.after_step()

    Its parameters are those of the student and of the method, never the teacher's. Save ``distiller.student``: the
    given module, or the one that the method made from it (SimKD).

    Args:
        student: any module; it is trained in place.
        teacher: a module, which is frozen; a function, an ONNX session or an estimator, as for
            :func:`tutelage.distill`; anything with ``signal`` (:class:`tutelage.teachers.signal.Teacher`); or
            ``None`` for a method that needs none.
        method: default :class:`LogitMethod` at T = 4, alpha = 0.9. It is set up for the models here.
        example: a batch of the data, for a dry run; two samples of it are enough.
        to_batch: converts what the data yields to a :class:`tutelage.data.Batch`; for causal language models
            :func:`tutelage.data.causal_batch`.
        batch: the names of the positions of tuples, as in ``("x", "length", "y")``; see :func:`tutelage.distill`.
        class_axis: the axis of the classes in the scores of both models; see :func:`tutelage.distill`.
        seed: of the method's initial weights.
        ids: ``[N]``, sample ids of the training data, for a method that needs them (CRD).
        peers: modules that are trained with the student, for a method with peers (mutual learning).
        phases_done: the phases that the method needs first (``method.phases()``) are trained.
        outputs: the key, attribute or position of the scores in the models' outputs; see :func:`tutelage.distill`.

    Raises:
        CapabilityError: the teacher cannot give what the method needs, or the method needs something first.
        ModelError: the models do not fit, or a tap names no module.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        method: Method | None = None,
        *,
        example: Any,
        to_batch: Callable[[Any], Batch] = as_batch,
        batch: Sequence[str] | None = None,
        class_axis: int | None = None,
        seed: int = 0,
        ids: Tensor | None = None,
        peers: Sequence[nn.Module] = (),
        phases_done: bool = False,
        outputs: str | int | None = None,
    ) -> None:
        method = LogitMethod() if method is None else method
        to_batch = partial(as_batch, task=method.task) if to_batch is as_batch else to_batch
        is_model = teacher is not None and not hasattr(teacher, "signal")
        live: Teacher | None = LiveTeacher(as_model(teacher)) if is_model else teacher
        check_capabilities(method, live)
        _check_extras(method, ids, peers)
        model = getattr(live, "model", None)
        if batch is not None:
            to_batch = name_positions(batch, to_batch, student, [model])
            for note in to_batch.notes():
                warnings.warn(note, stacklevel=2)
        to_batch = split_inputs(to_batch, _batch(example, to_batch), student, model)
        few = _batch(example, to_batch).rows(0, EXAMPLE)
        for one, part in ((model, few.for_teacher()), *((x, few) for x in (student, *peers))):
            if isinstance(one, nn.Module):
                prepare_outputs(one, part, outputs, class_axis)
        few = few.to(device_of(student))
        if peers:
            method.add_peers(peers)
        student = prepare_student(method, student, model, few, seed)
        prepare_method(method, student, model, few, seed, ids)
        _check_same_tokens(method, _batch(example, to_batch))
        if method.phases() and not phases_done:
            names = ", ".join(phase.name for phase in method.phases())
            raise CapabilityError(
                f"{type(method).__name__} has phases that are trained first: {names}",
                remedy="train each as a Distiller of its phase.method, then pass phases_done=True; or use "
                "tutelage.distill, which does this",
            )
        super().__init__(student, method)
        self.teacher, self.to_batch = live, to_batch
        self.terms = TermSums()
        self.open()

    # A step ------------------------------------------------------------------------------------------

    def begin(self, total: int, step: int = 0) -> None:
        """Call it before the first step, and again when a training is resumed.

        Args:
            total: the number of optimizer steps.
            step: the number of finished steps.
        """
        if isinstance(self.teacher, LiveTeacher):
            self.teacher.to(self.device)
        self.method.before_training(self.student, step, total)

    def losses(self, *micros: Any) -> Iterator[Tensor]:
        """The loss of each micro-batch of one optimizer step; call ``backward`` on each before the next.

        Args:
            micros: what the data yields, or batches.

        Yields:
            Scalars; their sum is the loss of the step.
        """
        batches = [self.batch(raw) for raw in micros]
        scale = self.scales(batches)
        for batch in batches:
            yield self.loss(batch, scale)

    def after_step(self) -> None:
        """Call it after each optimizer step."""
        self.method.after_step()

    # Its parts, for loops that call them one by one ----------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The student's device."""
        return device_of(self.student)

    def batch(self, raw: Any) -> Batch:
        """What the data yields as a training batch, on the student's device."""
        batch = _batch(raw, self.to_batch).to(self.device)
        return self.method.prepare_batch(self.student, batch) if self.method.generates_batches else batch

    def scales(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The factor of each term's sum in a step of these micro-batches; begins the step.

        It makes up for the averaging of gradients over processes, as by torch's DDP.
        """
        counts, world = count_terms(self.method, batches), current_rank().world
        if world > 1:
            summed = torch.stack([count.float() for count in counts.values()])
            torch.distributed.all_reduce(summed)
            counts = dict(zip(counts, summed.unbind(), strict=True))
        self.method.loss_scales = scale = scale_terms(self.method, counts, world)
        self.terms = TermSums()
        return scale

    def signal(self, batch: Batch) -> Signal | None:
        """The teacher outputs that the method needs for a batch."""
        return get_signal(self.teacher, self.method, batch)

    def loss(self, batch: Batch, scale: dict[str, Tensor], through: nn.Module | None = None) -> Tensor:
        """The loss of one micro-batch.

        Args:
            batch: from :meth:`batch`.
            scale: from :meth:`scales` of all micro-batches of the step.
            through: called in place of this module, such as its DDP wrapper.

        Returns:
            A scalar with a gradient. The terms are added to ``self.terms``.
        """
        terms: dict[str, Term] = (through or self)(batch, self.signal(batch))
        check_terms(self.method, terms, scale)
        return self.terms.add(terms, scale)

    @torch.no_grad()
    def evaluated(self, batch: Batch) -> Tensor:
        """The loss of a batch by itself, without gradient, on this process alone."""
        return mean_loss(self.method, self(batch, self.signal(batch)))

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """The student's logits, ``[B, C]`` or ``[B, L, C]``."""
        seen = observe(self.student, batch.inputs, Needs()).logits
        assert seen is not None
        return seen

    def values(self) -> dict[str, float]:
        """The mean of each term over the micro-batches of this step so far, unweighted, on this process."""
        return self.terms.means()


def _batch(raw: Any, to_batch: Callable[[Any], Batch]) -> Batch:
    return raw if isinstance(raw, Batch) else to_batch(raw)


def _check_same_tokens(method: Method, example: Batch) -> None:
    if method.compares_tokens and not example.reads_same_tokens():
        raise CapabilityError(
            f"{type(method).__name__} compares token by token, and teacher and student read different tokens of the "
            "example",
            remedy="give both the same input_ids, or use LogitMethod or PatientMethod",
        )


def _check_extras(method: Method, ids: Tensor | None, peers: Sequence[nn.Module]) -> None:
    name = type(method).__name__
    if method.needs_ids and ids is None:
        raise CapabilityError(f"{name} needs the sample ids of the training data", remedy="pass ids=, int64 [N]")
    if len(method.peers) != len(peers):
        raise CapabilityError(
            f"{name} trains {len(method.peers)} peers with the student, and {len(peers)} are given",
            remedy="pass peers=, a module for each, none of them with the student's weights",
        )
