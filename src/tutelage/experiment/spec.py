"""What a comparison compares, where it runs, and how its students begin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from tutelage.config import SamplesConfig, TrainConfig
from tutelage.data import Batch, Batches
from tutelage.engine import Accelerator, RunDirectory
from tutelage.errors import ConfigError, Interrupted
from tutelage.evaluation import TeacherOutput, classes_of, get_teacher_output
from tutelage.experiment.measure import parameters
from tutelage.experiment.sample_predictions import DescribeSample, unseen
from tutelage.experiment.teachers import EnsemblePlan, ModelTeacher
from tutelage.methods import Method, SupervisedMethod, prepare_method, prepare_student
from tutelage.progress import Terminal
from tutelage.teachers import CachedTeacher, RemoteTeacher, Teacher

MEMORY_BYTES = 2**29
"""Teacher logits of the test split up to this size are kept in memory."""


Arm = Literal["baseline", "distilled"]


FIGURES = (
    "accuracy", "f1", "matthews", "spearman", "pearson", "recall", "perplexity", "loss", "agreement", "kl", "ece",
)  # fmt: skip
"""What is measured of every student."""


@dataclass
class ExperimentSpec:
    """What to compare.

    Attributes:
        name: of the run.
        teacher: builds the teacher; with weights, unless ``train_teacher``. ``None`` for a method without one.
        remote_teacher: in its place, opens a teacher behind a server, given how many tokens the student scores.
        student: builds a student's initialisation from a seed; the same seed gives the same one.
        method: builds the method.
        batches: the training data of an arm under a seed.
        config: how students are trained.
        validation: iterated at each evaluation; ``None`` for none.
        test: iterated once for each finished model.
        seeds: each trains its own students.
        baseline: train the baseline student too.
        train_teacher: how to train the teacher first, and on what.
        teacher_mode: see :class:`LiveTeacher`.
        ensemble: of which teachers it is made, where there are several; ``teacher`` then builds all as one.
        inference: options of :class:`LiveTeacher` beside the mode, of a single teacher.
        prefetch: whether teacher outputs are prefetched, in a thread or in a separate process.
        cache: opens the cache of a teacher's word, given the teacher, its classes and the method; ``None`` for none.
        remember: the training samples, unaugmented, where the teacher's logits may be computed once.
        remember_rows: how many positions these have.
        classes: class names, in the order of the labels.
        student_card: how to build the student again, for its folder.
        teacher_card: the same of the teacher.
        peer: builds what a method asks to be trained beside the student, given that and a seed. Default: a student,
            where the method asks for one of its architecture.
        peer_card: how to build it again, but for what the student's card says too.
        supervised: builds the method that learns from the data alone.
        metric: what models are chosen by, of those that evaluation gives.
        students_of: of a teacher, what builds a student's initialisation from a seed, where that is a part of it.
        head_only: whether only what did not come with a single teacher's weights is trained.
        compared: whether there is nothing but the teacher's word to evaluate by, as of embeddings.
        said: that word on the validation split; :func:`compare` asks for it.
        samples: what is kept of single samples of the test split.
        show: how a person sees one of them.
        tokenizers: of language models that write: the student's and the teacher's.
        harness: scores finished models by tasks of their own, by name.
    """

    name: str
    teacher: Callable[[], nn.Module] | None
    student: Callable[[int], nn.Module]
    method: Callable[[], Method]
    batches: Callable[[Arm, int], Batches]
    config: TrainConfig
    test: Iterable[Batch]
    validation: Iterable[Batch] | None = None
    seeds: Sequence[int] = (0,)
    baseline: bool = True
    train_teacher: tuple[TrainConfig, Batches, int] | None = None
    teacher_mode: Literal["eval", "train_bn"] = "eval"
    ensemble: EnsemblePlan | None = None
    inference: Mapping[str, Any] = field(default_factory=dict)
    prefetch: Literal["overlap", "process"] | None = None
    cache: Callable[[Any, int, Method, Accelerator], CachedTeacher] | None = None
    remember: Iterable[Batch] | None = None
    remember_rows: int = 0
    classes: list[str] | None = None
    student_card: dict[str, Any] = field(default_factory=dict)
    teacher_card: dict[str, Any] = field(default_factory=dict)
    peer: Callable[[Any, int], nn.Module] | None = None
    peer_card: Callable[[Any], dict[str, Any]] = lambda asked: {}
    supervised: Callable[[], Method] = SupervisedMethod
    metric: str = "accuracy"
    remote_teacher: Callable[[int], RemoteTeacher] | None = None
    students_of: Callable[[nn.Module], Callable[[int], nn.Module]] | None = None
    head_only: bool = False
    compared: bool = False
    said: TeacherReferences | None = None
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    show: DescribeSample = unseen
    tokenizers: tuple[Any, Any] | None = None
    harness: Callable[[nn.Module], dict[str, Any]] | None = None

    def beside(self, teacher: nn.Module | None) -> ExperimentSpec:
        """The same, its students cut from this teacher where they are parts of one."""
        if self.students_of is None or teacher is None:
            return self
        return replace(self, student=self.students_of(teacher))


@dataclass
class RunContext:
    """Where and how a comparison runs."""

    accelerator: Accelerator
    run: RunDirectory
    terminal: Terminal
    should_stop: Callable[[], bool] = lambda: False

    @property
    def device(self) -> torch.device:
        """This process's device."""
        device: torch.device = self.accelerator.device
        return device


def model_of(teacher: ModelTeacher | None) -> nn.Module | None:
    """The teacher's model, where there is a teacher."""
    return None if teacher is None else teacher.model


class TeacherReferences:
    """The teacher's logits for every test batch, to compare students with; iterated once for each model.

    Kept in memory as long as they fit :data:`MEMORY_BYTES`; else the teacher is asked again each time. Of a sharded
    teacher, which no process can ask alone, all are kept.
    """

    def __init__(self, teacher: Teacher, test: Iterable[Batch], ctx: RunContext) -> None:
        self.teacher, self.test, self.device = teacher, test, ctx.device
        self.kept: list[TeacherOutput] | None = []
        self.classes = size = 0
        for said in until_stopped(ctx.terminal.iterate(self._ask(), "teacher on test"), ctx):
            own = said if isinstance(said, Tensor) else said.inputs  # a head's weights are the teacher's own
            self.classes, size = classes_of(said), size + 4 * own.numel()
            if size > MEMORY_BYTES and not getattr(teacher, "sharded", False):
                self.kept = None
                break
            self.kept.append(said)

    def _ask(self) -> Iterator[TeacherOutput]:
        for batch in self.test:
            said = get_teacher_output(self.teacher, batch.to(self.device))
            yield said.float().cpu() if isinstance(said, Tensor) else said._replace(inputs=said.inputs.cpu())

    def __iter__(self) -> Iterator[TeacherOutput]:
        return self._ask() if self.kept is None else iter(self.kept)


T = TypeVar("T")


def until_stopped(items: Iterable[T], ctx: RunContext) -> Iterator[T]:
    """``items``, as long as nobody asks for a stop.

    Raises:
        Interrupted: somebody did.
    """
    for item in items:
        if ctx.should_stop():
            raise Interrupted(
                "stopped while the teacher was asked; what was trained is kept", remedy="go on with --resume"
            )
        yield item


def example_of(c: ExperimentSpec) -> Batch:
    """Two samples for a dry run."""
    return next(iter(c.test)).rows(0, 2)


def prepare_student_and_method(
    c: ExperimentSpec, student: nn.Module, teacher: nn.Module | None, seed: int
) -> tuple[nn.Module, Method]:
    """What is trained of ``student``, and the method, fitted to it and the teacher; both start as the seed says."""
    method, example = c.method(), example_of(c)
    if method.peers:
        method.add_peers(peers(c, method, seed))
    student = prepare_student(method, student, teacher, example, seed)
    ids = c.batches("distilled", seed).ids if method.needs_ids else None
    return student, prepare_method(method, student, teacher, example, seed, ids)


def peers(c: ExperimentSpec, method: Method, seed: int) -> list[nn.Module]:
    """What a method asks to be trained beside the student; no two start alike, nor like the student of any seed."""
    made = []
    for i, asked in enumerate(method.peers, 1):
        own = (seed + i * 2_246_822_507) % 2**32  # of a seed's upper half torch's generator on CPUs takes no note
        if c.peer is not None:
            made.append(c.peer(asked, own))
            continue
        if asked is not None:
            raise ConfigError(f"peers: nobody here can build {asked!r}", remedy="give a number of peers")
        made.append(c.student(own))
    return made


def projectors(method: Method) -> int:
    """Parameters that are trained with the student and belong to no model that is kept."""
    return 0 if method.peers else parameters(method)


def taught_on(c: ExperimentSpec, method: Method, seed: int) -> Batches:
    """The training data of a method under a seed: all of it, or what has a label where the rest teaches nothing."""
    return c.batches("distilled" if method.uses_unlabelled else "baseline", seed)


def initial_student(c: ExperimentSpec, arm: Arm, seed: int, live: ModelTeacher | None) -> tuple[nn.Module, Method]:
    """The student of an arm and its method, untrained."""
    if arm == "baseline":
        return c.student(seed), c.supervised()
    return prepare_student_and_method(c, c.student(seed), model_of(live), seed)
