"""The output of a teacher for a batch, in one type for every kind of teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from torch import Tensor

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError
from tutelage.taps import Head, Needs


@dataclass(frozen=True)
class Sparse:
    """Part of a distribution over classes, at one temperature.

    Attributes:
        kind: ``topk``: the largest classes with their log-probabilities; ``sampled``: random classes with weights,
            whose expectation is the distribution.
        index: ``[..., k]`` classes, int64.
        values: ``[..., k]`` log-probabilities or weights.
        classes: number of classes in total.
        temperature: T of the distribution.
    """

    kind: Literal["topk", "sampled"]
    index: Tensor
    values: Tensor
    classes: int
    temperature: float


@dataclass(frozen=True)
class Signal:
    """A teacher's output for one batch, without gradient.

    Attributes:
        logits: dense scores ``[B, C]`` or ``[B, L, C]``, at temperature 1.
        hidden: activations by tap.
        head: input and weights of the output layer, from which a chunked loss computes logits.
        sparse: part of the distribution, from a teacher without dense logits.
    """

    logits: Tensor | None = None
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    head: Head | None = None
    sparse: Sparse | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Signal:
        """The signal with each of its tensors changed, apart from sparse ones."""
        return replace(
            self,
            logits=None if self.logits is None else change(self.logits),
            hidden={tap: change(x) for tap, x in self.hidden.items()},
            head=self.head and self.head.map(change),
        )

    def dense(self) -> Tensor:
        """The dense logits; raises :class:`CapabilityError` if the signal has none."""
        if self.logits is None:
            raise CapabilityError(
                "the teacher's signal has no dense logits", remedy="declare needs=Needs(logits=True) in the method"
            )
        return self.logits


class Teacher(Protocol):
    """Any object that computes a :class:`Signal` for a batch."""

    @property
    def provides(self) -> frozenset[str]:
        """What the teacher can compute: any of ``logits``, ``hidden``, ``head``, ``topk`` and ``sampled``."""
        ...

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """The teacher's output for the batch, as far as needed."""
        ...
