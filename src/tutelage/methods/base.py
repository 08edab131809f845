"""The contract between a method and the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tutelage.config import MethodOptions
from tutelage.data.batch import Batch, Task
from tutelage.data.targets import TargetScale
from tutelage.errors import CapabilityError, ConfigError, shorten
from tutelage.taps import Needs, Observation, Observer
from tutelage.teachers.signal import Signal, Teacher


class Term(NamedTuple):
    """One named part of a loss: a sum over what counts, and how many count.

    Kept apart until the sums of all micro-batches and processes are together, because a mean of
    means is not the mean.
    """

    sum: Tensor
    """Scalar; carries the gradient."""
    count: Tensor  # type: ignore[assignment]  # a tuple, for FSDP2 looks for tensors in those only
    """Scalar."""


class Method(nn.Module):
    """The loss of a batch, from the outputs of student and teacher.

    A method is a module so that its own parameters (projectors) are trained,
    synchronised, clipped and saved with it.

    Args:
        options: of the class ``Options``, which a recipe's section ``method`` is too.
        task: the kind of labels.
        **keywords: the fields of ``Options``, in place of it.

    Raises:
        ConfigError: an unknown option or a wrong value, with the message that a recipe gets.
        CapabilityError: labels that the method is not for.

    Attributes:
        Options: the class of the options: names, types, ranges and defaults.
        tasks: the kinds of labels that the method is for; ``None`` for all.
        options: the options.
        needs: what the teacher's signal must hold; ``None`` for a method without a teacher.
        student_needs: what is captured in the student's forward pass; ``None`` if the student is not run.
        weights: the weight of each term, by name. The engine applies it, once.
        needs_ids: whether :meth:`build` needs the sample ids of the training data.
        takes_sparse: whether part of the teacher's distribution (``topk``, ``sampled``) can replace its logits, and
            these its output head.
        generates_batches: whether :meth:`prepare_batch` returns new inputs, so that the teacher must be live.
        needs_validation: whether it uses :meth:`after_validation`, so that there must be validation data.
        uses_unlabelled: whether the loss has a term for samples without a label; else only labelled ones are used.
        compares_tokens: whether it compares student and teacher token by token, so that both must read the same ones.
        task: the kind of labels.
        target_scale: of regression; the terms are computed in units of the targets' standard deviation.
        loss_scales: the factor by which the engine multiplies the sum of each term; empty if unknown. A method that
            computes gradients in its forward pass needs them to add up its terms.
        peers: models to train with the student, in the form that the caller builds models from; ``None`` for a copy
            of the student's architecture. :meth:`add_peers` gets a model for each.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    tasks: ClassVar[tuple[Task, ...] | None] = None
    options: MethodOptions
    needs: Needs | None = Needs()
    student_needs: Needs | None = Needs()
    weights: dict[str, float]
    needs_ids: bool = False
    takes_sparse: bool = False
    generates_batches: bool = False
    needs_validation: bool = False
    uses_unlabelled: bool = True
    compares_tokens: bool = False
    task: Task = "classes"
    target_scale: TargetScale | None = None
    loss_scales: Mapping[str, Tensor] = MappingProxyType({})
    peers: Sequence[Any] = ()

    def __init__(self, options: MethodOptions | None = None, /, *, task: Task = "classes", **keywords: Any) -> None:
        super().__init__()
        name, section = type(self).__name__, self.Options
        if options is None:
            options = section(**keywords)
        elif keywords or not isinstance(options, section):
            raise ConfigError(
                f"{name} takes {section.__name__} or keywords, given {shorten(options)}",
                remedy=f"{name}({section.__name__}(KEY=VALUE, ...)), or {name}(KEY=VALUE, ...)",
            )
        if self.tasks is not None and task not in self.tasks:
            raise _wrong_labels(name, self.tasks[0], task, "use LogitMethod or FeatureMethod")
        self.options, self.task = options, task

    def add_peers(self, models: Sequence[nn.Module]) -> None:
        """Add a model for each of ``peers``, with its own initialisation; called before :meth:`adapt_student`."""

    def adapt_student(self, student: nn.Module, teacher: nn.Module | None, example: Batch) -> nn.Module:
        """The module that is trained and exported. Default: the student as it is.

        ``teacher`` is ``None`` where there is none, which only methods that need none meet.

        Raises:
            ModelError: the models do not go together.
        """
        return student

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Make what depends on the models, such as projectors; called once, before anything is trained.

        Neither model may be changed. Use :func:`prepare_method`, which makes the initialisation a function of a seed.

        Args:
            student: what :meth:`adapt_student` returned.
            teacher: it may not be trained yet; ``None`` where there is none.
            example: a few samples.
            ids: ``[M]``, the sample ids of the training data, where they are known.

        Raises:
            ModelError: a model lacks what the method needs, such as layers.
            CapabilityError: the models or the data do not fit the method or each other.
        """

    def phases(self) -> Sequence[Phase]:
        """What is trained first, in this order, each with an optimizer and a schedule of its own."""
        return ()

    def before_training(self, student: nn.Module, step: int, total: int) -> None:
        """Called before the first step of a training, or the first after it was resumed.

        Args:
            student: that is trained; it must not become a part of the method.
            step: optimizer steps done.
            total: optimizer steps in all.
        """

    def prepare_batch(self, student: nn.Module, batch: Batch) -> Batch:
        """The batch that the method trains on, before it is counted and the teacher runs. Default: ``batch``.

        Called once for each micro-batch with the student as it is at that step, and with ``generates_batches`` alone.
        """
        return batch

    def check_generation(self, student: nn.Module, batch: Batch, longest_prompt: int | None) -> None:
        """Test what :meth:`prepare_batch` depends on, such as a server, before the training.

        Args:
            longest_prompt: tokens of the training data's longest prompt, where known.
        """

    def after_step(self) -> None:
        """Called after each optimizer step, before any evaluation or checkpoint."""

    def after_validation(self, metrics: Mapping[str, Any]) -> None:
        """Called after each evaluation on validation data, with its metrics, the same on all processes."""

    def describe_pairs(self) -> list[str]:
        """The features that are compared, in words, if the method pairs some."""
        return []

    def auxiliary_models(self, student: nn.Module) -> dict[str, nn.Module]:
        """What else gives logits once it is trained, by name: peers, or exits of ``student``. Measured beside it."""
        return {}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """How many positions each term averages over; known before any forward pass.

        Every micro-batch of a step, on every process, is counted first, so that each can be
        divided by the whole count at once.
        """
        raise NotImplementedError

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """The terms of one batch; their counts are those of :meth:`counts`. ``signal`` is empty without a teacher.

        Raises:
            CapabilityError: the teacher's signal does not fit the student's outputs, or the batch the method.
        """
        raise NotImplementedError

    def formula(self) -> str:
        """The loss in one line, as printed when a run starts."""
        names = self._formula_names()
        return " + ".join(f"{weight:g} * {names.get(name, name)}" for name, weight in self.weights.items())

    def _formula_names(self) -> dict[str, str]:
        """What the formula calls a term, where this is more than its name."""
        return {}


class Phase(NamedTuple):
    """A training that comes before a method's own."""

    name: str
    """Of this training, beside the method's."""
    share: float
    """Of all steps."""
    method: Method
    """Shares with the method what it trains. Whatever of the student its loss does not reach stays as it is."""


def prepare_method(
    method: Method,
    student: nn.Module,
    teacher: nn.Module | None,
    example: Batch,
    seed: int,
    ids: Tensor | None = None,
) -> Method:
    """Build ``method`` for the models; its initialisation is a function of ``seed`` alone.

    Args:
        method: changed in place, by its :meth:`Method.build`.
        student: what :func:`prepare_student` returned.
        teacher: the teacher's model; ``None`` where there is none.
        example: a few samples of the data.
        seed: of the run.
        ids: ``[M]``, the sample ids of the training data, where they are known.
    """
    with _stream(seed):
        method.build(student, teacher, example, ids)
    return method


def prepare_student(
    method: Method, student: nn.Module, teacher: nn.Module | None, example: Batch, seed: int
) -> nn.Module:
    """The module that ``method`` trains and exports; its new weights are a function of ``seed`` alone.

    Args:
        method: its :meth:`Method.adapt_student` is called.
        student: as it was made.
        teacher: the teacher's model; ``None`` where there is none.
        example: a few samples of the data.
        seed: of the run.
    """
    with _stream(seed):
        return method.adapt_student(student, teacher, example)


@contextmanager
def _stream(seed: int) -> Iterator[None]:
    """Random numbers by ``seed``, from another stream than the student's initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed + 1) * 2_654_435_761 & (2**63 - 1))
        yield


class DistillationModule(nn.Module):
    """Student and method as one module with one forward.

    Distributed wrappers, mixed precision, clipping and checkpoints see every parameter that is
    trained, and nothing of the teacher.

    The student's taps are there from :meth:`open`, or the first forward, to :meth:`close`. Open it before the student
    runs for the first time where it is compiled.
    """

    _mean: Tensor | None
    _std: Tensor | None

    def __init__(self, student: nn.Module, method: Method) -> None:
        super().__init__()
        self.student = student
        self.method = method
        self._observer: Observer | None = None
        scale = method.target_scale
        self.register_buffer("_mean", None if scale is None else scale.mean, persistent=False)
        self.register_buffer("_std", None if scale is None else scale.std, persistent=False)

    def open(self) -> None:
        """Put the method's taps on the student, as they are needed now.

        Raises:
            ModelError: a tap of no module, or no output head.
        """
        self.close()
        if self.method.student_needs is not None:
            self._observer = Observer(self.student, self.method.student_needs)

    def close(self) -> None:
        """Take them off again."""
        if self._observer is not None:
            self._observer.close()
        self._observer = None

    def forward(self, batch: Batch, signal: Signal | None, *, writing: bool = False) -> Any:
        """The method's terms for one batch; with ``writing`` what :meth:`Method.prepare_batch` makes of it.

        A sharded student can be run inside of this forward alone, for there its weights are gathered.
        """
        if writing:
            with torch.no_grad():
                return self.method.prepare_batch(self.student, batch)
        check_task(self.method, batch)
        needs = self.method.student_needs
        if needs is not None and (self._observer is None or self._observer.needs != needs):
            self.open()
        observer = None if needs is None else self._observer
        seen = Observation() if observer is None else observer(batch.inputs)
        terms: dict[str, Term] = self.method(*self._standardise(seen, batch, signal or Signal()))
        return terms

    def _standardise(self, seen: Observation, batch: Batch, signal: Signal) -> tuple[Observation, Batch, Signal]:
        """Outputs and targets in units of the targets' standard deviation, where the method has their scale."""
        if self._mean is None or self._std is None or batch.targets is None:
            return seen, batch, signal
        scale = TargetScale(self._mean, self._std)
        ours, theirs = (None if x is None else scale.standardise(x) for x in (seen.logits, signal.logits))
        targets = scale.standardise(batch.targets)
        return replace(seen, logits=ours), replace(batch, targets=targets), replace(signal, logits=theirs)

    def __getattr__(self, name: str) -> Any:
        # accelerate reads these of a model in order to shard it
        if name in ("_no_split_modules", "get_input_embeddings", "get_output_embeddings", "tie_weights"):
            return getattr(self.student, name)
        return super().__getattr__(name)


def check_task(method: Method, batch: Batch) -> None:
    """Raise :class:`CapabilityError` if the labels are of another task than the method's."""
    if batch.task != method.task:
        remedy = f"make it with task={batch.task!r}" if method.tasks is None else "use LogitMethod or FeatureMethod"
        raise _wrong_labels(type(method).__name__, method.task, batch.task, remedy)


def _wrong_labels(name: str, expected: str, given: str, remedy: str) -> CapabilityError:
    return CapabilityError(f"{name} learns from {expected}, and the labels of this data are {given}", remedy=remedy)


def needs_of(method: Method, teacher: Teacher | None) -> Needs | None:
    """What a method asks of this teacher: for its output head the logits, or part of them, where it has no more and
    the method takes them."""
    needs = method.needs
    if needs is None or teacher is None or not (method.takes_sparse and needs.head) or "head" in teacher.provides:
        return needs
    return replace(needs, head=False, logits=True)


def check_capabilities(method: Method, teacher: Teacher | None) -> None:
    """Raise :class:`CapabilityError` when the teacher cannot give what the method needs."""
    if method.needs is None:
        return
    name = type(method).__name__
    if teacher is None:
        raise CapabilityError(
            f"{name} needs a teacher and there is none", remedy="give a teacher, or use a method that needs none"
        )
    if method.generates_batches and getattr(teacher, "is_precomputed", False):
        raise CapabilityError(
            f"{name} needs teacher outputs for texts that the student generates, and {type(teacher).__name__} has "
            "outputs for the training data only",
            remedy="use a live teacher, or a method that learns from the data, such as kind: token",
        )
    if getattr(teacher, "sharded", False) and getattr(method, "mix", 0):
        raise CapabilityError(
            "mix samples answers from student and teacher together, which a sharded teacher does not support",
            where="method.mix",
            remedy="remove method.mix or teacher.inference.sharded",
        )
    needs = needs_of(method, teacher)
    assert needs is not None
    missing = sorted(needs.kinds() - teacher.provides)
    if method.takes_sparse and teacher.provides & {"topk", "sampled"}:
        missing = [kind for kind in missing if kind != "logits"]
    if missing:
        raise CapabilityError(
            f"{name} needs {', '.join(missing)} of the teacher, and {type(teacher).__name__} "
            f"gives only {', '.join(sorted(teacher.provides))}",
            remedy="use a live teacher, or a method that needs less",
        )
