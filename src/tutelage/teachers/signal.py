"""What a teacher says about a batch, in one type for every kind of teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError
from tutelage.taps import Head, Needs


@dataclass(frozen=True)
class Sparse:
    """Part of a distribution over classes, at one temperature.

    Attributes:
        kind: ``topk``: the largest classes, with their log-probabilities; ``sampled``: draws, with weights whose
            expectation is the distribution.
        index: classes ``[..., k]``, int64.
        values: ``[..., k]`` log-probabilities, or weights.
        classes: how many there are in all.
        temperature: T of the distribution.
    """

    kind: Literal["topk", "sampled"]
    index: Tensor
    values: Tensor
    classes: int
    temperature: float


@dataclass(frozen=True)
class Signal:
    """A teacher's word on one batch. It carries no gradient.

    Attributes:
        logits: dense scores ``[B, C]`` or ``[B, L, C]``, at temperature 1.
        hidden: activations by module path.
        head: input and weights of the output layer, from which a chunked loss makes logits itself.
        sparse: part of the distribution, from a teacher that keeps no more.
    """

    logits: Tensor | None = None
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    head: Head | None = None
    sparse: Sparse | None = None

    def dense(self) -> Tensor:
        """The dense logits; raises :class:`CapabilityError` when the signal has none."""
        if self.logits is None:
            raise CapabilityError(
                "the signal has no dense logits", remedy="declare needs=Needs(logits=True) in the method"
            )
        return self.logits

    @property
    def vocabulary(self) -> int | None:
        """Number of classes, or size of the vocabulary."""
        if self.logits is not None:
            return self.logits.shape[-1]
        if self.sparse is not None:
            return self.sparse.classes
        return None if self.head is None else self.head.weight.shape[0]


class Teacher(Protocol):
    """Anything that gives a :class:`Signal` for a batch."""

    @property
    def provides(self) -> frozenset[str]:
        """Which of ``logits``, ``hidden``, ``head``, and of ``topk`` and ``sampled`` for logits, it can give."""
        ...

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """Its word on the batch, as far as needed."""
        ...
