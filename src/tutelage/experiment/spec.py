"""The resolved, immutable description of one experiment, and where it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol

import torch
from torch import nn

from tutelage.config import CacheConfig, SamplesConfig, TrainConfig
from tutelage.data import Batch, Batches
from tutelage.data.targets import TargetScale
from tutelage.engine import Accelerator, RunDirectory
from tutelage.experiment.sample_predictions import DescribeSample, describe_image
from tutelage.methods import Method
from tutelage.progress import Terminal
from tutelage.teachers import CachedTeacher, EnsembleTeacher, LiveTeacher, RemoteTeacher

Arm = Literal["baseline", "distilled"]

ModelTeacher = LiveTeacher | EnsembleTeacher
"""A teacher whose model is in this process."""

FIGURES = (
    "accuracy", "f1", "matthews", "spearman", "pearson", "rmse", "mae", "r2", "recall", "perplexity", "loss",
    "span_f1", "span_precision", "span_recall", "agreement", "kl", "ece",
)  # fmt: skip
"""The metrics that a summary reports for every student."""


@dataclass(frozen=True)
class TeacherTraining:
    """How a teacher without weights is trained first."""

    config: TrainConfig
    batches: Batches
    seed: int


@dataclass(frozen=True)
class MemberSpec:
    """One teacher model: the only teacher, or a member of an ensemble.

    Attributes:
        training: ``None`` for a model that has weights.
        inference: options of :class:`LiveTeacher`, without the mode.
        head_only: train only the parameters that are not in the pretrained checkpoint.
    """

    name: str
    training: TeacherTraining | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    inference: Mapping[str, Any] = field(default_factory=dict)
    head_only: bool = False


@dataclass(frozen=True)
class EnsembleSpec:
    """How the members of an ensemble are combined; see :class:`EnsembleTeacher`."""

    combine: Literal["probabilities", "logits"] = "probabilities"
    weights: Sequence[float] | Literal["learned"] | None = None
    temperature: float = 1.0
    route: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True)
class TeacherSpec:
    """The teacher of an experiment.

    Attributes:
        members: one model, or several of an ensemble; empty for a teacher behind a server.
        prefetch: compute teacher outputs ahead of the step, in a thread (``overlap``) or in another process.
    """

    members: tuple[MemberSpec, ...] = ()
    mode: Literal["eval", "train_bn"] = "eval"
    ensemble: EnsembleSpec | None = None
    prefetch: Literal["overlap", "process"] | None = None
    cache: CacheConfig | None = None

    @property
    def is_remote(self) -> bool:
        """Whether the teacher is behind a server."""
        return not self.members

    @property
    def is_trained_first(self) -> bool:
        """Whether a member has no weights yet."""
        return any(member.training is not None for member in self.members)


@dataclass(frozen=True)
class EvaluationSpec:
    """How finished models are measured.

    Attributes:
        test: read once for each finished model.
        metric: selects the best checkpoint and the exported student.
        by_teacher: the data has no labels to evaluate by, as for embeddings; the teacher outputs take their place.
        tokenizers: those of student and teacher, for language models whose generations are kept.
    """

    test: Iterable[Batch]
    validation: Iterable[Batch] | None = None
    metric: str = "accuracy"
    classes: list[str] | None = None
    by_teacher: bool = False
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    describe: DescribeSample = describe_image
    tokenizers: tuple[Any, Any] | None = None
    harness: Callable[[nn.Module], dict[str, Any]] | None = None


@dataclass(frozen=True)
class ExperimentSpec:
    """One experiment: the baseline student and the distilled one, for several seeds.

    Attributes:
        seeds: each trains its own students.
        unaugmented: the training samples, if each always looks the same; their teacher outputs may be kept in memory.
        training_rows: how many positions these samples have.
    """

    name: str
    source: ExperimentSource
    train: TrainConfig
    evaluation: EvaluationSpec
    teacher: TeacherSpec | None = None
    seeds: Sequence[int] = (0,)
    baseline: bool = True
    student_card: Mapping[str, Any] = field(default_factory=dict)
    unaugmented: Iterable[Batch] | None = None
    training_rows: int = 0


@dataclass
class RunContext:
    """Where and how an experiment runs."""

    accelerator: Accelerator
    run: RunDirectory
    terminal: Terminal
    should_stop: Callable[[], bool] = lambda: False

    @property
    def device(self) -> torch.device:
        """This process's device."""
        device: torch.device = self.accelerator.device
        return device


COMPARED_BATCHES = 8
"""Batches of evaluation data whose tokens are compared."""


class ExperimentSource(Protocol):
    """Builds the parts of an experiment. The same seed gives the same weights."""

    def with_teacher(self, teacher: nn.Module | None) -> ExperimentSource:
        """The same source, whose students are cut from ``teacher`` if they are parts of their teacher."""
        return self

    @property
    def target_scale(self) -> TargetScale | None:
        """The scale of regression targets, in which losses are computed and output layers are trained."""
        return None

    def build_student(self, seed: int) -> nn.Module:
        """A student's initial weights."""

    def build_peer(self, options: Any, seed: int) -> nn.Module:
        """A model that a method trains along with the student; ``None``: one of the student's architecture."""

    def peer_card(self, options: Any) -> dict[str, Any]:
        """The entries of a peer's ``model.json`` that differ from the student's."""

    def build_teacher(self, number: int) -> nn.Module:
        """The model of a teacher's member; with weights unless it is trained first."""

    def build_method(self) -> Method:
        """The method, before it knows student and teacher."""

    def build_baseline_method(self) -> Method:
        """The method of the baseline, which learns from the labels."""

    def training_batches(self, arm: Arm, seed: int) -> Batches:
        """The training data of an arm."""

    def connect_teacher(self, classes: int) -> RemoteTeacher:
        """The teacher behind a server; ``classes`` is the student's vocabulary size."""

    def reads_same_tokens(self, batches: Iterable[Batch]) -> bool:
        """Whether teacher and student read the same tokens of each text, so that they can be compared one by one.

        ``batches`` are those of the evaluation; where the training texts are not at hand, the first are compared.
        """
        return all(batch.reads_same_tokens() for batch in islice(batches, COMPARED_BATCHES))

    def open_cache(
        self, teacher: ModelTeacher | RemoteTeacher, classes: int, method: Method, ctx: RunContext
    ) -> CachedTeacher:
        """The cache of teacher outputs, new or existing."""
