"""The loss of one optimizer step that is cut into micro-batches and processes; shared by every training loop.

The loss of a step is the sum over terms of

.. math:: w_k \\, \\frac{\\sum_i \\ell_{ki}}{n_k}

where :math:`n_k` counts what term :math:`k` averages over in *all* micro-batches of the step, on all processes. The
gradients of the micro-batches then add up to that of the full step, however it is cut.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError
from tutelage.methods.base import Method, Term, needs_of
from tutelage.teachers.signal import Signal, Teacher


def get_signal(teacher: Teacher | None, method: Method, batch: Batch) -> Signal | None:
    """The teacher outputs that the method needs for a batch; ``None`` if it needs none."""
    needs = needs_of(method, teacher)
    return None if needs is None or teacher is None else teacher.signal(batch, needs)


def count_terms(method: Method, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The number of positions that each term averages over in these micro-batches, on this process."""
    counts: dict[str, Tensor] = {}
    for batch in batches:
        for name, count in method.counts(batch).items():
            counts[name] = counts[name] + count if name in counts else count
    return counts


def scale_terms(method: Method, counts: Mapping[str, Tensor], parts: int) -> dict[str, Tensor]:
    """The factor of each term's sum.

    Args:
        method: has the terms' weights.
        counts: of the full step, on all processes.
        parts: what the gradient is divided by after backward: the averaging over processes and micro-batches.
    """
    return {name: method.weights[name] * parts / count.clamp(min=1) for name, count in counts.items()}


def check_terms(method: Method, terms: Mapping[str, Term], scale: Mapping[str, Tensor]) -> None:
    """Raise :class:`CapabilityError` when the method's terms, counts and weights have different names."""
    names = {"terms": set(terms), "counts": set(scale), "weights": set(method.weights)}
    if len({frozenset(n) for n in names.values()}) != 1:
        places = "; ".join(f"{k}: {', '.join(sorted(v))}" for k, v in names.items())
        raise CapabilityError(
            f"the terms of {type(method).__name__} have different names in different places: {places}",
            remedy="forward(), counts() and weights must name the same terms",
        )


class TermSums:
    """The sums and counts of each term, over micro-batches and steps."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Term], scale: Mapping[str, Tensor]) -> Tensor:
        """Add the terms of a micro-batch, and return its scaled loss, a scalar with a gradient."""
        loss: Tensor | None = None
        for name, (total, count) in terms.items():
            part = total * scale[name]
            loss = part if loss is None else loss + part
            if name in self.sums:
                self.sums[name] += total.detach()
                self.counts[name] += count
            else:
                self.sums[name], self.counts[name] = total.detach().clone(), count.clone()
        assert loss is not None
        return loss

    def means(self) -> dict[str, float]:
        """The mean of each term on this process, unweighted."""
        return {name: float(total / self.counts[name].clamp(min=1)) for name, total in self.sums.items()}


def mean_loss(method: Method, terms: Mapping[str, Term]) -> Tensor:
    """The loss of a batch by itself, on this process alone."""
    return torch.stack([method.weights[k] * total / n.clamp(min=1) for k, (total, n) in terms.items()]).sum()
