"""One table of every loss, with which of the laws it obeys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tutelage import losses

CLASSES = 6


@dataclass(frozen=True)
class Batch:
    """Arguments that have one entry per example."""

    student: Tensor
    teacher: Tensor | None
    extra: tuple[Tensor, ...] = ()

    def map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        teacher = None if self.teacher is None else f(self.teacher)
        return Batch(f(self.student), teacher, tuple(map(f, self.extra)))

    def __getitem__(self, index: Any) -> Batch:
        return self.map(lambda x: x[index])


@dataclass(frozen=True)
class Case:
    """A loss with one set of options.

    ``shape`` and ``teacher`` are without the batch. ``extra`` makes further arguments with an entry
    per example, ``fixed`` those without. ``divergence``: zero at equality. ``relation``: defined
    on the batch. ``repeated``: the mean of a batch repeated k times over that of the batch. ``projects``: its first
    argument goes through a head, here the identity, in the precision of autocast.
    """

    function: str
    shape: tuple[int, ...] = (CLASSES,)
    teacher: tuple[int, ...] | None = (CLASSES,)
    options: dict[str, Any] = field(default_factory=dict)
    extra: Callable[[int], tuple[Tensor, ...]] = lambda size: ()
    fixed: Callable[[], tuple[Any, ...]] = lambda: ()
    divergence: bool = True
    relation: bool = False
    repeated: Callable[[int], float] | None = lambda k: 1.0
    teacher_learns: bool = False
    tokens: int = 0
    projects: bool = False

    @property
    def id(self) -> str:
        return "-".join([self.function, *(f"{k}={v}" for k, v in self.options.items())]).replace(" ", "")

    def batch(self, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
        torch.manual_seed(seed)
        student = 1.5 * torch.randn(size, *self.shape, dtype=torch.float64)
        teacher = None
        if self.teacher is not None:
            teacher = (1.5 * torch.randn(size, *self.teacher, dtype=torch.float64)).to(dtype)
        extra = (x.to(dtype) if x.is_floating_point() else x for x in self.extra(size))
        return Batch(student.to(dtype), teacher, tuple(extra))

    def mask(self, keep: Tensor) -> Tensor:
        """The mask that keeps the examples ``keep`` [B]."""
        return keep.unsqueeze(1).expand(-1, self.tokens) if self.tokens else keep

    def __call__(self, batch: Batch, **options: Any) -> Tensor:
        torch.manual_seed(0)
        teacher = () if batch.teacher is None else (batch.teacher,)
        f = getattr(losses, self.function)
        head = (torch.eye(CLASSES, dtype=batch.student.dtype),) if self.projects else ()
        return f(batch.student, *head, *teacher, *batch.extra, *self.fixed(), **{**self.options, **options})


def labels(size: int) -> tuple[Tensor, ...]:
    return (torch.randint(CLASSES, (size,)),)


def targets(size: int) -> tuple[Tensor, ...]:
    return (torch.randn(size, CLASSES, dtype=torch.float64),)


def largest(size: int) -> tuple[Tensor, ...]:
    found = (torch.randn(size, CLASSES, dtype=torch.float64)).log_softmax(-1).topk(3)
    return found.indices, found.values


def sample(size: int) -> tuple[Tensor, ...]:
    return torch.randint(CLASSES, (size, 4)), torch.rand(size, 4, dtype=torch.float64)


MEMORY, NEGATIVES = 11, 7


def memory() -> losses.ContrastiveMemory:
    bank = losses.ContrastiveMemory(MEMORY, CLASSES)
    bank.scales.fill_(2.0)
    return bank


def drawn(size: int) -> tuple[Tensor, ...]:
    index = torch.randint(MEMORY, (size,))
    return index, memory().draw(index, NEGATIVES)


def margin() -> tuple[Tensor, ...]:
    return (-torch.linspace(0.2, 1.0, 3),)


def spread() -> tuple[Tensor, ...]:
    return (torch.linspace(-1.0, 1.0, 3),)


MAP, WIDE, SMALL = (3, 4, 4), (5, 4, 4), (5, 2, 3)
SCORES = (2, 5, 5)


def relation(function: str, **more: Any) -> Case:
    return Case(function, relation=True, **{"shape": (4,), "teacher": (7,), **more})


CASES = [
    # class scores
    Case("kd"),
    Case("kd", options={"temperature": 1.0}),
    Case("kd", options={"standardize": True}),
    Case("soft_cross_entropy", divergence=False),
    Case("cross_entropy", teacher=None, extra=labels, divergence=False),
    Case("cross_entropy", teacher=None, extra=labels, divergence=False, options={"label_smoothing": 0.2}),
    Case("teacher_free", teacher=None, extra=labels, divergence=False),
    Case("teacher_free", teacher=None, extra=labels, divergence=False, options={"variant": "authors"}),
    Case("distillation", extra=labels, divergence=False),
    Case("distillation", options={"alpha": 0.0}, extra=labels, divergence=False),
    Case("binary_kd"),
    Case("binary_cross_entropy", divergence=False),
    Case("mse"),
    Case("bounded_regression", extra=targets),
    Case("bounded_regression", extra=targets, options={"margin": 0.5}, divergence=False),
    # divergences
    Case("reverse_kl"),
    Case("js"),
    *(Case("js", options={"beta": beta, "temperature": 2.0}) for beta in (0.0, 0.1, 1.0)),
    Case("skew_kl"),
    Case("skew_kl", options={"reverse": True, "temperature": 2.0}),
    Case("skew_kl", options={"alpha": 0.0}),
    Case("tvd"),
    Case("uld"),
    Case("uld", teacher=(CLASSES + 3,), options={"temperature": 2.0}, divergence=False),
    # part of a distribution
    Case("topk_kd", teacher=None, extra=largest, divergence=False),
    Case("topk_kd", teacher=None, extra=largest, divergence=False, options={"temperature": 1.0}),
    Case("sampled_kd", teacher=None, extra=sample, divergence=False),
    # tokens
    Case("linear_divergence", projects=True, options={"chunk": 2}),
    *(
        Case("linear_divergence", projects=True, options={"divergence": name, "temperature": 2.0, **more})
        for name, more in (
            ("reverse_kl", {}),
            ("js", {}),
            ("js", {"beta": 0.1}),
            ("skew_kl", {}),
            ("skew_kl", {"reverse": True}),
            ("tvd", {}),
        )
    ),
    # structured
    Case("dkd", extra=labels),
    Case("dist", relation=True),
    Case("dist", relation=True, options={"beta": 0.5, "gamma": 2.0, "temperature": 4.0}),
    Case("mlkd", relation=True, repeated=None),
    # features
    Case("hint", shape=MAP, teacher=MAP),
    Case("hint", shape=(4,), teacher=(4,)),
    Case("simkd", shape=MAP, teacher=MAP),
    Case("simkd", shape=MAP, teacher=MAP, options={"variant": "authors"}),
    Case("factor_transfer", shape=MAP, teacher=MAP),
    Case("factor_transfer", shape=MAP, teacher=MAP, options={"variant": "authors"}),
    Case("overhaul", shape=MAP, teacher=MAP, fixed=margin),
    Case("vid", shape=MAP, teacher=MAP, fixed=spread, divergence=False),
    Case("vid", shape=(3,), teacher=(3,), fixed=spread, options={"variant": "authors"}, divergence=False),
    Case(
        "crd",
        extra=drawn,
        fixed=lambda: (memory(),),
        options={"temperature": 0.5},
        divergence=False,
        teacher_learns=True,
    ),
    Case(
        "crd",
        extra=drawn,
        fixed=lambda: (memory(),),
        options={"variant": "authors"},
        divergence=False,
        teacher_learns=True,
    ),
    # directions
    Case("cosine"),
    Case("patient"),
    Case("patient", options={"variant": "authors"}),
    Case("margin_mse"),
    # maps
    Case("attention_transfer", shape=MAP, teacher=WIDE),
    Case("attention_transfer", shape=MAP, teacher=SMALL, options={"variant": "authors"}),
    Case("nst", shape=MAP, teacher=WIDE),
    Case("nst", shape=MAP, teacher=SMALL, options={"kernel": "linear"}),
    Case("review", shape=(3, 6, 5), teacher=(3, 6, 5)),
    # relations
    relation("similarity", repeated=lambda k: 1 / k),
    relation("correlation"),
    relation("pkt", repeated=None),
    relation("pkt", repeated=None, options={"variant": "authors"}),
    relation("rkd_distance"),
    relation("rkd_angle"),
    relation("cosine_matrix", repeated=None),
    # attention
    Case("attention_mse", shape=SCORES, teacher=SCORES, tokens=5),
    Case("attention_mse", shape=SCORES, teacher=(3, 5, 5), options={"heads": "mean"}, tokens=5),
    Case("attention_kl", shape=SCORES, teacher=SCORES, tokens=5),
    Case("attention_kl", shape=SCORES, teacher=(3, 5, 5), options={"heads": "mean", "temperature": 2.0}, tokens=5),
    Case("value_relation", shape=(5, 4), teacher=(5, 6), options={"heads": 2}, tokens=5),
]

UTILITIES = {
    "ContrastiveMemory", "overhaul_margin", "LinearHead", "LoRA", "TopKTargets", "SampledTargets",
    "CrossVocabularyTargets", "HardTargets", "SoftTargets", "TeacherDistribution", "coarse",
    "linear_cross_entropy", "linear_sums",
}  # fmt: skip
"""Exported names that are no losses, or several at once."""
