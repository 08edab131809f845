"""Builds the models of an experiment: students, peers and teacher, and the method that trains them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from tutelage.data import Batch, Batches
from tutelage.errors import Interrupted
from tutelage.experiment.measure import parameters
from tutelage.experiment.spec import Arm, ExperimentSpec, ModelTeacher, RunContext
from tutelage.methods import Method, prepare_method, prepare_student
from tutelage.taps import Needs
from tutelage.teachers import Ensemble

T = TypeVar("T")


@dataclass(frozen=True)
class AsTeacher:
    """Batches with the inputs of the teacher, or of one of its members, in place of the student's."""

    batches: Iterable[Batch]
    member: int = 0

    @property
    def tag_names(self) -> Sequence[str]:
        """See :class:`SequentialBatches`."""
        return tuple(getattr(self.batches, "tag_names", ()))

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield batch.for_member(self.member).for_teacher()


def build_teacher(spec: ExperimentSpec) -> nn.Module | None:
    """The teacher's model, or all members of an ensemble as one; ``None`` if no model is in this process."""
    teacher = spec.teacher
    if teacher is None or teacher.is_remote:
        return None
    models = [spec.source.build_teacher(number) for number in range(len(teacher.members))]
    return models[0] if teacher.ensemble is None else Ensemble(models, combine=teacher.ensemble.combine)


def bind_teacher(spec: ExperimentSpec, teacher: nn.Module | None) -> ExperimentSpec:
    """The same experiment, whose students are cut from ``teacher`` if they are parts of their teacher."""
    return replace(spec, source=spec.source.with_teacher(teacher))


def model_of(teacher: ModelTeacher | None) -> nn.Module | None:
    """The teacher's model, if there is a teacher."""
    return None if teacher is None else teacher.model


def example_of(spec: ExperimentSpec) -> Batch:
    """Two samples for a dry run."""
    return next(iter(spec.evaluation.test)).rows(0, 2)


def prepare_student_and_method(
    spec: ExperimentSpec, student: nn.Module, teacher: nn.Module | None, seed: int
) -> tuple[nn.Module, Method]:
    """The module that is trained for ``student``, and the method, set up for both models.

    What they initialise depends on ``seed`` only.
    """
    method, example = spec.source.build_method(), example_of(spec)
    if method.peers:  # seeds that no student has, of 32 bits: torch's CPU generator ignores the upper half
        seeds = ((seed + i * 2_246_822_507) % 2**32 for i in range(1, len(method.peers) + 1))
        method.add_peers([spec.source.build_peer(*one) for one in zip(method.peers, seeds, strict=True)])
    student = prepare_student(method, student, teacher, example, seed)
    ids = spec.source.training_batches("distilled", seed).ids if method.needs_ids else None
    return student, prepare_method(method, student, teacher, example, seed, ids)


def initial_student(spec: ExperimentSpec, arm: Arm, seed: int, live: ModelTeacher | None) -> tuple[nn.Module, Method]:
    """The untrained student of an arm and its method."""
    if arm == "baseline":
        return spec.source.build_student(seed), spec.source.build_baseline_method()
    return prepare_student_and_method(spec, spec.source.build_student(seed), model_of(live), seed)


def training_batches(spec: ExperimentSpec, method: Method, seed: int) -> Batches:
    """The training data of a method: every sample, or the labelled ones if the method learns only from labels."""
    return spec.source.training_batches("distilled" if method.uses_unlabelled else "baseline", seed)


def count_projectors(method: Method) -> int:
    """Parameters that are trained with the student and are not exported."""
    return 0 if method.peers else parameters(method)


def all_methods(method: Method) -> list[Method]:
    """The method and those of its phases."""
    return [method, *(phase.method for phase in method.phases())]


def needs_teacher(method: Method) -> bool:
    """Whether a method, or one of its phases, uses teacher outputs."""
    return any(each.needs is not None for each in all_methods(method))


def all_needs(method: Method) -> Needs:
    """The union of what a method and its phases need from the teacher."""
    needs = [each.needs for each in all_methods(method) if each.needs is not None]
    return Needs(
        logits=any(n.logits for n in needs),
        hidden=tuple(dict.fromkeys(tap for n in needs for tap in n.hidden)),
        head=any(n.head for n in needs),
        temperature=next((n.temperature for n in needs if n.temperature is not None), None),
    )


def until_stopped(items: Iterable[T], ctx: RunContext) -> Iterator[T]:
    """``items``, until a stop is requested."""
    for item in items:
        if ctx.should_stop():
            raise Interrupted(
                "stopped while teacher outputs were computed; finished trainings are kept",
                remedy="continue with --resume",
            )
        yield item
